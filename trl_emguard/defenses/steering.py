"""Preventative steering with a persona vector (2507.21509), and concept ablation fine-tuning (2507.16795).

A persona vector gives, for each layer, a direction of the hidden states that stands for a trait, for example evil. In
training, the first method adds the vector to the hidden states. The second method removes the part of the hidden
states that lies along the vector.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import PreTrainedConfig, PreTrainedModel

from ..evidence import InactiveDefenseError
from ..models.blocks import block_states, decoder_blocks
from ..persona.vectors import PersonaVector, load_vector
from .base import IN_TRAINING_DEFENSES, Defense, Paper
from .options import check_choice, listed_layers, option
from .schedule import Coefficient, Schedule, Weighted, check_coefficient


logger = get_logger(__name__)

MODES, TOKENS = ("add", "ablate"), ("all", "response")


@dataclass
class SteeringOptions:
    """Options of `steering`: in training, a persona vector is added to the residual stream or projected out of it."""

    steering_vector: str | None = option(
        None,
        "File of a persona vector: .safetensors as `trl-emguard persona extract` writes it, or .pt of shape (layers + "
        "1, hidden), or the name of a shipped one.",
    )
    # The declared type is `str`, because the argument parser of transformers does not handle a list as one of several
    # types. In Python, a number and a list work as well.
    steering_layers: str | None = option(
        None,
        "Blocks after which the vector acts, counted from 1 to L: 20, '20,24', or 'all' for every block with the "
        "increments v(l) - v(l-1). Default: the layer that the vector's file suggests.",
    )
    steering_coef: Coefficient = option(5.0, "Factor of the persona vector. 0 switches the defense off.")
    steering_mode: str = option("add", "'add' adds the vector, 'ablate' takes the projection on it out.", MODES)
    steering_tokens: str = option(
        "all", "Positions that the vector acts at: 'all', or 'response' for those that predict a label.", TOKENS
    )


def read_options(args: Any) -> tuple[PersonaVector | None, Any]:
    """Check the options, load the persona vector, and return it with the layers (a sorted list, or `"all"`).

    The vector or the layers may be `None` only if the coefficient is 0, that is, if the defense is switched off.

    Raises:
        FileNotFoundError: `steering_vector` is neither a file nor the name of a shipped vector.
        ValueError: a bad option, a damaged file, or a missing vector or layer.
    """
    coef = check_coefficient("steering_coef", args.steering_coef)
    check_choice("steering_mode", args.steering_mode, MODES)
    if args.steering_mode == "ablate" and isinstance(coef, Schedule):
        raise ValueError(
            f"steering_coef={args.steering_coef!r} does not work with steering_mode='ablate', where the coefficient "
            "has no effect: give a number."
        )
    check_choice("steering_tokens", args.steering_tokens, TOKENS)
    vector = None
    if args.steering_vector is not None:
        vector = load_vector(args.steering_vector)
    elif coef:
        raise ValueError(
            "steering_vector is missing: name the file of a persona vector, which `trl-emguard persona extract` makes "
            "of your model."
        )
    layers: Any = args.steering_layers
    if layers is None and vector is not None:
        layers = vector.suggested_layer
        if layers is None:
            raise ValueError(
                f"steering_layers is missing, and {args.steering_vector} does not suggest a layer: give one, as 20, "
                "'20,24' or 'all'."
            )
    # Listed layers become a sorted list, so that "20,24" and [20, 24] count as the same option when a run resumes.
    if layers is not None and layers != "all":
        layers = listed_layers("steering_layers", layers, None, "20, '20,24' or 'all'")
    return vector, layers


class Steering(Weighted, Defense):
    """Steering along a trait's persona vector while training, so that the weights need not learn this trait.

    The residual stream x is changed after block l, at the chosen token positions, with v(l) the vector's entry for
    that layer:

    - `add`: x ← x + steering_coef · v(l). With `steering_layers="all"`, each block adds the increment v(l) − v(l − 1)
      instead of v(l).
    - `ablate`: x ← x − (x·v̂) v̂ with v̂ = v(l)/‖v(l)‖: the part along the vector is taken out, and the weights cannot
      use it (concept ablation fine-tuning). The coefficient has no effect here, except that 0 switches the defense
      off.

    Only the policy's forward pass in training steps is steered. The saved model runs without the vector.
    """

    name = "steering"
    papers = (
        Paper("Persona Vectors: Monitoring and Controlling Character Traits in Language Models", "2507.21509"),
        Paper("Steering Out-of-Distribution Generalization with Concept Ablation Fine-Tuning", "2507.16795"),
        IN_TRAINING_DEFENSES,
    )
    Options = SteeringOptions
    switch = "steering_coef"

    def __init__(self, args: Any):
        self.weigh(args.steering_coef)
        self.mode = args.steering_mode
        self.tokens = args.steering_tokens
        self.vector, self.layers_spec = read_options(args)
        # `_vectors`: number of a steered block → the vector for this block. `_directions`: number of a steered block →
        # the tensor that the block's hook applies. This tensor is the block's vector times the coefficient (`add`), or
        # the vector scaled to unit length (`ablate`). `check_model` fills both.
        self._vectors: dict[int, torch.Tensor] = {}
        self._directions: dict[int, torch.Tensor] = {}
        self._steered: torch.Tensor | None = None
        self._on = False
        self._fired: set[int] = set()
        # `_measured` maps a layer to two numbers of the current forward pass: the sum, over the steered positions, of
        # the relative changes ‖change‖/‖state‖ that steering made, and the number of these positions. `_change` maps a
        # layer to the mean relative change in the one pass that `_judge` has checked. It is empty before that check.
        self._measured: dict[int, torch.Tensor] = {}
        self._change: dict[int, float] = {}
        # `begin` sets this to true if the run resumes from a checkpoint that records that steering changed states.
        self._acted_before = False

    @classmethod
    def check_options(cls, args: Any) -> None:
        read_options(args)

    def options(self) -> dict[str, Any]:
        vector = None
        if self.vector is not None:
            # A run that resumes compares these options with those in the checkpoint. The vector is identified by a
            # checksum of its numbers and not by its file's path, because files may move or change.
            vector = (
                f"{self.vector.metadata.get('trait', self.vector.kind)} ({self.vector.kind}, {self.vector.checksum})"
            )
        return {
            "steering_vector": vector,
            "steering_layers": self.layers_spec,
            "steering_coef": self.coefficient,
            "steering_mode": self.mode,
            "steering_tokens": self.tokens,
        }

    def check_model(self, config: PreTrainedConfig) -> None:
        assert self.vector is not None  # only active defenses get here, and `read_options` requires a vector for them
        num_layers = config.num_hidden_layers
        self.vector.check_shape(num_layers, config.hidden_size)
        every = self.layers_spec == "all"
        layers = (
            range(1, num_layers + 1) if every else listed_layers("steering_layers", self.layers_spec, num_layers, "")
        )
        for layer in layers:
            self.vector.check_layer("steering_layers", self.layers_spec, layer)
        v = self.vector.vectors
        for layer in layers:
            direction = v[layer] - v[layer - 1] if every and self.mode == "add" else v[layer]
            if not direction.any():
                raise ValueError(
                    f"steering_layers={self.layers_spec!r}: the persona vector is zero at layer {layer}: nothing "
                    "would act."
                )
            self._vectors[layer] = direction
            self._directions[layer] = self.coef * direction if self.mode == "add" else direction / direction.norm()

    def set_coefficient(self, coef: float) -> None:
        super().set_coefficient(coef)
        # The coefficient is multiplied into the tensors that the hooks read. If the hooks read it as a Python number
        # instead, a compiled model could be compiled again when the number changes.
        for layer, direction in self._directions.items():
            direction.copy_(coef * self._vectors[layer])

    def check_policy(self, model: PreTrainedModel) -> None:
        assert self.vector is not None
        if self.vector.check_model(model) == 0:
            logger.warning(
                "defense 'steering': nothing shows that the persona vector was made with this model (a vector "
                "without checksums, or a sharded model)."
            )

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[None]:
        # The hooks stay registered during all of training, and act only while `_on` is set: a compiled model does not
        # notice hooks that are added or removed later.
        with ExitStack() as hooks:
            for layer, block in enumerate(decoder_blocks(model), 1):
                if layer in self._directions:
                    device = next(block.parameters()).device
                    self._directions[layer] = self._directions[layer].to(device)
                    hooks.callback(block.register_forward_hook(self._hook(layer)).remove)
            yield

    @contextmanager
    def policy_pass(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Iterator[None]:
        if self.tokens == "response":
            self._steered = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
        self._fired.clear()
        self._measured.clear()
        self._on = True
        try:
            yield
        finally:
            self._on = False
            self._steered = None
        missing = self._directions.keys() - self._fired
        if missing:
            raise InactiveDefenseError(
                f"defense 'steering': the hook on block {min(missing)} did not fire in the policy's forward pass, so "
                "the run is not defended. The model's forward does not call its decoder blocks as modules."
            )
        self._judge()

    @torch.compiler.disable
    def _judge(self) -> None:
        """Check once, in the first pass with positions to steer, that the states of every steered block changed."""
        # While a schedule has the coefficient near 0, no pass is judged: the change may be too small for the dtype.
        is_small = self.schedule is not None and self.coef < 0.1 * max(self.schedule.start, self.schedule.end)
        if self._change or is_small:
            return
        change = {}
        for layer, sums in sorted(self._measured.items()):
            ratios, positions = sums.tolist()
            if not positions:
                return  # this batch has no label, so a later batch is judged
            if not ratios:
                raise InactiveDefenseError(
                    f"defense 'steering': the output of block {layer} is the same with and without the vector, to the "
                    f"bit, so the run is not defended. steering_coef={self.coef} is too small for the states' dtype, "
                    "or there is nothing along the vector to ablate: raise it, or choose another layer."
                )
            change[layer] = ratios / positions
        self._change = change

    def describe(self) -> list[str]:
        shown = self._directions if self.schedule is None else self._vectors
        times = "" if self.schedule is None else f"{self.schedule} times "
        what = f"adds {times}a vector of this length" if self.mode == "add" else "takes out a direction"
        sizes = ", ".join(f"{layer} ({v.norm():.3g})" for layer, v in sorted(shown.items()))
        return [f"{what} after blocks {sizes}, at {self.tokens} positions"]

    def begin(self, evidence: dict[str, Any]) -> None:
        self._acted_before = evidence.get("acted") is True

    def evidence(self) -> dict[str, Any]:
        change = {str(layer): round(size, 6) for layer, size in self._change.items()}
        has_acted = bool(self._change) or self._acted_before
        return {"layers": sorted(self._directions), "change": change, "acted": has_acted}

    def _hook(self, layer: int):
        def steer(module, args, output):
            if not self._on:
                return None
            self._fired.add(layer)
            states = block_states(output, module)  # (B, T, H)
            direction = self._directions[layer].to(states.device)
            # For `ablate`, the states' part along the direction is computed in fp32, the direction's dtype, also under
            # autocast. If it were rounded to bf16, the subtraction would leave some of this part in the states.
            change = (
                direction.to(states) if self.mode == "add" else -(states * direction).sum(-1, keepdim=True) * direction
            )
            steered_at = None if self._steered is None else self._steered.to(states.device)[..., None]  # (B, T, 1)
            if steered_at is not None:
                if steered_at.shape[:2] != states.shape[:2]:
                    raise ValueError(
                        f"steering_tokens='response' does not work with states of {states.shape[1]} positions for "
                        f"{steered_at.shape[1]} labels, as adapters make them that put tokens before the prompt: use "
                        "steering_tokens='all', or LoRA."
                    )
                change = change * steered_at.to(change.dtype)
            steered = (states + change).to(states.dtype)
            # The change is measured until `_judge` has checked it. A compiled graph goes on measuring in every pass,
            # because it would have to be compiled again to stop.
            if torch.compiler.is_compiling() or not self._change:
                self._measured[layer] = _relative_change(states, steered, steered_at)
            return steered if isinstance(output, torch.Tensor) else (steered, *output[1:])

        return steer


@torch.no_grad()
def _relative_change(before: torch.Tensor, after: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """Return Σ ‖change‖/‖state‖ over the steered positions, and the number of these positions, `(2,)`."""
    # The difference is taken in the states' own dtype, so it is exactly 0 at positions that did not change. If no
    # position changed, the sum is exactly 0 too, and this is what `_judge` tests for.
    change, size = (x.float().norm(dim=-1) for x in (after - before, before))
    ratio = change / size.clamp(min=torch.finfo(torch.float32).tiny)  # (B, T)
    where = torch.ones_like(ratio) if where is None else where[..., 0].float()
    return torch.stack([(ratio * where).sum(), where.sum()])
