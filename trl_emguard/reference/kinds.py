"""References: what every kind of them can be asked, and the kind that is a model of its own."""

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
    """Origin of a reference, in the words that `defense.json` holds."""

    ADAPTERS_OFF = "base model, adapters off"
    ADAPTER_COPY = "frozen copy of the adapter ('ref')"
    MODEL_COPY = "frozen copy of the model"
    LOADED_AGAIN = "loaded again"
    GIVEN = "separate model (ref_model)"


class Reference:
    """A model that the policy is held to.

    Attributes:
        kind: its origin.
        text: the same in words, for logs and `defense.json`.
        model: causal language model without wrappers that the states come from.
        knows_all_positions: whether it can answer at positions that no term compares.
        runs_whole_batches: whether rows without a position to keep are run as well. Another batch rounds otherwise, so
            whole ones show that policy and reference are the same model, or that they are not.
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
            layers: blocks to keep.
        """
        del batch, positions, layers
        return None

    def inside(
        self, model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int]
    ) -> States | None:
        """Return the states of a batch from inside the policy's forward, or `None` if they are not made there.

        Args:
            model: the policy without wrappers.
            inputs: keyword arguments of its backbone.
            positions: `(B, T - 1)`, positions to keep.
            layers: blocks to keep.
        """
        del model, inputs, positions, layers
        return None

    def after(self) -> None:
        """Release what a pass has left."""

    def put_back(self) -> None:
        """Undo what the reference changed on models that the caller goes on using."""

    def fingerprint(self, policy: nn.Module) -> str:
        """Return a hash of the weights that the reference uses."""
        raise TypeError(f"{type(self).__name__} must override `fingerprint`.")

    # ---- passes before training, for states that are kept ----

    # Adapters of `model` that do not act in the reference's pass.
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
        """Free the device of what no later step runs, and return the head that steps read."""
        del accelerator
        return head


class ModelReference(Reference):
    """A frozen model of its own, run through its own prepared engine before the policy's forward.

    Args:
        model: model, with or without adapters. It is frozen.
        accelerator: the run's.
        kind: origin of the model.
        source: path that it was loaded from, for [`Kind.LOADED_AGAIN`].

    Attributes:
        model: causal language model without wrappers.
        engine: callable that runs the model.
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
        """Place the model as the policy is placed. One on the meta device, in a plan, stays there."""
        if next(self.model.parameters()).is_meta:
            return
        if is_deepspeed:
            self.engine = prepare_deepspeed(self._unprepared, self._accelerator)
        elif is_fsdp:
            # Block by block, as the policy. TRL's `prepare_fsdp` makes one unit of a model, which a pass gathers
            # whole.
            self.engine = fsdp2_prepare_model(self._accelerator, self._unprepared)
        else:
            self.engine = self._accelerator.prepare_model(self._unprepared, evaluation_mode=True)

    def before(self, batch: Mapping[str, Any], positions: torch.Tensor, layers: Sequence[int]) -> States:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "output_router_logits")}
        if not self.runs_whole_batches:
            inputs, positions = rows_with(inputs, positions)
        with self._gate.armed(ReferenceGuard(positions, layers), only_with_gradient=False):
            states = self.engine(**inputs)
        # FSDP2 takes a head apart again when the pass ends, so it is read anew.
        states.head = output_head(self.model)
        return states

    def after(self) -> None:
        # This model never has a backward pass, after which FSDP2 would take its head apart.
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
        # The head stays on the policy's device, a tied one as a copy.
        weight, bias = head
        return weight.to(accelerator.device), None if bias is None else bias.to(accelerator.device)

    def _move_backbone(self, device: torch.device | str) -> bool:
        """Move all but the head to a device, and return whether it could be moved.

        A model that the user passed stays, and so does one that is quantised or split over devices.
        """
        fixed = getattr(self.model, "hf_device_map", None) or getattr(self.model, "hf_quantizer", None)
        if self.kind is Kind.GIVEN or fixed:
            return False
        self.model.base_model.to(device)
        return True
