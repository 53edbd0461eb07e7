"""Base class of references, and the reference that is a separate model."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed

from ..guard.forward import Gate, ReferenceGuard, States, rows_with
from ..models.adapters import bare_model
from ..models.head import output_head
from ..models.identity import fingerprint
from ..models.sharding import reshard


class Kind(Enum):
    """Origin of a reference, in the words that `defense.json` uses."""

    ADAPTERS_OFF = "base model, adapters off"
    ADAPTER_COPY = "frozen copy of the adapter ('ref')"
    MODEL_COPY = "frozen copy of the model"
    LOADED_AGAIN = "loaded again"
    GIVEN = "separate model (ref_model)"


class Reference:
    """A model that the policy is kept close to.

    Attributes:
        kind: origin of the reference.
        text: the origin in words, for logs and `defense.json`.
        model: causal language model without wrappers that the states come from.
        knows_all_positions: whether the reference has states at positions that no term compares.
        runs_whole_batches: whether rows without a position to keep are run as well. States round differently in a
            smaller batch, so only whole batches show whether policy and reference are exactly the same model.
    """

    kind: Kind
    model: PreTrainedModel
    knows_all_positions: bool = True
    runs_whole_batches: bool = True

    @property
    def shares_weights(self) -> bool:
        """True if the reference runs on the policy's own base weights."""
        return self.kind in (Kind.ADAPTERS_OFF, Kind.ADAPTER_COPY)

    @property
    def text(self) -> str:
        return self.kind.value

    def before(self, batch: Mapping[str, Any], positions: torch.Tensor, layers: Sequence[int]) -> States | None:
        """Return a batch's states if this kind computes them before the policy's pass, else `None`.

        Args:
            batch: collated batch without keys that a model does not know.
            positions: `(B, T - 1)`, positions to keep.
            layers: blocks whose outputs are kept, counted from 1.
        """
        del batch, positions, layers
        return None

    def inside(
        self, model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int]
    ) -> States | None:
        """Return a batch's states if this kind computes them inside the policy's forward, else `None`.

        Args:
            model: the policy without wrappers.
            inputs: keyword arguments of the policy's backbone.
            positions: `(B, T - 1)`, positions to keep.
            layers: blocks whose outputs are kept, counted from 1.
        """
        del model, inputs, positions, layers
        return None

    def after(self) -> None:
        """Release the weights that a pass of a sharded model has left gathered."""

    def put_back(self) -> None:
        """Undo the reference's changes to models that the caller may use afterwards."""

    def fingerprint(self, policy: nn.Module) -> str:
        """Return a hash of the weights that the reference uses."""
        raise TypeError(f"{type(self).__name__} must override `fingerprint`.")

    # ---- passes before training, for states that are cached ----

    # Adapters of `model` that are switched off in the reference's pass.
    unused_adapters: frozenset[str] = frozenset()

    def run(
        self, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int], accelerator: Accelerator
    ) -> States:
        """Return the states of a batch from a pass outside of training."""
        raise TypeError(f"{type(self).__name__} must override `run`.")

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the reference's head, weight `(V, H)` and bias `(V,)` or `None`."""
        return output_head(self.model)

    def park(
        self, accelerator: Accelerator, head: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take weights that no training step needs off the device. Return the head, which steps still need."""
        del accelerator
        return head


class ModelReference(Reference):
    """Reference that is a separate, frozen model, run before the policy's forward.

    Args:
        model: model, with or without adapters. It is frozen.
        accelerator: the run's accelerator.
        kind: origin of the model.
        source: path that it was loaded from, for [`Kind.LOADED_AGAIN`].

    Attributes:
        model: causal language model without wrappers.
        engine: callable that runs the model: the model, or its wrapper by DeepSpeed, FSDP2 or accelerate.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, accelerator: Accelerator, kind: Kind, source: str | None = None
    ):
        self.kind = kind
        self.source = source
        self._was = model.training, [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
        model.eval()
        self.model = bare_model(model)
        self._gate = Gate(self.model)
        self._unprepared = model
        self._accelerator = accelerator
        self.engine = model

    @property
    def text(self) -> str:
        return self.kind.value if self.source is None else f"{self.kind.value} from {self.source}"

    def prepare(self, is_deepspeed: bool, is_fsdp: bool) -> None:
        """Prepare the model for the policy's engine and device. A dry run's model, on the meta device, stays there."""
        if next(self.model.parameters()).is_meta:
            return
        if is_deepspeed:
            self.engine = prepare_deepspeed(self._unprepared, self._accelerator)
        elif is_fsdp:
            # The model is sharded block by block, like the policy. TRL's `prepare_fsdp` would make it a single unit,
            # and every pass would gather all of its weights.
            self.engine = fsdp2_prepare_model(self._accelerator, self._unprepared)
        else:
            self.engine = self._accelerator.prepare_model(self._unprepared, evaluation_mode=True)

    def before(self, batch: Mapping[str, Any], positions: torch.Tensor, layers: Sequence[int]) -> States:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "output_router_logits")}
        if not self.runs_whole_batches:
            inputs, positions = rows_with(inputs, positions)
        with self._gate.armed(ReferenceGuard(positions, layers), only_with_gradient=False):
            states = self.engine(**inputs)
        # FSDP2 shards the head again when the pass ends, so the head is read anew.
        states.head = output_head(self.model)
        return states

    def after(self) -> None:
        # FSDP2 would shard the head again after a backward pass, but this model never has one.
        reshard(self.model)

    def put_back(self) -> None:
        if self.kind is Kind.GIVEN:
            self._gate.remove()
            was_training, trained = self._was
            self._unprepared.train(was_training)
            for parameter in trained:
                parameter.requires_grad_(True)

    def fingerprint(self, policy: nn.Module) -> str:
        del policy
        return fingerprint(self.model)

    def run(
        self, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int], accelerator: Accelerator
    ) -> States:
        self._move_backbone(accelerator.device)
        return self.before(inputs, positions, layers)

    def park(
        self, accelerator: Accelerator, head: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self._move_backbone("cpu"):
            return head
        # The head stays on the policy's device. If it is tied to the embeddings, which move, this makes a copy.
        weight, bias = head
        return weight.to(accelerator.device), None if bias is None else bias.to(accelerator.device)

    def _move_backbone(self, device: torch.device | str) -> bool:
        """Move all but the head to a device, and return whether it could be moved.

        A model that the user gave is not moved, nor is a model that is quantised or split over devices.
        """
        fixed = getattr(self.model, "hf_device_map", None) or getattr(self.model, "hf_quantizer", None)
        if self.kind is Kind.GIVEN or fixed:
            return False
        self.model.base_model.to(device)
        return True
