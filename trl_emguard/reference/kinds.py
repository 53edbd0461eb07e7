"""Base class of reference models, and the reference that is a separate model."""

from collections.abc import Iterable, Mapping, Sequence
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
from ..models.adapters import bare_model, trained_outside_adapters
from ..models.head import output_head
from ..models.identity import fingerprint
from ..models.sharding import reshard


class Kind(Enum):
    """Origin of a reference, in the words that the run's record `defense.json` uses."""

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
        model: causal language model without wrappers that computes the states.
        knows_all_positions: whether states are available at positions that no defense compares (not so in a cache).
        runs_whole_batches: whether rows without a position to compare are run as well. States round differently in a
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

    def check_frozen(self, policy: Any) -> None:
        """Refuse a policy that trains weights which the reference shares.

        Raises:
            ValueError: such a weight was unfrozen after the reference was made.
        """
        outside = trained_outside_adapters(policy) if self.shares_weights else []
        if outside:
            raise ValueError(
                f"the weight {outside[0]!r} was unfrozen after the trainer was built, and the reference shares it: it "
                "would move with the policy. Unfreeze it before, on the model that you pass, or pass `ref_model`."
            )

    def before(self, batch: Mapping[str, Any], positions: torch.Tensor, layers: Sequence[int]) -> States | None:
        """Return the reference's states for a batch if they are made or read before the policy's pass, else `None`.

        Args:
            batch: collated batch with only the keys that a model's `forward` takes.
            positions: `(B, T - 1)`, mask of the positions whose states are kept.
            layers: blocks whose outputs are kept, counted from 1.
        """
        del batch, positions, layers
        return None

    def inside(
        self, model: PreTrainedModel, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int]
    ) -> States | None:
        """Return the reference's states for a batch if they are made inside the policy's forward, else `None`.

        A reference on the policy's own base weights makes its states there
        ([`~trl_emguard.reference.adapter.AdapterReference`]).

        Args:
            model: the policy without wrappers.
            inputs: keyword arguments of the policy's backbone.
            positions: `(B, T - 1)`, mask of the positions whose states are kept.
            layers: blocks whose outputs are kept, counted from 1.
        """
        del model, inputs, positions, layers
        return None

    def after(self) -> None:
        """Free the weights that a sharded reference's pass left gathered. Call this after using the pass's states."""

    def put_back(self) -> None:
        """Undo the reference's changes to the user's models.

        Called when the trainer is freed. The user may go on to use the models, for example in another trainer.
        """

    def fingerprint(self, policy: nn.Module) -> str:
        """Return a hash of the weights that the reference uses."""
        raise TypeError(f"{type(self).__name__} must override `fingerprint`.")

    # ---- passes before training, for a cache on disk ----

    # Names of the adapters on `model` that do not act in the reference's pass.
    unused_adapters: frozenset[str] = frozenset()

    def run(
        self, inputs: dict[str, Any], positions: torch.Tensor, layers: Sequence[int], accelerator: Accelerator
    ) -> States:
        """Run the reference on a batch before training starts, and return the states, which are then cached."""
        raise TypeError(f"{type(self).__name__} must override `run`.")

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the reference's output head: weight `(V, H)`, and bias `(V,)` or `None`."""
        return output_head(self.model)

    def park(
        self, accelerator: Accelerator, head: tuple[torch.Tensor, torch.Tensor | None]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Move all of a separate reference model except its output head to the CPU, if possible. Return the head.

        With cached states, training steps need only the head of the reference. A reference on the policy's weights
        moves nothing, and a model that the user gave, is quantised or is split over devices stays where it is.
        """
        del accelerator
        return head


class ModelReference(Reference):
    """Reference that is a separate, frozen model, run before the policy's forward.

    Args:
        model: model, with or without adapters. It is frozen here, and set to eval mode.
        accelerator: the run's accelerator.
        kind: origin of the model.
        source: path that the model was loaded from, for [`Kind.LOADED_AGAIN`].
        unused_adapters: names of the model's adapters that leave its outputs unchanged. Their weights, which may be
            random, do not identify the reference.

    Attributes:
        model: causal language model without wrappers.
        engine: callable that runs the model: the model, or its wrapper by DeepSpeed, FSDP2 or accelerate.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        accelerator: Accelerator,
        kind: Kind,
        source: str | None = None,
        unused_adapters: Iterable[str] = (),
    ):
        self.kind = kind
        self.source = source
        self.unused_adapters = frozenset(unused_adapters)
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
        """Move the model to its device, and wrap it with DeepSpeed, FSDP2 or accelerate, as the run needs.

        A dry run's model stays unwrapped on the meta device.
        """
        if next(self.model.parameters()).is_meta:
            return
        if is_deepspeed:
            self.engine = prepare_deepspeed(self._unprepared, self._accelerator)
        elif is_fsdp:
            # `fsdp2_prepare_model` shards the model block by block, just as the policy is sharded. With TRL's
            # `prepare_fsdp` the whole model would be one unit, and every pass would gather all weights together.
            self.engine = fsdp2_prepare_model(self._accelerator, self._unprepared)
        else:
            # If an evaluation precedes training, Trainer prepares the policy only if accelerate's list of prepared
            # models is empty. The reference is therefore not left in this list.
            known = list(self._accelerator._models)
            self.engine = self._accelerator.prepare_model(self._unprepared, evaluation_mode=True)
            self._accelerator._models = known

    def before(self, batch: Mapping[str, Any], positions: torch.Tensor, layers: Sequence[int]) -> States:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "output_router_logits")}
        if not self.runs_whole_batches:
            inputs, positions = rows_with(inputs, positions)
        if self._unprepared.training:
            # Several trainers may share a `ref_model`. When one of these trainers is freed, its reference's `put_back`
            # may set the model back to training mode. The other trainers still need eval mode.
            self._unprepared.eval()
        with self._gate.armed(ReferenceGuard(positions, layers), only_with_gradient=False):
            states = self.engine(**inputs)
        # FSDP2 may have sharded the head again when the pass ended, so `output_head` gathers it for the loss.
        states.head = output_head(self.model)
        return states

    def after(self) -> None:
        # FSDP2 may keep weights gathered until a backward pass has used them. The reference never has a backward
        # pass, so its weights are sharded again here.
        reshard(self.model)

    def put_back(self) -> None:
        self._gate.remove()
        if self.kind is Kind.GIVEN:
            was_training, trained = self._was
            self._unprepared.train(was_training)
            for parameter in trained:
                parameter.requires_grad_(True)

    def fingerprint(self, policy: nn.Module) -> str:
        del policy
        return fingerprint(self.model, self.unused_adapters)

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
        # Training steps need the head on the policy's device. A head that is tied to the embeddings has moved to the
        # CPU with them, so it is copied back.
        weight, bias = head
        return weight.to(accelerator.device), None if bias is None else bias.to(accelerator.device)

    def _move_backbone(self, device: torch.device | str) -> bool:
        """Move the backbone, which is everything but the head, to a device. Return whether that was possible.

        A model that the user gave is not moved. Neither is a quantised model, or one that is split over devices.
        """
        fixed = getattr(self.model, "hf_device_map", None) or getattr(self.model, "hf_quantizer", None)
        if self.kind is Kind.GIVEN or fixed:
            return False
        self.model.base_model.to(device)
        return True
