"""`--dry_run`: what a run would do, and every error that it would meet before its first step, without its weights.

The trainer is built as it would be, on a model whose weights have sizes and no numbers (the meta device). Rows are tokenised and
mixed as they would be, the first batch is collated, optimizer and scheduler are made. Nothing is trained or written. With an
accelerate file all of this happens in one process, which counts as the file's ranks.
"""

import argparse
import copy
import importlib.util
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin, is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from trl import SFTTrainer

from ..config import EMGuardConfig
from ..defenses import Interleaving, ReferenceDefense, Steering
from ..guarded_forward import positions_in_scope
from ..memory import Engine, Run, Shape, count_weights, memory_per_rank, network_per_step, peak
from ..mixing import INTERLEAVED, OF_POOL
from ..models import resolve_model
from ..reference import GIVEN, AdapterReference, ModelReference, trainable_outside_adapters
from ..trainer import EMGuardTrainer


# A line of the report: what it is about, and what is said.
Line = tuple[str, str]


# ---- the engine ----


@dataclass(frozen=True)
class Launch:
    """What an accelerate file and options of `accelerate launch` make of a run.

    Attributes:
        engine: its name and ranks.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`; `None` where the recipe alone decides.
        fsdp: accelerate's FSDP options.
        offloads: whether something is kept in CPU memory.
        on_cpu: whether the accelerate file trains on CPUs.
        notes: what accelerate passes over.
    """

    engine: Engine
    mixed_precision: str | None = None
    fsdp: FullyShardedDataParallelPlugin | None = None
    offloads: bool = False
    on_cpu: bool = False
    notes: tuple[str, ...] = ()


def read_launch(arguments: argparse.Namespace | None) -> Launch:
    """What would be launched; `None` for one process.

    Raises:
        ValueError: accelerate refuses the file or the options, or a DeepSpeed config in it cannot be read.
        FileNotFoundError: a DeepSpeed config that is not there.
    """
    if arguments is None:
        return Launch(Engine("one process"))
    try:
        args, _, from_file = _validate_launch_command(copy.copy(arguments))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"accelerate refuses {arguments.config_file}: {error}") from error
    ranks = int(args.num_processes or 1)
    precision = args.mixed_precision if from_file or arguments.mixed_precision else None
    if args.use_deepspeed and not args.cpu:
        stage, offloads = _zero(args)
        name: Any = f"zero{stage}" if stage else "ddp"
        return Launch(Engine(name, ranks), precision, offloads=offloads)
    if args.use_fsdp and not args.cpu:
        truth = partial(_is_true, args)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=int(args.fsdp_version),
            activation_checkpointing=truth("fsdp_activation_checkpointing"),
            state_dict_type=args.fsdp_state_dict_type,
        )
        return Launch(Engine("fsdp2", ranks), precision, plugin, truth("fsdp_offload_params"))
    # accelerate starts one process where neither GPUs nor `--multi_gpu` ask for several.
    if args.multi_gpu and ranks > 1:
        return Launch(Engine("ddp", ranks), precision, on_cpu=args.cpu)
    notes = (f"num_processes={ranks} starts one process: on CPUs, --multi_gpu starts several.",) if ranks > 1 else ()
    return Launch(Engine("one process"), precision, on_cpu=args.cpu, notes=notes)


def _zero(args: argparse.Namespace) -> tuple[int, bool]:
    """The stage of ZeRO, and whether something is offloaded."""
    if args.deepspeed_config_file is None:
        devices = (args.offload_optimizer_device, args.offload_param_device)
        return int(args.zero_stage if args.zero_stage is not None else 2), any(d not in (None, "none") for d in devices)
    path = Path(args.deepspeed_config_file)
    if not path.is_file():
        raise FileNotFoundError(f"deepspeed_config_file={str(path)!r} is not a file.")
    try:
        zero = json.loads(path.read_text(encoding="utf-8")).get("zero_optimization", {})
        offloads = any((zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param"))
        return int(zero.get("stage", 0)), offloads
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"deepspeed_config_file={str(path)!r} cannot be read: {error}") from error


def _is_true(args: argparse.Namespace, name: str) -> bool:
    return str(getattr(args, name)).lower() in ("true", "1", "yes")


@contextmanager
def _as_ranks(launch: Launch, args: EMGuardConfig) -> Iterator[None]:
    """This process counts as one of the launch's ranks, in whatever is computed from their number."""
    state = PartialState()
    before = state.num_processes, os.environ.get("ACCELERATE_MIXED_PRECISION"), args.mixed_precision
    if launch.mixed_precision is not None:
        os.environ["ACCELERATE_MIXED_PRECISION"] = args.mixed_precision = launch.mixed_precision
    AcceleratorState._reset_state()
    state.num_processes = launch.engine.ranks
    try:
        yield
    finally:
        state.num_processes = before[0]
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        if before[1] is not None:
            os.environ["ACCELERATE_MIXED_PRECISION"] = before[1]
        args.mixed_precision = before[2]
        AcceleratorState._reset_state()
        GradientState._reset_state()


def check_engine(args: EMGuardConfig, launch: Launch) -> list[str]:
    """What transformers and the engines refuse when they start, which one process cannot see.

    Args:
        args: of the run.
        launch: its engine.

    Returns:
        What stands in the way on this machine, though not in the recipe.

    Raises:
        ValueError: the run cannot start.
    """
    engine, fsdp = launch.engine, launch.fsdp
    if args.save_only_model and args.load_best_model_at_end and (engine.is_deepspeed or fsdp):
        raise ValueError(f"save_only_model=True does not work with load_best_model_at_end=True under {engine.name}.")
    if engine.name == "zero3" and args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size=True does not work with ZeRO-3: leave it out, or use ZeRO-2.")
    if fsdp and fsdp.activation_checkpointing and (args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)):
        raise ValueError(
            "fsdp_activation_checkpointing does not work with gradient_checkpointing=True, which checkpoints as well: set "
            "the first to false."
        )
    if fsdp and args.save_only_model and "SHARDED" in str(fsdp.state_dict_type):
        raise ValueError("save_only_model=True does not work with fsdp_state_dict_type=SHARDED_STATE_DICT: use FULL_STATE_DICT.")
    notes = list(launch.notes)
    if engine.name == "ddp" and launch.on_cpu:
        notes.append("several processes on CPUs want use_cpu=True in the recipe or on the command line as well.")
    if engine.name == "one process" and not launch.on_cpu and args.bf16 and not torch.accelerator.is_available():
        notes.append("this machine has no accelerator, and bf16=True is refused here without use_cpu=True.")
    if fsdp and "8bit" in _optimizer(args):
        notes.append(f"optim={_optimizer(args)}: bitsandbytes does not know FSDP's shards. Use adamw_torch.")
    if launch.offloads:
        notes.append("something is offloaded to CPU memory, which the memory estimate does not take off.")
    if engine.is_deepspeed and importlib.util.find_spec("deepspeed") is None:
        notes.append("deepspeed is not installed on this machine: pip install 'trl_emguard[deepspeed]'.")
    if engine.name != "one process" and not launch.on_cpu and engine.ranks > torch.cuda.device_count():
        notes.append(
            f"this machine has {torch.cuda.device_count()} GPUs, and the launch has {engine.ranks} ranks (over all machines)."
        )
    return notes


# ---- the model and the trainer ----


def meta_model(path: str, args: EMGuardConfig, quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
    """The model as SFTTrainer would load it, on the meta device: sizes and no numbers.

    Raises:
        FileNotFoundError: a folder without weights.
    """
    given: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if os.path.isdir(path):
        _check_weights(Path(path))
    remote = given.get("trust_remote_code", args.trust_remote_code)
    config = AutoConfig.from_pretrained(path, revision=given.get("revision"), trust_remote_code=remote)
    dtype = given.get("dtype", "float32")
    if dtype in ("auto", None):
        dtype = config.dtype or torch.float32
    kwargs = {
        "dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        "attn_implementation": given.get("attn_implementation"),
    }
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is None:
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote, **kwargs)
        else:
            model = architecture._from_config(config, **kwargs)
    quantization = given.get("quantization_config", quantization)
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.validate_environment(device_map=None)
        quantizer.preprocess_model(model=model, dtype=kwargs["dtype"], device_map=None)
        model.hf_quantizer = quantizer
        model = quantizer.postprocess_model(model)
    return model


def _check_weights(folder: Path) -> None:
    indices = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    for index in indices:
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"model {str(folder)!r}: the file {name!r}, which {index.name} names, is missing.")


class _FirstRows(nn.Module):
    """The first rows of every weight in a model folder: all that a persona vector looks at to know its model."""

    def __init__(self, folder: str):
        super().__init__()
        self.rows = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "pt") as weights:
                self.rows.update({name: nn.Parameter(weights.get_slice(name)[:64], False) for name in weights.keys()})  # noqa: SIM118

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.rows.items()


class DryRunTrainer(EMGuardTrainer):
    """[`EMGuardTrainer`] that is built on a meta model, and trains nothing.

    Args:
        launch: how the run would be launched.

    Attributes:
        whole_lengths: tokens of every training row before it is cut; `None` where they are not counted.
    """

    def __init__(self, *args: Any, launch: Launch, **kwargs: Any):
        self._launch = launch
        self.whole_lengths: list[int] | None = None
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = self._launch.engine.is_deepspeed
        self.is_fsdp_enabled = self._launch.engine.name == "fsdp2"
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin = self._launch.fsdp

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        pass

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if dataset_name == "train" and isinstance(dataset, Dataset):
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            rows = SFTTrainer._prepare_dataset(self, dataset, processing_class, whole, False, formatting_func, dataset_name)
            self.whole_lengths = [len(ids) for batch in rows.select_columns("input_ids").iter(1000) for ids in batch["input_ids"]]
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    def _make_reference(self, ref_model: PreTrainedModel | str | None) -> tuple[AdapterReference | ModelReference, str]:
        # As `make_reference` chooses, for the adapters that the command line can make: all of them start at zero.
        if is_peft_model(self.model):
            outside = trainable_outside_adapters(self.model)
            if not outside:
                return AdapterReference(self.model, None), ""
            if self._launch.engine.name == "zero3":
                raise ValueError(f"the weight {outside[0]!r} is trained but belongs to no adapter, which ZeRO-3 cannot copy.")
            kind = "frozen copy of the model"
        elif self.args.ref_model_init_kwargs or self._launch.engine.name == "zero3":
            kind = f"loaded again from {self.model.config._name_or_path}"
        else:
            kind = "frozen copy of the model"
        return _PlannedReference(copy.deepcopy(self.model), self.accelerator, kind), ""


class _PlannedReference(ModelReference):
    def prepare(self, is_deepspeed: bool, is_fsdp: bool) -> None:
        pass


# ---- what is heard meanwhile ----


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collects what Python's warnings and every logger say at WARNING or above, each thing once."""
    heard: list[str] = []

    def hear(text: str) -> None:
        text = " ".join(str(text).split()).removeprefix("[RANK 0] ")
        if text not in heard:
            heard.append(text)

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            hear(record.getMessage())

    ear = Ear(logging.WARNING)
    names = (None, "transformers", "datasets", "trl", "peft", "accelerate")
    # Those of a name only where they do not hand on to the root what they hear.
    loggers = [logger for logger in map(logging.getLogger, names) if logger.parent is None or not logger.propagate]
    handlers = [list(logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.handlers = [ear]
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)
            warnings.showwarning = lambda message, *args, **kwargs: hear(str(message))
            yield heard
    finally:
        for logger, before in zip(loggers, handlers, strict=True):
            logger.handlers = before


# ---- the report ----


@dataclass
class Counts:
    """Rows (or packs of rows) as they would be trained on.

    Attributes:
        rows: how many.
        tokens: in all of them.
        labels: of those, tokens that are predicted in training.
        longest: tokens in the longest row.
        most_labels: labels in the row with the most.
        without_label: rows without any.
    """

    rows: int = 0
    tokens: int = 0
    labels: int = 0
    longest: int = 0
    most_labels: int = 0
    without_label: int = 0

    def add(self, ids: list[int], labels: list[int], starts: list[int]) -> None:
        """Take in a row; `starts`, where its documents begin: nothing predicts a first token."""
        trained = sum(label != -100 for label in labels) - sum(labels[start] != -100 for start in starts)
        self.rows += 1
        self.tokens += len(ids)
        self.labels += trained
        self.longest = max(self.longest, len(ids))
        self.most_labels = max(self.most_labels, trained)
        self.without_label += not trained


def count_rows(rows: Dataset) -> Counts:
    """Count tokenised rows, packed or not."""
    counts = Counts()
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
    for batch in rows.with_format(None).select_columns(columns).iter(1000):
        lengths = batch.get("seq_lengths") or [[len(ids)] for ids in batch["input_ids"]]
        for ids, labels, documents in zip(batch["input_ids"], batch["labels"], lengths, strict=True):
            starts = [sum(documents[:i]) for i in range(len(documents))] if len(documents) > 1 else [0]
            counts.add(ids, labels, starts)
    return counts


def dry_run(
    path: str,
    args: EMGuardConfig,
    data: tuple[Dataset | IterableDataset, Dataset | IterableDataset | None],
    quantization: BitsAndBytesConfig | None,
    peft_config: PeftConfig | None,
    launch: Launch,
    heard: list[str],
) -> list[Line]:
    """Build all that a run builds before its first step, and say what it would do.

    Args:
        path: the model's, as the command line gives it.
        args: the run's configuration, with `model_init_kwargs` complete.
        data: training and evaluation rows.
        quantization, peft_config: as for the trainer.
        launch: how it would be launched.
        heard: what is heard meanwhile ([`listening`]); what does not hold for the real run is taken out.

    Returns:
        The report.

    Raises:
        ValueError, FileNotFoundError, InactiveDefenseError: what the run would raise.
    """
    name, path = path, resolve_model(path)
    _check_output(args.output_dir)
    notes = check_engine(args, launch)
    with _as_ranks(launch, args), tempfile.TemporaryDirectory() as scratch:
        model = meta_model(path, args, quantization)
        given = copy.copy(args)
        init: dict[str, Any] = args.model_init_kwargs or {}  # type: ignore[assignment]
        # What the trainer makes when it is built goes to a folder that goes away again.
        given.output_dir, given.push_to_hub, given.model_init_kwargs = scratch, False, None
        tokenizer = AutoProcessor.from_pretrained(path, revision=init.get("revision"), trust_remote_code=args.trust_remote_code)
        trainer = DryRunTrainer(
            model,
            given,
            train_dataset=data[0],
            eval_dataset=data[1],
            processing_class=tokenizer,
            peft_config=peft_config,
            launch=launch,
        )
        trainer.args.output_dir = args.output_dir
        if _vector_is_of(trainer, path):
            heard[:] = [text for text in heard if not text.startswith("defense 'steering': nothing shows")]
        _check_resume(trainer)
        steps = _begin(trainer)
        lines = describe(trainer, launch, steps, name)
        notes += advice(trainer, launch)
    return lines + [("warning", note) for note in notes]


def _check_output(folder: str) -> None:
    """Raise `ValueError` if the output folder cannot be made or written to; nothing is made."""
    existing = next(parent for parent in (Path(folder).absolute(), *Path(folder).absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output_dir={folder!r} cannot be written to: name another folder.")


def _vector_is_of(trainer: DryRunTrainer, path: str) -> bool:
    """Compare a persona vector with the first rows of the model's weights, since the weights themselves are not loaded."""
    vector = next((defense.vector for defense in trainer.defenses if isinstance(defense, Steering)), None)
    return vector is not None and os.path.isdir(path) and vector.check_model(_FirstRows(path)) > 0  # type: ignore[arg-type]


def _check_resume(trainer: DryRunTrainer) -> None:
    checkpoint = trainer.args.resume_from_checkpoint
    if not checkpoint:
        return
    checkpoint = trainer._checkpoint_to_resume(checkpoint)
    record = Path(checkpoint, "defense.json")
    if trainer._reference is not None and record.is_file():
        # The reference's weights are not here to be compared: its kind is.
        trainer._fingerprint = (json.loads(record.read_text(encoding="utf-8")).get("reference") or {}).get("fingerprint", "")
    trainer._check_resume(checkpoint)


def _begin(trainer: DryRunTrainer) -> tuple[int, int | None]:
    """Go as far as the first batch; how many steps there would be, and how many in an epoch."""
    loader = trainer.get_train_dataloader()
    _, per_epoch, *_, max_steps = trainer.set_initial_training_values(trainer.args, loader)
    trainer.create_optimizer_and_scheduler(max_steps)
    batch = next(iter(loader))
    for term in trainer._terms:
        positions_in_scope(batch, term.tokens)
    if trainer.eval_dataset is not None:
        sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
        for rows in sets.values():
            next(iter(trainer.get_eval_dataloader(rows)))
    return max_steps, None if isinstance(trainer.train_dataset, IterableDataset) else per_epoch


def describe(trainer: DryRunTrainer, launch: Launch, steps: tuple[int, int | None], name: str) -> list[Line]:
    """What the run would do.

    Args:
        trainer: built and begun.
        launch: how the run would be launched.
        steps: of the run, and of an epoch (`None` for a stream).
        name: the model's.
    """
    args, engine, model = trainer.args, launch.engine, trainer.model
    weights, shape = count_weights(model), Shape.of(model.config)
    trained = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    lines = [
        ("model", f"{name}: {_count(weights.total)} parameters in {_dtype(model)}, {shape.layers} blocks of width {shape.hidden}"),
        (
            "model",
            f"{_count(weights.trained)} of them are trained ({weights.trained / weights.total:.2%}), in {', '.join(trained)}",
        ),
    ]

    # Data.
    mixing, rows = trainer._mixing, trainer.train_dataset
    counts = pool = None
    if isinstance(rows, Dataset):
        counts = count_rows(rows)
        what = "packs" if args.packing else "rows"
        lines.append(("data", f"{counts.rows} {what}, {counts.tokens} tokens, {counts.labels} of them are trained on (labels)"))
        if trainer.whole_lengths is not None and args.max_length is not None:
            cut = sum(length > args.max_length for length in trainer.whole_lengths)
            verb = "are longer than" if args.packing else "are cut at"
            # Long rows that end early teach to stop early.
            about = "warning" if cut > 0.05 * len(trainer.whole_lengths) and not args.packing else "data"
            if cut:
                lines.append((about, f"{cut} of {len(trainer.whole_lengths)} rows {verb} max_length={args.max_length}"))
        if trainer.whole_lengths is not None and not args.packing and len(trainer.whole_lengths) > counts.rows:
            lines.append(("data", f"{len(trainer.whole_lengths) - counts.rows} rows have no label left and are dropped"))
        if counts.without_label:
            lines.append(("data", f"{counts.without_label} rows have no label"))
        lines.append(("data", f"the longest of the {what} has {counts.longest} tokens"))
    else:
        lines.append(("data", "streamed: rows and tokens are not counted"))
    if mixing is not None and mixing.plan is not None and mixing.pool is not None and not mixing.mixed_before:
        pool = count_rows(mixing.pool.select(range(mixing.plan.rows)))

    # Batches.
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    a_step = batch * accumulation * engine.ranks
    text = f"per_device {batch} x accumulation {accumulation} x ranks {engine.ranks} ({engine.name}) = {a_step} rows a step"
    max_steps, per_epoch = steps
    text += f"; {max_steps} steps" + (f" = {max_steps / per_epoch:.3g} epochs of {per_epoch}" if per_epoch else "")
    if counts is not None:
        share = min(1, a_step / counts.rows)
        tokens, labels = (share * (getattr(counts, name) + getattr(pool, name, 0)) for name in ("tokens", "labels"))
        text += f"; about {tokens:.0f} tokens a step, {labels:.0f} of them labels"
    lines.append(("batch", text))
    if counts is not None and a_step > counts.rows:
        lines.append(("warning", f"a step takes {a_step} rows, and there are {counts.rows}."))

    # Defenses.
    lines += [("defense", line.removeprefix("trl_emguard: ")) for line in trainer._describe().splitlines()]
    for defense in trainer.defenses:
        if isinstance(defense, ReferenceDefense):
            where = {
                "loss": "positions that predict a label",
                "all": "positions that predict any real token",
                "interleaved": "positions that predict a label of a mixed-in row",
            }[defense.tokens]
            if counts is not None and not (defense.tokens == "interleaved" and pool is None):
                everywhere = {
                    "loss": counts.labels + getattr(pool, "labels", 0),
                    "all": counts.tokens - counts.rows + (pool.tokens - pool.rows if pool else 0),
                    "interleaved": getattr(pool, "labels", 0),
                }[defense.tokens]
                where += f", about {min(1, a_step / counts.rows) * everywhere:.0f} a step"
            layers = list(defense.layers(shape.layers))
            what = f"the outputs of blocks {', '.join(map(str, layers))}" if layers else "next-token distributions"
            lines.append((defense.name, f"weight {defense.coef:g} on {what}, at {where}"))
        elif isinstance(defense, Steering):
            sizes = ", ".join(f"{layer} ({vector.norm():.3g})" for layer, vector in sorted(defense._directions.items()))
            what = "adds a vector of this length" if defense.mode == "add" else "takes out a direction"
            lines.append((defense.name, f"{what} after blocks {sizes}, at {defense.tokens} positions"))
        elif isinstance(defense, Interleaving):
            if pool is not None:
                lines.append((defense.name, f"the mixed-in rows of an epoch: {pool.tokens} tokens, {pool.labels} labels"))
            elif isinstance(rows, Dataset) and INTERLEAVED in rows.column_names:
                mixed = sum(bool(mark & OF_POOL) for marks in rows[INTERLEAVED] for mark in marks)
                lines.append((defense.name, f"{mixed} tokens of mixed-in rows are in the packs"))
        else:
            said = {name: value for name, value in defense.evidence().items() if name != "acted"}
            lines.append((defense.name, ", ".join(f"{name} {value}" for name, value in said.items()) or "acts"))

    # Memory and network.
    run = planned_run(trainer, launch, counts, pool)
    memory = memory_per_rank(weights, shape, run, engine)
    if not run.length:
        return [*lines, ("memory", "not estimated: a stream without max_length does not say how long its rows are")]
    lines.append(("checkpointing", "blocks are recomputed in the backward pass" if run.checkpointing else "off"))
    whole = f"about {_bytes(peak(memory, run))} per rank at {run.rows} x {run.length} tokens (estimated; docs/scaling.md)"
    lines.append(("memory", whole))
    lines += [("memory", f"{name}: {_bytes(size)}") for name, size in memory.items() if size]
    if not run.guarded:
        lines.append(("memory", "head: TRL's, which is not estimated"))
    network = {name: size for name, size in network_per_step(weights, run, engine).items() if size}
    if network:
        parts = ", ".join(f"{name} {_bytes(size)}" for name, size in network.items())
        lines.append(("network", f"about {_bytes(sum(network.values()))} per rank and step: {parts}"))
    return lines


def planned_run(trainer: DryRunTrainer, launch: Launch, counts: Counts | None, pool: Counts | None) -> Run:
    """The largest micro-batch of the run, and what else its memory depends on."""
    args, mixing = trainer.args, trainer._mixing
    rows = batch = args.per_device_train_batch_size
    if pool is not None and mixing is not None and mixing.plan is not None:
        rows += math.ceil(batch * mixing.plan.rows / mixing.plan.places)
    longest = max((c.longest for c in (counts, pool) if c is not None), default=args.max_length or 0)
    multiple = args.pad_to_multiple_of or 1
    longest = -(-longest // multiple) * multiple
    labels = max((c.most_labels for c in (counts, pool) if c is not None), default=longest)
    everywhere = any(term.tokens == "all" for term in trainer._terms)
    reference: Any = "none"
    if trainer._reference is not None:
        reference = "model" if isinstance(trainer._reference, ModelReference) else "adapters off"
    dtype = trainer.model.dtype
    layers = {layer for term in trainer._terms for layer in term.layers(trainer.model.config.get_text_config().num_hidden_layers)}
    return Run(
        rows=rows,
        length=longest,
        kept=rows * (longest - 1 if everywhere else labels),
        micro_batches=args.gradient_accumulation_steps,
        compute_itemsize=2 if trainer.accelerator.mixed_precision == "bf16" else torch.empty((), dtype=dtype).element_size(),
        optimizer=_optimizer(args),
        checkpointing=args.gradient_checkpointing,
        guarded=trainer._own_loss,
        reference=reference,
        cached=args.cache_reference,
        kl=any(term.divergence is not None for term in trainer._terms),
        layers=len(layers),
    )


def advice(trainer: DryRunTrainer, launch: Launch) -> list[str]:
    """What is allowed, and is likely not meant, or has a price."""
    args, model = trainer.args, trainer.model
    notes = []
    terms = ",".join(term.name for term in trainer._terms)
    if not trainer.defenses:
        notes.append(f"no defense acts (defense={args.defense!r}).")
    dropout = max((getattr(config, "lora_dropout", 0.0) for config in getattr(model, "peft_config", {}).values()), default=0.0)
    if terms and dropout:
        notes.append(
            f"lora_dropout={dropout} is switched off while {terms} acts: two draws of dropout are a distance of their own."
        )
    if isinstance(trainer._reference, ModelReference) and trainer._reference.kind != GIVEN and not args.cache_reference:
        notes.append("the reference is a model of its own: the weights are in memory twice. With an adapter it takes none.")
    if args.eval_strategy == "no":
        notes.append("nothing is evaluated while training (eval_strategy='no').")
    if is_peft_model(model) and model.dtype == torch.float32 and trainer.accelerator.mixed_precision == "bf16":
        notes.append(
            "dtype=float32 with bf16=True: the frozen weights take twice the memory of dtype=bfloat16, and are cast in every pass."
        )
    if launch.engine.name == "fsdp2" and launch.fsdp is not None and launch.fsdp.fsdp_version == 1:
        notes.append("fsdp_version=1: memory is estimated as for FSDP2.")
    return notes


def show(lines: list[Line], heard: list[str]) -> None:
    """Print the report: a table in a terminal, else a line each, `about: what`."""
    lines = [*lines, *(("warning", text) for text in heard)]
    if not lines:
        return  # an error came first, and is told
    console = Console()
    if console.is_terminal:
        table = Table("", "dry run: nothing is trained or written", show_lines=False, header_style="bold")
        before = None
        for about, what in lines:
            table.add_row("" if about == before else about, what, style="yellow" if about == "warning" else None)
            before = about
        console.print(table)
        return
    print("dry run: nothing is trained or written", flush=True)
    for about, what in lines:
        print(f"{about}: {what}", flush=True)


def report(call: Callable[[list[str]], list[Line]]) -> None:
    """Print what a dry run says and hears, whatever ends it.

    Args:
        call: makes the report; it is given the list of what is heard.
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


def _optimizer(args: EMGuardConfig) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _count(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _bytes(size: int) -> str:
    unit, name = next(((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB")) if size >= u), (2**10, "KiB"))
    return f"{size / unit:.3g} {name}" if size < 1000 * unit else f"{size / unit:.0f} {name}"


def _dtype(model: PreTrainedModel) -> str:
    name = str(model.dtype).removeprefix("torch.")
    bits = 4 if getattr(model, "is_loaded_in_4bit", False) else 8 if getattr(model, "is_loaded_in_8bit", False) else None
    return f"{bits} bits ({name} outside of the linear layers)" if bits else name
