"""Inoculation adapter: a frozen adapter with the unwanted trait runs beside the adapter that trains (2606.30252)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import linear
from transformers import PreTrainedConfig, PreTrainedModel

from ..evidence import InactiveDefenseError
from ..models.blocks import decoder_blocks
from ..models.identity import weights_fingerprint
from ..models.load import without_weights
from ..models.lora_files import Factors, lora_updates, read_lora
from ..models.shipped import last_name
from .base import Defense, Paper, added_scopes
from .options import check_number, option
from .step import MARKS, Marks


# Name of the attribute in which transformers stores a module's gradient-checkpointing function. This function runs a
# part of the model, and runs it again in the backward pass.
CHECKPOINT = "_gradient_checkpointing_func"
# Part of the names of all text layers in a model that also sees.
INSIDE_SEEING = "language_model."


@dataclass
class InoculationAdapterOptions:
    """Options of `inoculation_adapter`: frozen adapter with the unwanted trait, active while a new adapter trains."""

    inoculation_adapter: str | None = option(None, "Folder of a LoRA adapter that has the unwanted trait.")
    inoculation_adapter_scale: float = option(1.0, "Factor of its update. 0 switches it off.")


def read_options(args: Any) -> tuple[LoraConfig, Factors] | None:
    """Return the config and the LoRA factors of the adapter that the options name; `None` if they name none.

    Raises:
        FileNotFoundError: the folder holds no adapter.
        ValueError: a bad option, or an adapter that changes nothing, holds numbers that are not finite, or is not a
            plain LoRA of linear layers.
    """
    scale = check_number("inoculation_adapter_scale", args.inoculation_adapter_scale)
    if args.inoculation_adapter is None:
        if scale:
            raise ValueError(
                "inoculation_adapter is missing: name the folder of a LoRA adapter that was trained on the unwanted "
                "trait."
            )
        return None
    if scale and getattr(args, "torch_compile", False):
        raise ValueError(
            "torch_compile=True does not work with defense='inoculation_adapter', whose hooks act inside of blocks: "
            "leave it out."
        )
    path = Path(str(args.inoculation_adapter)).expanduser()
    try:
        config, weights = read_lora(path)
        factors = lora_updates(path, config, weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"inoculation_adapter: {error}") from error
    except ValueError as error:
        raise ValueError(f"inoculation_adapter: {error}") from error
    if not all(factor.isfinite().all() for pair in factors.values() for factor in pair):
        raise ValueError(
            f"inoculation_adapter={str(path)!r} holds numbers that are not finite: its training diverged, or its file "
            "is damaged. Train it again."
        )
    if not any(a.any() and b.any() for a, b in factors.values()):
        raise ValueError(
            f"inoculation_adapter={str(path)!r} changes nothing, since its updates are all zero: name an adapter that "
            "was trained on the unwanted trait."
        )
    return config, factors


class InoculationAdapter(Defense):
    """Frozen LoRA adapter with the unwanted trait, active while a new adapter trains.

    Each linear layer W that the frozen adapter changes computes Wx + inoculation_adapter_scale · s·B·A·x in the
    policy's pass of training steps, with A, B and the scaling s of the frozen adapter. The adapter that trains adds
    its own update to this. The model shows the trait already, so the data gives the new adapter less reason to learn
    the trait.

    The frozen adapter is not a part of the model. Its factors A and B are plain tensors outside of the model, which
    every rank has in full, and forward hooks add its output. So the training engine (DDP, DeepSpeed, FSDP), the
    optimizer, the references of other defenses and checkpoints do not see it.

    On rows that another defense mixes in, the frozen adapter does not act. These rows lack the trait, so the new
    adapter would learn to undo the frozen one there.
    """

    name = "inoculation_adapter"
    papers = (
        Paper(
            "Inoculation Adapters: Improved Selective Generalization of Capabilities with Fewer Surprising Backdoors",
            "2606.30252",
        ),
    )
    Options = InoculationAdapterOptions
    switch = "inoculation_adapter_scale"

    def __init__(self, args: Any):
        self.scale = float(args.inoculation_adapter_scale)
        self.path = args.inoculation_adapter
        self.trained_on: str | None = None
        # Factors of the frozen adapter: layer's name → A and scale · s·B. They are in fp32 until the policy's first
        # forward pass, which gives them the dtype and device of their layer's input.
        self.factors: Factors = {}
        self._description: str | None = None
        self._is_on = False
        # `_added`: scopes (named token sets) of rows that other defenses mix in. `_where`, `(B, T, 1)`: 1 for the
        # tokens of a micro-batch on which the frozen adapter acts, else 0; `None` if it acts on all of them.
        self._added: list[str] = []
        self._where: torch.Tensor | None = None
        self._fired: set[str] = set()
        # Modules of the policy that may run again in the backward pass (gradient checkpointing), where the frozen
        # adapter must act too. The method `training` lists them.
        self._checkpointing: list[nn.Module] = []
        # `_measured`: layer's name → relative change of the layer's output by the frozen adapter. The policy's first
        # forward pass in a new run fills it, and the check after this pass empties it. `_change`: mean of these
        # changes over all layers, from this pass or from the checkpoint of a resumed run; `None` until then.
        self._measured: dict[str, torch.Tensor] = {}
        self._change: float | None = None
        read = read_options(args)
        if read is not None:
            config, factors = read
            self.trained_on = config.base_model_name_or_path
            digest = weights_fingerprint(
                {f"{name} {i}": x for name, pair in factors.items() for i, x in enumerate(pair)}
            )
            # For `options()`. A hash of the factors identifies the adapter better than its folder's path, because the
            # folder may move or change.
            self._description = f"LoRA of {len(factors)} layers ({digest[:16]})"
            self.factors = {layer: (a, self.scale * b) for layer, (a, b) in factors.items()}

    @classmethod
    def check_options(cls, args: Any) -> None:
        read_options(args)

    def meet(self, others: Sequence[Defense]) -> None:
        self._added = added_scopes(others)

    def options(self) -> dict[str, Any]:
        return {"inoculation_adapter": self._description, "inoculation_adapter_scale": self.scale}

    def describe(self) -> list[str]:
        numbers = sum(factor.numel() for pair in self.factors.values() for factor in pair)
        return [
            f"the frozen adapter {str(self.path)!r} acts in {len(self.factors)} layers, times {self.scale:g}; its "
            f"{numbers / 1e6:.3g} million numbers are whole on every device"
        ]

    # ---- checks of tuning and model ----

    def check_tuning(self, has_adapter: bool) -> None:
        if not has_adapter:
            raise ValueError(
                f"defense {self.name!r} trains a new adapter beside the frozen one, and this run trains the model "
                "itself: give a LoRA configuration (`peft_config`, or `use_peft: true`), or choose another defense."
            )

    def check_model(self, config: PreTrainedConfig) -> None:
        name = getattr(config, "_name_or_path", "")
        if name and self.trained_on and last_name(name) != last_name(self.trained_on):
            raise ValueError(
                f"inoculation_adapter={str(self.path)!r} was trained on {self.trained_on!r}, and this run trains "
                f"{name!r}: name an adapter of this model. If both are the same weights, set "
                "`base_model_name_or_path` in the adapter's adapter_config.json to this model's name."
            )
        # The config is that of the text model, whose layers have other names in a model that also sees. An adapter of
        # such a model is checked only once the model is loaded (`check_policy`).
        model = None if any(INSIDE_SEEING in layer for layer in self.factors) else without_weights(config)
        if model is not None:
            self.check_policy(model)

    def check_policy(self, model: PreTrainedModel) -> None:
        inside = set(decoder_blocks(model).modules())
        modules = dict(model.named_modules())
        for layer, (a, b) in self.factors.items():
            module = modules.get(layer)
            if _sizes(module) != (a.shape[1], len(b)):
                raise ValueError(
                    f"inoculation_adapter={str(self.path)!r} is of another base model: it changes a linear layer "
                    f"{layer!r} from {a.shape[1]} to {len(b)} numbers, and {type(model).__name__} has none of these "
                    "sizes there. Name an adapter that was trained on this model."
                )
            if module not in inside:
                raise ValueError(
                    f"inoculation_adapter={str(self.path)!r} changes {layer!r}, which is outside of the decoder "
                    "blocks: train it on linear layers of the blocks alone, without the head."
                )

    # ---- the policy's forward pass ----

    @contextmanager
    def training(self, model: PreTrainedModel) -> Iterator[None]:
        self._checkpointing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        with ExitStack() as hooks:
            for layer in self.factors:
                hooks.callback(model.get_submodule(layer).register_forward_hook(self._hook(layer)).remove)
            yield

    @contextmanager
    def policy_pass(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> Iterator[None]:
        self._fired.clear()
        where = self._own_tokens(batch)
        with self._acting(where), ExitStack() as restored:
            # Gradient checkpointing runs blocks again in the backward pass, when this context is over and the hooks
            # inside of the blocks are off. So each checkpointing function is replaced, for this forward pass alone, by
            # a function that switches the hooks on for these later runs. Other forward passes use the original ones.
            for module in self._checkpointing:
                checkpoint = vars(module).get(CHECKPOINT)
                if checkpoint is not None:
                    setattr(module, CHECKPOINT, self._with_adapter(checkpoint))
                    restored.callback(setattr, module, CHECKPOINT, checkpoint)
                elif module.gradient_checkpointing and module.training:
                    raise InactiveDefenseError(
                        f"defense {self.name!r}: {type(module).__name__} checkpoints activations in a way of its own "
                        f"(it has no {CHECKPOINT}), so the frozen adapter would be missing where they are computed "
                        "again, and the run is not defended. Set activation_checkpointing=False, or update the "
                        "model's code."
                    )
            yield
        missing = sorted(self.factors.keys() - self._fired)
        if missing:
            raise InactiveDefenseError(
                f"defense {self.name!r}: the hook on {missing[0]!r} did not fire in the policy's forward pass, so the "
                f"run is not defended. {type(model).__name__} does not call this layer as a module."
            )
        # If all rows of this micro-batch are mixed in, a later one is judged. Padding does not count.
        if self._change is None and (where is None or bool((where[..., 0] & (batch["labels"] != -100)).any())):
            self._judge()

    def _own_tokens(self, batch: Mapping[str, Any]) -> torch.Tensor | None:
        """Return a mask of the tokens on which the frozen adapter acts, `(B, T, 1)`; `None` if it acts on all."""
        marks = batch.get(MARKS, Marks()).scopes
        masks = [marks[scope] for scope in self._added if scope in marks]
        return ~torch.stack(masks).any(0)[..., None] if masks else None

    @contextmanager
    def _acting(self, where: torch.Tensor | None) -> Iterator[None]:
        before = self._is_on, self._where
        self._is_on, self._where = True, where
        try:
            yield
        finally:
            self._is_on, self._where = before

    def _with_adapter(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a checkpointing function, so that the adapter also acts when the backward pass recomputes a block."""

        where = self._where

        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self._acting(where):
                    return function(*args, **kwargs)

            return checkpoint(run, *args, **kwargs)

        return call

    def _hook(self, layer: str) -> Callable[..., torch.Tensor | None]:
        def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if not self._is_on:
                return None
            self._fired.add(layer)
            x, (a, b) = args[0], self.factors[layer]
            if (a.device, a.dtype) != (x.device, x.dtype):
                a, b = self.factors[layer] = a.to(x), b.to(x)
            update = linear(linear(x, a), b)
            if self._where is not None:
                # Some layers get the tokens of all rows as one sequence, `(B · T, H)`.
                where = self._where.reshape(-1, 1) if x.dim() == 2 else self._where
                if where.shape[:-1] != x.shape[:-1]:
                    raise ValueError(
                        f"defense {self.name!r} does not act on rows that are mixed in, and the layer {layer!r} "
                        f"does not tell rows apart: it gets a tensor of shape {tuple(x.shape)}. Leave the mixed-in "
                        "rows out, or train the frozen adapter on other layers."
                    )
                update = update * where.to(update)
            changed = (output + update).to(output.dtype)
            if self._change is None:
                self._measured[layer] = _relative_change(output, changed)
            return changed

        return add

    # ---- evidence that the adapter acts ----

    def begin(self, evidence: dict[str, Any]) -> None:
        self._change = evidence.get("change")

    def evidence(self) -> dict[str, Any]:
        return {"layers": len(self.factors), "change": self._change, "acted": self._change is not None}

    def _judge(self) -> None:
        """Check that the adapter changed at least one layer's output, and store the mean relative change.

        Called after the first forward pass in a new run in which the frozen adapter acts on a row. This pass has put
        the changes into `_measured`.

        Raises:
            InactiveDefenseError: no layer's output changed.
        """
        changes = [float(change) for change in self._measured.values()]
        self._measured.clear()
        if not any(changes):
            raise InactiveDefenseError(
                f"defense {self.name!r}: the outputs of all layers are the same with and without the frozen adapter, "
                f"to the bit, so the run is not defended. inoculation_adapter_scale={self.scale} is too small for "
                "their dtype: raise it."
            )
        self._change = round(sum(changes) / len(changes), 6)


def _sizes(module: nn.Module | None) -> tuple[int | None, int | None]:
    """Return input and output width of a linear layer, plain or wrapped by PEFT; two `None` for any other `module`."""
    # GPT-2's linear layers (`Conv1D`) name their widths `nx` and `nf`.
    names = ("in_features", "out_features") if hasattr(module, "in_features") else ("nx", "nf")
    return getattr(module, names[0], None), getattr(module, names[1], None)


@torch.no_grad()
def _relative_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the relative change of a layer's output, ‖after − before‖ / ‖before‖, as a scalar tensor."""
    return (after - before).float().norm() / before.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
