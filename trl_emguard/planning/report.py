"""Report of a dry run: what a run would do, and every error that it would meet before its first step.

The trainer of the run is built on the meta device, so no weights are loaded. Rows are tokenised and mixed as in the
run, the first batch is collated, and optimizer and scheduler are made. Nothing is trained or written. All of this
happens in one process. With an accelerate file, that process computes as if the file's ranks were running.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any

import datasets
import torch
from accelerate.utils import is_peft_model
from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback

from ..config import EMGuardConfig
from ..defenses import Defense, ReferenceDefense
from ..guard.scopes import ALL, LABELS
from ..models.ema import EMACallback
from ..models.shipped import resolve_model
from ..reference.cache import reference_cache_dir
from ..trainer import EMGuardTrainer
from .engine import Launch, simulated_ranks
from .memory import Shape, count_weights, memory_per_rank, peak
from .meta import Data, meta_model, meta_trainer, read_first_rows
from .network import network_per_step
from .plan import Plan


# A line of the report: its subject and its text.
Line = tuple[str, str]

BYTES = {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10, " bytes": 1}
COUNT = {"B": 10**9, "M": 10**6, "k": 10**3, "": 1}


def dry_run(
    name: str,
    args: EMGuardConfig,
    data: Data,
    quantization: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
    callbacks: list[TrainerCallback],
    launch: Launch,
    heard: list[str],
) -> list[Line]:
    """Build everything that a run builds before its first step, and return the lines of the report.

    Args:
        name: name of the model on the command line.
        args: configuration with complete `model_init_kwargs`.
        data: training and evaluation rows.
        quantization, peft_config, callbacks: arguments of the trainer.
        launch: facts about the launch.
        heard: list in which [`listening`] collects warnings. Those that the real run would not give are removed.

    Raises:
        ValueError, FileNotFoundError, InactiveDefenseError: errors that the run would raise.
    """
    path = resolve_model(name)
    with simulated_ranks(launch.data_ranks):
        trainer = meta_trainer(path, args, data, quantization, peft_config, callbacks, launch)
        _check_weights(trainer, path, args, heard)
        plan = Plan.of(trainer, launch)
        return [*describe(plan, name), *(("warning", note) for note in advice(plan))]


def _check_weights(trainer: EMGuardTrainer, path: str, args: EMGuardConfig, heard: list[str]) -> None:
    """Call `check_policy` again with real weights for each defense that warns about a model on the meta device.

    Weights on the meta device have no values, so a check that compares weights warns that it cannot. Such warnings are
    removed from `heard`. Only the first rows of each weight are loaded for the second check. If the weights are not on
    this machine, `heard` gets a line that says so. Persona vectors of callbacks are checked in the same way.
    """
    callbacks = trainer.callback_handler.callbacks
    vectors: list[Any] = [callback.persona_vector for callback in callbacks if hasattr(callback, "persona_vector")]
    vectors = [vector for vector in vectors if vector is not None]
    if not (vectors or trainer.overrides("check_policy")):
        return
    model, repeated = meta_model(path, args, None), []
    for defense in trainer.defenses:
        with listening() as warned:
            defense.check_policy(model)
        if warned:
            heard[:] = [text for text in heard if text not in warned]
            repeated.append(defense)
    if not (vectors or repeated):
        return
    has_read = read_first_rows(model, path, (args.model_init_kwargs or {}).get("revision"))  # type: ignore[union-attr]
    for vector in vectors:
        if not vector.check_model(model):
            heard.append(
                f"nothing shows on this machine that the persona vector of the drift was made with {path!r}: the "
                "weights are not here or cannot be compared (fp16, quantised), or the vector has no checksums. The "
                "run compares what it can when it starts."
            )
    for defense in repeated:
        if has_read:
            defense.check_policy(model)
        else:
            heard.append(
                f"no weights of {path!r} could be read on this machine, so defense {defense.name!r} is checked "
                "against them when the run starts."
            )


# ---- lines of the report ----


def describe(plan: Plan, name: str) -> list[Line]:
    """Return the report's lines about a plan. `name` is the model's name."""
    trainer = plan.trainer
    details = [(defense.name, text) for defense in trainer.defenses for text in _about_defense(defense, plan)]
    told = {text for _, text in details}
    return [
        *(("model", text) for text in _about_model(trainer.model, name)),
        *_about_data(plan),
        *_about_batches(plan),
        *(("defense", text) for text in trainer.describe() if text not in told),
        *details,
        *_about_memory(plan),
    ]


def _about_model(model: PreTrainedModel, name: str) -> list[str]:
    weights, shape = count_weights(model), Shape.of(model.config)
    dtype = str(model.dtype).removeprefix("torch.")
    for bits in (4, 8):
        if getattr(model, f"is_loaded_in_{bits}bit", False):
            dtype = f"{bits} bits ({dtype} outside of the linear layers)"
    trained = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    size, share = _short(weights.trained, COUNT), weights.trained / weights.total
    return [
        f"{name}: {_short(weights.total, COUNT)} parameters in {dtype}, {shape.layers} blocks of width {shape.hidden}",
        f"{size} of them are trained ({share:.2%}), in {', '.join(trained)}",
    ]


def _about_data(plan: Plan) -> list[Line]:
    args, counts, whole = plan.trainer.args, plan.rows, plan.trainer.whole_lengths or []
    if not counts.rows:
        return [("data", "streamed: rows and tokens are not counted")]
    unit, tokens, labels = _unit(plan), sum(counts.tokens), sum(counts.labels)
    lines = [("data", f"{counts.rows} {unit}, {tokens} tokens, {labels} of them are trained on (labels)")]
    cut = 0 if args.max_length is None else sum(length > args.max_length for length in whole)
    if cut:
        # Without packing, or with the packing strategy "bfd", a row longer than `max_length` loses tokens. The other
        # packing strategies move these tokens to other packs, so none is lost.
        is_split = args.packing and args.packing_strategy != "bfd"
        about = "warning" if cut > 0.05 * len(whole) and not is_split else "data"
        verb = "are longer than" if is_split else "are cut at"
        lines.append((about, f"{cut} of {len(whole)} rows {verb} max_length={args.max_length}"))
    if not args.packing and len(whole) > counts.rows:
        lines.append(("data", f"{len(whole) - counts.rows} rows have no label left and are dropped"))
    if 0 in counts.labels:
        lines.append(("data", f"{counts.labels.count(0)} {unit} have no label"))
    return [*lines, ("data", f"the longest of the {unit} has {max(counts.tokens)} tokens")]


def _unit(plan: Plan) -> str:
    return "packs" if plan.trainer.args.packing else "rows"


def _about_batches(plan: Plan) -> list[Line]:
    args, engine, rows = plan.trainer.args, plan.launch.engine, plan.rows.rows
    text = (
        f"per_device {args.per_device_train_batch_size} x accumulation {args.gradient_accumulation_steps} x ranks "
        f"{plan.launch.data_ranks} ({engine.name}) = {plan.rows_in_step} rows a step; {plan.steps} steps"
    )
    if not rows:
        return [("batch", text)]
    text += f" = {plan.steps / plan.steps_in_epoch:.3g} epochs of {plan.steps_in_epoch}"
    tokens, labels = (plan.in_step(sum(counts)) for counts in (plan.all_rows.tokens, plan.all_rows.labels))
    lines = [("batch", f"{text}; about {tokens} tokens a step, {labels} of them labels")]
    if plan.rows_in_step > rows:
        lines.append(("warning", f"a step takes {plan.rows_in_step} rows, and there are {rows}."))
    return lines


def _about_defense(defense: Defense, plan: Plan) -> list[str]:
    """Return lines about one defense: one about its loss term, or one about rows or tokens, or its own description.

    A defense that compares the policy with a reference gets a line with weight and positions of its loss term. One
    that adds rows to batches, or marks tokens, gets a line with the number of these tokens. Any other describes
    itself. Numbers that are not known before training are left out.
    """
    if isinstance(defense, ReferenceDefense):
        places = {LABELS: "positions that predict a label", ALL: "positions that predict any real token"}
        place = places.get(defense.tokens, f"positions that predict a label marked {defense.tokens!r}")
        layers = ", ".join(map(str, defense.layers(Shape.of(plan.trainer.model.config).layers)))
        compared = f"the outputs of blocks {layers}" if layers else "next-token distributions"
        positions = plan.positions(defense.tokens)
        share = "" if positions is None else f", about {plan.in_step(positions)} a step"
        weight = f"{defense.coef:g}" if defense.schedule is None else defense.schedule
        return [f"weight {weight} on {compared}, at {place}{share}"]
    if defense.name in plan.extra:
        counts = plan.extra[defense.name]
        size = f"{sum(counts.tokens)} tokens, {sum(counts.labels)} labels"
        return [f"the rows that it adds in an epoch, each counted once: {size}"]
    if defense.scopes:
        tokens = plan.marked_tokens(defense)
        scopes = ", ".join(map(repr, defense.scopes))
        return [] if tokens is None else [f"{tokens} tokens in the {_unit(plan)} are marked {scopes}"]
    return defense.describe()


def _about_memory(plan: Plan) -> list[Line]:
    model, engine, run = plan.trainer.model, plan.launch.engine, plan.largest_batch()
    weights, shape = count_weights(model), Shape.of(model.config)
    if not run.length:
        return [("memory", "not estimated: a stream without max_length does not say how long its rows are")]
    memory = memory_per_rank(weights, shape, run, engine)
    averages = any(isinstance(callback, EMACallback) for callback in plan.trainer.callback_handler.callbacks)
    memory["moving average"] = 4 * weights.trained if averages else 0  # kept in fp32 from the first step to the last
    place = f"at {run.rows} x {run.length} tokens (estimated; docs/scaling.md)"
    share = f" (one in {run.checkpointing})" if run.checkpointing > 1 else ""
    lines = [
        ("checkpointing", f"blocks are recomputed in the backward pass{share}" if run.checkpointing else "off"),
        ("memory", f"about {_short(peak(memory, run) + memory['moving average'])} per rank {place}"),
    ]
    lines += [("memory", f"{name}: {_short(size)}") for name, size in memory.items() if size]
    if not run.guarded:
        lines.append(("memory", "head: TRL's, which is not estimated"))
    if run.cached and plan.terms:
        size = _short(plan.cached_numbers() * model.dtype.itemsize)
        lines.append(("disk", f"reference cache: about {size} in {reference_cache_dir()}, less what is there"))
    network = {name: size for name, size in network_per_step(weights, run, engine).items() if size}
    if network:
        parts = ", ".join(f"{name} {_short(size)}" for name, size in network.items())
        lines.append(("network", f"about {_short(sum(network.values()))} per rank and step: {parts}"))
    return lines


def advice(plan: Plan) -> list[str]:
    """Return notes on settings that stop the run, are ignored, cost memory or time, or make an estimate too high."""
    trainer, args, launch, run = plan.trainer, plan.trainer.args, plan.launch, plan.largest_batch()
    engine, gpus = launch.engine, torch.cuda.device_count()
    # The checkpoint's config may hold quantisation settings as a dict. Quantising the model replaces the dict by an
    # object. If there is a dict here, the model on the meta device was therefore not quantised.
    quantization: Any = getattr(trainer.model.config, "quantization_config", None)
    uncounted = quantization.get("quant_method") if isinstance(quantization, dict) else None
    how = args.activation_checkpointing_kwargs or {}
    is_alone, has_bf16 = engine.name == "one process", trainer.accelerator.mixed_precision == "bf16"
    notes = {
        "this machine has no accelerator, and bf16=True is refused here without use_cpu=True.": (
            args.bf16 and is_alone and not launch.on_cpu and not torch.accelerator.is_available()
        ),
        f"optim={run.optimizer}: bitsandbytes does not know FSDP's shards. Use adamw_torch.": (
            launch.fsdp and "8bit" in run.optimizer
        ),
        f"this machine has {gpus} GPUs, and the launch has {engine.ranks} ranks (over all machines).": (
            engine.ranks > gpus and not is_alone and not launch.on_cpu
        ),
        f"this machine has {gpus} GPUs, and the launch has {engine.ranks} ranks: --num_processes {gpus} uses all.": (
            engine.ranks < gpus and launch.model_ranks == 1 and not is_alone and not launch.on_cpu
        ),
        "offloaded states and activations are counted as GPU memory here, so the run needs less than is said.": (
            launch.offloads or args.activation_offloading or (run.checkpointing and how.get("offload"))
        ),
        "selective checkpointing keeps more than the inputs of blocks, so the run needs more memory than is said.": (
            run.checkpointing and how.get("selective")
        ),
        "the reference is a model of its own: the weights are in memory twice. With an adapter it takes none.": (
            run.reference == "model" and not run.cached
        ),
        "dtype=float32 with bf16=True: the frozen weights take twice the memory of dtype=bfloat16, and are cast in "
        "every pass.": (
            is_peft_model(trainer.model) and trainer.model.dtype == torch.float32 and has_bf16 and not quantization
        ),
        f"the checkpoint's quantisation ({uncounted}) is not counted, so the run needs less memory than is said.": (
            uncounted
        ),
    }
    return [*launch.notes, *(note for note, holds in notes.items() if holds)]


def _short(number: int, units: dict[str, int] = BYTES) -> str:
    """Return a number as text with three digits, in the largest unit that does not exceed the number."""
    unit = next((unit for unit, size in units.items() if number >= size), "")
    value = number / units.get(unit, 1)
    return f"{value:.3g}{unit}" if value < 999.5 else f"{value:.0f}{unit}"


# ---- warnings and printing ----


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collect Python's warnings and the messages of every logger at WARNING or above, instead of printing them.

    Each text is kept once. Future, deprecation and resource warnings are dropped.
    """
    heard: list[str] = []

    def hear(text: object) -> None:
        text = " ".join(str(text).split()).removeprefix("[RANK 0] ")
        if text not in heard:
            heard.append(text)

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: hear(record.getMessage())  # type: ignore[method-assign]
    with ExitStack() as restored, warnings.catch_warnings():
        for logger in map(logging.getLogger, (None, "transformers", "datasets", "trl", "peft", "accelerate")):
            # A library's logger that propagates reaches the root logger, so it needs no handler of its own.
            if logger.parent is None or not logger.propagate:
                restored.callback(setattr, logger, "handlers", logger.handlers)
                logger.handlers = [handler]
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *args, **kwargs: hear(message)
        yield heard


def report(call: Callable[[list[str]], list[Line]]) -> None:
    """Call a function that makes a report. Print the report and the warnings; after an error, only the warnings.

    Args:
        call: function that returns the lines of the report. It is given the list in which warnings are collected.
    """
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    lines: list[Line] = []
    with listening() as heard:
        try:
            lines = call(heard)
        finally:
            if not bars:
                datasets.enable_progress_bars()
            show(lines, heard)


def show(lines: list[Line], heard: list[str]) -> None:
    """Print a report: as a table in a terminal, otherwise as lines of `subject: text`."""
    lines = [*lines, *(("warning", text) for text in heard)]
    if not lines:
        # An error has ended the dry run before there was any line or warning to print. The command prints this error
        # afterwards.
        return
    title, console = "dry run: nothing is trained or written", Console(markup=False)
    if console.is_terminal:
        table = Table("", title)
        for about, group in groupby(lines, key=itemgetter(0)):
            table.add_row(about, "\n".join(text for _, text in group), style="yellow" if about == "warning" else None)
        console.print(table)
    else:
        print(title, *(f"{about}: {text}" for about, text in lines), sep="\n", flush=True)
