"""Token-regularised fine-tuning (2606.06667): penalty on changes of keys and values at tokens that begin every row."""

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import is_conversational, is_conversational_from_value

from ..data.places import Loading, PlacedRows
from ..data.prepare import Rows
from ..evidence import InactiveDefenseError
from ..io.files import written_whole
from ..models.batches import eval_mode
from ..models.blocks import decoder_blocks
from ..models.chat import template_arguments
from ..models.load import without_weights
from .base import ModelDefense, Paper
from .options import option
from .schedule import Coefficient, check_coefficient


# File in a checkpoint. It stores the prefix (the tokens that every training row begins with), and the keys and values
# that these tokens had before training.
START_FILE = "treft.npz"


@dataclass
class TReFTOptions:
    """Options of `treft`: penalty on changes of keys and values at the tokens that every training row begins with."""

    treft_coef: Coefficient = option(
        10.0,
        "Weight of the relative squared change of keys and values on the prefix. 0 switches it off.",
    )


class TReFT(ModelDefense):
    """Loss `L = CE + treft_coef · mean_l mean_t (‖k − k⁰‖²/‖k⁰‖² + ‖v − v⁰‖²/‖v⁰‖²)` over the prefix's tokens t.

    The prefix is the longest sequence of tokens that every training row begins with. k and v are the outputs of
    `k_proj` and `v_proj` of block l at a token of the prefix, with adapters, before rotary position embedding. k⁰ and
    v⁰ are the same outputs in the model that training starts from. The prefix is the same in every row, so one forward
    pass over the prefix alone gives k and v for all rows.
    """

    name = "treft"
    papers = (
        Paper(
            "The Piggyback Hypothesis of Generalization: Explaining and Mitigating Emergent Misalignment",
            "2606.06667",
        ),
    )
    Options = TReFTOptions
    switch = "treft_coef"

    def __init__(self, args: Any):
        self.weigh(args.treft_coef)
        self.prefix: list[int] = []
        # Keys and values of the prefix before training: for each block a tensor of its keys, then one of its values,
        # `(1, prefix length, width)`, in fp32, or in fp64 for a model in fp64. A new run's first pass sets them.
        self.start: list[torch.Tensor] | None = None
        self._template_arguments: dict[str, Any] | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @classmethod
    def check_options(cls, args: Any) -> None:
        check_coefficient("treft_coef", args.treft_coef)
        if cls.is_on(args) and getattr(args, "packing", False) and args.packing_strategy == "wrapped":
            raise ValueError(
                "packing_strategy='wrapped' does not work with defense='treft': it cuts off the beginnings of rows, "
                "and the defense acts on the tokens that begin every row. Use packing_strategy='bfd'."
            )

    def options(self) -> dict[str, Any]:
        return {"treft_coef": self.coefficient}

    def describe(self) -> list[str]:
        # With `skip_prepare_dataset`, `check_tokenizer` is not called, so the tokenizer is unknown. The token ids are
        # shown then.
        text = self.prefix if self._tokenizer is None else self._tokenizer.decode(self.prefix)
        return [f"keys and values are held on the {len(self.prefix)} tokens that every row begins with: {text!r}"]

    # ---- checks of model and rows ----

    def check_model(self, config: PreTrainedConfig) -> None:
        model = without_weights(config)
        if model is not None:
            self.check_policy(model)

    def check_policy(self, model: PreTrainedModel) -> None:
        projections(model)

    def prepare_rows(self, rows: Rows) -> Rows:
        if isinstance(rows, IterableDataset):
            raise ValueError(
                f"train_dataset of type {type(rows).__name__}: defense {self.name!r} needs the beginning of every row "
                "before training. Pass a `Dataset`."
            )
        first = next(iter(rows))
        has_turns = is_conversational(first) or is_conversational_from_value(first)
        self._template_arguments = template_arguments(first) if has_turns else None
        return rows

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        if self._template_arguments is None or not tokenizer.chat_template:
            return
        try:
            turns = [{"role": "user", "content": "-"}]
            tokenizer.apply_chat_template(turns, tokenize=False, **self._template_arguments)
        except TemplateError:
            return  # the trainer itself reports a bad template or bad rows, when it tokenises the rows
        try:
            # The next call finds out if the template writes the date. Such a template calls the function
            # `strftime_now`. A text is given in place of this function, so that its call raises `TypeError`.
            tokenizer.apply_chat_template(turns, tokenize=False, **{**self._template_arguments, "strftime_now": ""})
        except TypeError as error:
            raise ValueError(
                f"the chat template writes today's date, so what defense {self.name!r} holds would be gone tomorrow: "
                "give a template without the date (`chat_template_path`), or a fixed date in the rows' "
                "`chat_template_kwargs` if the template takes one."
            ) from error

    def train_loader(self, loading: Loading) -> Loading:
        rows = loading.rows.rows if isinstance(loading.rows, PlacedRows) else loading.rows
        if "input_ids" not in rows.column_names:
            raise ValueError(
                f"train_dataset: defense {self.name!r} needs the tokens of every row before training, and these rows "
                f"have the columns {rows.column_names}: leave `skip_prepare_dataset` out, or give `input_ids`."
            )
        prefix = common_prefix(rows)
        if self.start is not None and prefix != self.prefix:
            raise ValueError(
                f"train_dataset: its rows begin with another prefix ({len(prefix)} tokens) than those that defense "
                f"{self.name!r} has held so far ({len(self.prefix)} tokens): train on rows that begin in the same "
                "way, or make a new trainer."
            )
        self.prefix = prefix
        if not set(self.prefix) - {getattr(self._tokenizer, "bos_token_id", None)}:
            raise ValueError(
                f"train_dataset: its rows have no common beginning (tokens {self.prefix}), so there is no prefix that "
                f"defense {self.name!r} could hold. Train on conversations of one chat template. "
                "truncation_mode='keep_end' and packing_strategy='bfd_split' cut beginnings off."
            )
        return loading

    # ---- the loss term ----

    # Compilation is disabled, because a compiled model would be compiled again for the pass over the prefix.
    @torch.compiler.disable
    def model_states(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return keys and values of the prefix block by block, and as the last entry the model's last hidden states.

        All have the shape `(1, prefix length, width)`.
        """
        ids = torch.tensor([self.prefix], device=batch["input_ids"].device)
        modules = projections(model)
        # Eval mode switches off dropout, noise in the embeddings and gradient checkpointing. With checkpointing, the
        # outputs that hooks record inside a block would have no gradient. The prefix is short, so little memory is
        # needed without checkpointing.
        with _outputs(modules) as states, eval_mode(model):
            last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if len(states) < len(modules):
            raise InactiveDefenseError(
                f"defense {self.name!r}: {type(model).__name__} does not call k_proj and v_proj of every block as "
                "modules, so the run is not defended."
            )
        return [*(states[i] for i in range(len(modules))), last]

    def model_loss(self, states: list[torch.Tensor]) -> torch.Tensor:
        *states, last = states
        if self.start is None:
            # This is the first pass of a new run, because a resumed run has loaded `start`. No update has been made
            # yet, so these keys and values are those before training.
            self.start = [_exact(x.detach()) for x in states]
        self.start = [x0.to(x.device) for x, x0 in zip(states, self.start, strict=True)]
        changes = [_relative_change(x, x0).to(states[0].device) for x, x0 in zip(states, self.start, strict=True)]
        # Each block has two changes, one of its keys and one of its values. The mean over blocks of the sum of both is
        # twice the mean over all changes. The term `0 * last.sum()` lets a gradient reach the last block's output:
        # only then does FSDP2 gather this block's weights again for the backward pass.
        return 2 * torch.stack(changes).mean() + 0 * last.sum().to(changes[0])

    # ---- checkpoints ----

    def save(self, folder: str) -> None:
        if self.start is None:
            return
        arrays = {str(i): x.cpu().numpy() for i, x in enumerate(self.start)}
        with written_whole(Path(folder) / START_FILE) as scratch, scratch.open("wb") as file:
            np.savez(file, prefix=np.array(self.prefix), **arrays)  # type: ignore[arg-type]

    def load(self, folder: str) -> None:
        path = Path(folder) / START_FILE
        try:
            with np.load(path, allow_pickle=False) as arrays:
                prefix = arrays["prefix"].tolist()
                start = [torch.from_numpy(arrays[str(i)]) for i in range(len(arrays.files) - 1)]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is missing or corrupt ({type(error).__name__}: {error}): it holds the keys and values that "
                f"defense {self.name!r} compares with. Resume from another checkpoint."
            ) from error
        if prefix != self.prefix:
            raise ValueError(
                f"{path} is of another prefix ({len(prefix)} tokens) than the rows have ({len(self.prefix)} tokens): "
                "resume with the same rows and chat template."
            )
        self.start = start


NAMES = ("k_proj", "v_proj")


def projections(model: PreTrainedModel) -> list[nn.Module]:
    """Return `k_proj` and `v_proj` of every decoder block, in order.

    Raises:
        ValueError: a block does not have exactly one attention module with both. Some architectures compute queries,
            keys and values in one product (Phi-3, GPT-2, Falcon). Others compute keys and values from a latent state
            (DeepSeek), or have blocks without attention.
    """
    found: list[nn.Module] = []
    for number, block in enumerate(decoder_blocks(model), 1):
        attentions = [m for m in block.modules() if all(isinstance(getattr(m, p, None), nn.Module) for p in NAMES)]
        if len(attentions) != 1:
            raise ValueError(
                f"defense 'treft' does not support {type(model).__name__}: block {number} has "
                f"{len(attentions) or 'no'} attention with a `k_proj` and a `v_proj` of its own, whose outputs are "
                "compared. Choose another defense for this model."
            )
        found += [getattr(attentions[0], name) for name in NAMES]
    return found


def common_prefix(rows: Any) -> list[int]:
    """Return the tokens that all documents (rows or parts of packs) begin with, up to the first token with a label.

    If the first token of a document has a label, the document's labels are ignored, because its prompt is not masked.

    Args:
        rows: tokenised rows, each a document. With a column `seq_lengths`, each row is a pack of documents.
    """
    prefix: np.ndarray | None = None
    for batch in rows.with_format("arrow").iter(1000):
        for start, stop, ids, labels in _documents(batch):
            document = ids[start:stop]
            if labels is not None and start < stop and labels[start] == -100:
                trained = np.flatnonzero(labels[start:stop] != -100)
                document = document[: trained[0]] if len(trained) else document
            if prefix is None:
                prefix = document
            differs = np.flatnonzero(prefix[: len(document)] != document[: len(prefix)])
            prefix = prefix[: differs[0] if len(differs) else len(document)]
    return [] if prefix is None else prefix.tolist()


def _documents(batch: Any) -> Iterator[tuple[int, int, np.ndarray, np.ndarray | None]]:
    """Yield a tuple for each document in an arrow table: its start and end, and all tokens and labels of the table.

    Start and end are indices into tokens and labels, which are flat arrays and the same ones every time. The labels
    are `None` if the table has none.
    """

    def flat(name: str) -> tuple[np.ndarray, np.ndarray]:
        column = batch.column(name).combine_chunks()
        return np.asarray(column.value_lengths()), np.asarray(column.flatten())

    lengths, ids = flat("input_ids")
    if "seq_lengths" in batch.column_names:
        lengths = flat("seq_lengths")[1]
    labels = flat("labels")[1] if "labels" in batch.column_names else None
    ends = np.cumsum(lengths)
    for start, stop in zip(ends - lengths, ends, strict=True):
        yield int(start), int(stop), ids, labels


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Yield a dict that forward passes inside the `with` block fill: index in `modules` → the module's output."""
    outputs: dict[int, torch.Tensor] = {}

    def keep(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            outputs[place] = output

        return hook

    with ExitStack() as hooks:
        for place, module in enumerate(modules):
            hooks.callback(module.register_forward_hook(keep(place)).remove)
        yield outputs


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _relative_change(x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return the mean over tokens of ‖x − start‖² / ‖start‖², `()`, for states `(1, prefix length, width)`."""
    size = start.square().sum(-1).clamp(min=torch.finfo(start.dtype).tiny)
    return ((_exact(x) - start).square().sum(-1) / size).mean()
