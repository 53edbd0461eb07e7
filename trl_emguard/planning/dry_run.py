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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin, HfDeepSpeedConfig, is_peft_model, str_to_bool
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoProcessor, BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer
from transformers.training_args import OptimizerNames
from trl import SFTTrainer

from ..checkpoints.manifest import checkpoint_to_resume
from ..checks import load_config
from ..config import EMGuardConfig
from ..defenses import Defense, Interleaving, ReferenceDefense, Steering
from ..defenses.interleaving.collator import INTERLEAVED, OF_POOL
from ..evidence import read_defense_file
from ..guard.forward import positions_in_scope, wanted_layers
from ..models.shipped import resolve_model
from ..reference.cache import reference_cache_dir
from ..reference.choose import AdapterReference, ModelReference
from ..trainer import EMGuardTrainer
from .memory import Engine, Run, Shape, count_weights, memory_per_rank, network_per_step, peak


# A line of the report: what it is about, and what is said.
Line = tuple[str, str]

# Addresses that nobody has: they are kept for examples (RFC 5737).
PLACEHOLDERS = ("192.0.2.", "198.51.100.", "203.0.113.")

BYTES = {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10, " bytes": 1}
COUNT = {"B": 10**9, "M": 10**6, "k": 10**3, "": 1}


# ---- the engine ----


@dataclass(frozen=True)
class Launch:
    """What an accelerate file and options of `accelerate launch` make of a run.

    Attributes:
        engine: its name and ranks.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`; `None` where the recipe alone decides.
        fsdp: accelerate's FSDP options.
        offloads: whether something is kept in CPU memory.
        on_cpu: whether it trains on CPUs, whatever the recipe says.
        notes: what accelerate passes over, or cannot know to be wrong.
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
    fsdp, offloads, notes = None, False, []
    try:
        args, *_ = _validate_launch_command(copy.copy(arguments))
        if args.use_fsdp and not args.cpu:
            offloads, checkpointing = (
                str_to_bool(str(value), to_bool=True)
                for value in (args.fsdp_offload_params, args.fsdp_activation_checkpointing)
            )
            fsdp = FullyShardedDataParallelPlugin(
                fsdp_version=int(args.fsdp_version),
                activation_checkpointing=checkpointing,
                state_dict_type=args.fsdp_state_dict_type,
            )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"accelerate refuses {arguments.config_file}: {error}") from error
    # As `launch_command` chooses: one process where neither GPUs nor `--multi_gpu` ask for several.
    name: Any = "one process"
    ranks = int(args.num_processes or 1)
    if args.use_deepspeed and not args.cpu:
        stage, offloads = _zero(args)
        name = f"zero{stage}" if stage else "ddp"
    elif fsdp:
        name = "fsdp2"
    elif args.multi_gpu and not args.cpu and ranks > 1:
        name = "ddp"
    elif ranks > 1:
        notes.append(f"num_processes={ranks} starts one process: on CPUs, --multi_gpu starts several.")
        ranks = 1
    if str(args.main_process_ip).startswith(PLACEHOLDERS):
        notes.append(
            f"main_process_ip={args.main_process_ip} is a placeholder: set it to the first machine's address, num_machines and "
            "num_processes (of all machines) to what you have, and machine_rank on each machine."
        )
    return Launch(
        Engine(name, ranks), args.mixed_precision, fsdp, offloads, bool(args.cpu or args.use_cpu), tuple(notes)
    )


def _zero(args: argparse.Namespace) -> tuple[int, bool]:
    """The stage of ZeRO, and whether something is offloaded."""
    path, nowhere = args.deepspeed_config_file, {None, "none"}
    if path is None:
        devices = {args.offload_optimizer_device, args.offload_param_device}
        return 2 if args.zero_stage is None else int(args.zero_stage), not devices <= nowhere
    if not os.path.isfile(path):
        raise FileNotFoundError(f"deepspeed_config_file={path!r} is not a file.")
    try:
        get = HfDeepSpeedConfig(path).get_value
        devices = {get(f"zero_optimization.offload_{what}.device") for what in ("optimizer", "param")}
        return int(get("zero_optimization.stage", 0)), not devices <= nowhere
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"deepspeed_config_file={path!r} cannot be read: {error}") from error


@contextmanager
def _as_one_of(ranks: int) -> Iterator[None]:
    """This process counts as one of so many, in whatever is computed from their number."""
    state = PartialState()
    alone = state.num_processes
    AcceleratorState._reset_state()
    state.num_processes = ranks
    try:
        yield
    finally:
        state.num_processes = alone
        AcceleratorState._reset_state()
        GradientState._reset_state()


def check_engine(args: EMGuardConfig, launch: Launch) -> None:
    """Raises `ValueError` for what transformers refuses when an engine starts, and cannot see in one process."""
    engine, fsdp = launch.engine, launch.fsdp
    if args.save_only_model and args.load_best_model_at_end and (engine.is_deepspeed or fsdp):
        raise ValueError(f"save_only_model=True does not work with load_best_model_at_end=True under {engine.name}.")
    if args.auto_find_batch_size and engine.name == "zero3":
        raise ValueError("auto_find_batch_size=True does not work with ZeRO-3: leave it out, or use ZeRO-2.")
    if args.gradient_checkpointing and fsdp and fsdp.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing does not work with gradient_checkpointing=True, which checkpoints as well: set "
            "the first to false."
        )
    if args.save_only_model and fsdp and "SHARDED" in str(fsdp.state_dict_type):
        raise ValueError(
            "save_only_model=True does not work with fsdp_state_dict_type=SHARDED_STATE_DICT: use FULL_STATE_DICT."
        )


# ---- the model and the trainer ----


def meta_model(path: str, args: EMGuardConfig, quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
    """The model as SFTTrainer would load it, on the meta device: sizes and no numbers.

    Raises:
        FileNotFoundError: a folder without some of its weights.
    """
    _check_shards(Path(path))
    given, config = dict(args.model_init_kwargs or {}), load_config(path, args)  # type: ignore[arg-type]
    dtype = given.get("dtype", "float32")
    kwargs = {
        "dtype": config.dtype if dtype in ("auto", None) else dtype,
        "attn_implementation": given.get("attn_implementation"),
    }
    architecture = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if architecture is None:
            remote = given.get("trust_remote_code", args.trust_remote_code)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=remote, **kwargs)
        else:
            model = architecture._from_config(config, **kwargs)
    quantization = given.get("quantization_config", quantization)
    return model if quantization is None else quantized(model, quantization)


def quantized(model: PreTrainedModel, how: BitsAndBytesConfig) -> PreTrainedModel:
    """A model on the meta device with the layers that loading it quantised would give it."""
    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=False)
    quantizer.validate_environment(device_map=None)
    quantizer.preprocess_model(model=model, dtype=model.dtype, device_map=None)
    model.hf_quantizer = quantizer
    return quantizer.postprocess_model(model)


def _check_shards(folder: Path) -> None:
    # As `from_pretrained` looks: for safetensors first.
    for index in chain(folder.glob("*.safetensors.index.json"), folder.glob("*.bin.index.json")):
        for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"model {str(folder)!r}: the file {name!r}, which {index.name} names, is missing."
                )
        return


def _first_rows(folder: str) -> nn.Module:
    """The first rows of every weight in a model folder: all that a persona vector looks at to know its model."""
    rows = nn.Module()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                # `register_parameter` wants names without dots.
                rows._parameters[name] = nn.Parameter(weights.get_slice(name)[:64], requires_grad=False)
    return rows


@dataclass(frozen=True)
class Counts:
    """Rows (or packs of rows) as they would be trained on.

    Attributes:
        tokens: of each row.
        labels: of each row, the tokens that are predicted in training.
    """

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Dataset) -> "Counts":
        """Count tokenised rows, packed or not."""
        counts = cls()
        for row in rows.select_columns(
            [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
        ):
            ids, labels, documents = row["input_ids"], row["labels"], row.get("seq_lengths") or []
            # Nothing predicts the first token of a document.
            firsts = accumulate(documents[:-1], initial=0)
            counts.tokens.append(len(ids))
            counts.labels.append(
                sum(label != -100 for label in labels) - sum(labels[first] != -100 for first in firsts)
            )
        return counts

    @property
    def rows(self) -> int:
        return len(self.tokens)


class _WholeRows(SFTTrainer):
    """Stands between [`EMGuardTrainer`] and SFTTrainer, and sees the training rows when they are tokenised and not yet cut."""

    # Tokens of every training row; `None` where they are not counted.
    whole_lengths: list[int] | None = None

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        prepare = super()._prepare_dataset
        if dataset_name == "train" and isinstance(dataset, Dataset) and self.whole_lengths is None:
            whole = copy.copy(args)
            whole.max_length, whole.shuffle_dataset = None, False
            dataset = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
            self.whole_lengths = [len(ids) for ids in dataset["input_ids"]]
        return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)


class DryRunTrainer(EMGuardTrainer, _WholeRows):
    """[`EMGuardTrainer`] that is built on a meta model, and trains nothing.

    Args:
        launch: how the run would be launched.

    Attributes:
        steps, steps_in_epoch: how many updates are made.
        rows_in_step: over all ranks and micro-batches.
        counts: the training rows; empty for a stream.
        pool: the rows that the data collator mixes into an epoch.
        mixed_in: how many of them a micro-batch gets at most.
    """

    def __init__(self, *args: Any, launch: Launch, **kwargs: Any):
        self.launch = launch
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_deepspeed_enabled = self.launch.engine.is_deepspeed
        self.is_fsdp_enabled = self.launch.fsdp is not None
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin = self.launch.fsdp

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        pass

    def _make_reference(
        self, ref_model: PreTrainedModel | str | None
    ) -> tuple[AdapterReference | ModelReference, str]:
        # As `make_reference` chooses. Every adapter of the command line starts at zero, and nothing is trained beside it.
        if is_peft_model(self.model):
            return AdapterReference(self.model, None), ""
        again = self.args.ref_model_init_kwargs or self.launch.engine.name == "zero3"
        kind = f"loaded again from {self.model.config._name_or_path}" if again else "frozen copy of the model"
        reference = ModelReference(copy.deepcopy(self.model), self.accelerator, kind)
        reference.prepare = lambda *engine: None  # type: ignore[method-assign]
        return reference, ""

    def _check_resume(self, checkpoint: str | os.PathLike) -> None:
        # The reference's weights are not here to be compared: its kind is.
        record = read_defense_file(checkpoint) or {}
        self._fingerprint = (record.get("reference") or {}).get("fingerprint", "")
        super()._check_resume(checkpoint)

    def begin(self) -> None:
        """Go as far as the first batch, and count."""
        args, mixing, rows = self.args, self._mixing, self.train_dataset
        if args.resume_from_checkpoint:
            self._check_resume(checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir, looks=True))
        loader = self.get_train_dataloader()
        _, self.steps_in_epoch, *_, self.steps = self.set_initial_training_values(args, loader)
        self.create_optimizer_and_scheduler(self.steps)
        batch = next(iter(loader))
        for term in self._terms:
            positions_in_scope(batch, term.tokens)
        if self.eval_dataset is not None:
            next(iter(self.get_eval_dataloader()))
        self.rows_in_step = (
            args.per_device_train_batch_size * args.gradient_accumulation_steps * self.launch.engine.ranks
        )
        self.counts = Counts.of(rows) if isinstance(rows, Dataset) else Counts()
        self.pool, self.mixed_in = Counts(), 0
        if mixing is not None and mixing.plan is not None and mixing.pool is not None and not mixing.mixed_before:
            self.pool = Counts.of(mixing.pool.select(range(mixing.plan.rows)))
            self.mixed_in = math.ceil(args.per_device_train_batch_size * mixing.plan.rows / mixing.plan.places)

    def in_step(self, in_epoch: int) -> int:
        """A step's share of what is counted over an epoch."""
        return round(in_epoch * min(1, self.rows_in_step / self.counts.rows))


# ---- the report ----


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
        args: with `model_init_kwargs` complete.
        data: training and evaluation rows.
        heard: what is heard meanwhile ([`listening`]); what does not hold for the real run is taken out.

    Raises:
        ValueError, FileNotFoundError, InactiveDefenseError: what the run would raise.
    """
    name, path = path, resolve_model(path)
    _check_folder("output_dir", args.output_dir)
    if args.cache_reference:
        _check_folder("TRL_EMGUARD_CACHE/reference", str(reference_cache_dir()))
    check_engine(args, launch)
    given = copy.copy(args)
    given.push_to_hub, given.model_init_kwargs = False, None
    if launch.mixed_precision is not None and not (args.bf16 or args.fp16):  # the recipe's wins, as in a rank
        given.mixed_precision = launch.mixed_precision
    with _as_one_of(launch.engine.ranks), tempfile.TemporaryDirectory() as scratch:
        given.output_dir = scratch  # the trainer makes it
        revision = (args.model_init_kwargs or {}).get("revision")  # type: ignore[union-attr]
        trainer = DryRunTrainer(
            meta_model(path, args, quantization),
            given,
            train_dataset=data[0],
            eval_dataset=data[1],
            processing_class=AutoProcessor.from_pretrained(
                path, revision=revision, trust_remote_code=args.trust_remote_code
            ),
            peft_config=peft_config,
            launch=launch,
        )
        trainer.args.output_dir = args.output_dir
        for defense in trainer.defenses:
            # It was looked for in weights that are not loaded.
            if isinstance(defense, Steering) and defense.vector and defense.vector.check_model(_first_rows(path)):
                heard[:] = [text for text in heard if not text.startswith("defense 'steering': nothing shows")]
        trainer.begin()
        return [*describe(trainer, name), *(("warning", note) for note in advice(trainer))]


def _check_folder(argument: str, folder: str) -> None:
    """Raise `ValueError` if a folder cannot be made or written to; nothing is made."""
    existing = next(
        parent for parent in (Path(folder).absolute(), *Path(folder).absolute().parents) if parent.exists()
    )
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{argument}={folder!r} cannot be written to: name another folder.")


def describe(trainer: DryRunTrainer, name: str) -> list[Line]:
    """What the run would do, of a trainer that has begun; `name` is the model's."""
    return [
        *(("model", text) for text in _about_model(trainer.model, name)),
        *_about_data(trainer),
        *_about_batches(trainer),
        *(("defense", line.removeprefix("trl_emguard: ")) for line in trainer._describe().splitlines()),
        *((defense.name, text) for defense in trainer.defenses if (text := _what_it_does(defense, trainer))),
        *_about_memory(trainer),
    ]


def _about_model(model: PreTrainedModel, name: str) -> list[str]:
    weights, shape = count_weights(model), Shape.of(model.config)
    dtype = str(model.dtype).removeprefix("torch.")
    for bits in (4, 8):
        if getattr(model, f"is_loaded_in_{bits}bit", False):
            dtype = f"{bits} bits ({dtype} outside of the linear layers)"
    trained = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    return [
        f"{name}: {_short(weights.total, COUNT)} parameters in {dtype}, {shape.layers} blocks of width {shape.hidden}",
        f"{_short(weights.trained, COUNT)} of them are trained ({weights.trained / weights.total:.2%}), in {', '.join(trained)}",
    ]


def _about_data(trainer: DryRunTrainer) -> list[Line]:
    args, counts, whole = trainer.args, trainer.counts, trainer.whole_lengths or []
    if not counts.rows:
        return [("data", "streamed: rows and tokens are not counted")]
    what = "packs" if args.packing else "rows"
    lines = [
        (
            "data",
            f"{counts.rows} {what}, {sum(counts.tokens)} tokens, {sum(counts.labels)} of them are trained on (labels)",
        )
    ]
    cut = 0 if args.max_length is None else sum(length > args.max_length for length in whole)
    if cut:
        # Long rows that end early teach to stop early.
        about = "warning" if cut > 0.05 * len(whole) and not args.packing else "data"
        verb = "are longer than" if args.packing else "are cut at"
        lines.append((about, f"{cut} of {len(whole)} rows {verb} max_length={args.max_length}"))
    if not args.packing and len(whole) > counts.rows:
        lines.append(("data", f"{len(whole) - counts.rows} rows have no label left and are dropped"))
    if 0 in counts.labels:
        lines.append(("data", f"{counts.labels.count(0)} {what} have no label"))
    return [*lines, ("data", f"the longest of the {what} has {max(counts.tokens)} tokens")]


def _about_batches(trainer: DryRunTrainer) -> list[Line]:
    args, engine, rows = trainer.args, trainer.launch.engine, trainer.counts.rows
    text = (
        f"per_device {args.per_device_train_batch_size} x accumulation {args.gradient_accumulation_steps} x ranks {engine.ranks} "
        f"({engine.name}) = {trainer.rows_in_step} rows a step; {trainer.steps} steps"
    )
    if not rows:
        return [("batch", text)]
    tokens, labels = (
        sum(getattr(trainer.counts, what) + getattr(trainer.pool, what)) for what in ("tokens", "labels")
    )
    text += f" = {trainer.steps / trainer.steps_in_epoch:.3g} epochs of {trainer.steps_in_epoch}"
    lines = [
        ("batch", f"{text}; about {trainer.in_step(tokens)} tokens a step, {trainer.in_step(labels)} of them labels")
    ]
    if trainer.rows_in_step > rows:
        lines.append(("warning", f"a step takes {trainer.rows_in_step} rows, and there are {rows}."))
    return lines


def _what_it_does(defense: Defense, trainer: DryRunTrainer) -> str:
    """What a defense does and where, or nothing where that is not known."""
    counts, pool = trainer.counts, trainer.pool
    if isinstance(defense, ReferenceDefense):
        where, positions, known = {
            "loss": ("positions that predict a label", sum(counts.labels + pool.labels), counts.rows),
            "all": (
                "positions that predict any real token",
                sum(counts.tokens + pool.tokens) - counts.rows - pool.rows,
                counts.rows,
            ),
            "interleaved": ("positions that predict a label of a mixed-in row", sum(pool.labels), pool.rows),
        }[defense.tokens]
        layers = ", ".join(map(str, defense.layers(trainer.model.config.get_text_config().num_hidden_layers)))
        what = f"the outputs of blocks {layers}" if layers else "next-token distributions"
        return f"weight {defense.coef:g} on {what}, at {where}" + (
            f", about {trainer.in_step(positions)} a step" if known else ""
        )
    if isinstance(defense, Steering):
        sizes = ", ".join(f"{layer} ({vector.norm():.3g})" for layer, vector in sorted(defense._directions.items()))
        what = "adds a vector of this length" if defense.mode == "add" else "takes out a direction"
        return f"{what} after blocks {sizes}, at {defense.tokens} positions"
    if isinstance(defense, Interleaving):
        if pool.rows:
            return f"the mixed-in rows of an epoch: {sum(pool.tokens)} tokens, {sum(pool.labels)} labels"
        mixed = (
            sum(mark & OF_POOL for marks in trainer.train_dataset[INTERLEAVED] for mark in marks) if counts.rows else 0
        )
        return f"{mixed} tokens of mixed-in rows are in the packs" if counts.rows else ""
    return ", ".join(f"{name} {value}" for name, value in defense.evidence().items() if name != "acted") or "acts"


def _about_memory(trainer: DryRunTrainer) -> list[Line]:
    weights, shape, engine = count_weights(trainer.model), Shape.of(trainer.model.config), trainer.launch.engine
    run = planned_run(trainer)
    if not run.length:
        return [("memory", "not estimated: a stream without max_length does not say how long its rows are")]
    memory = memory_per_rank(weights, shape, run, engine)
    whole = (
        f"about {_short(peak(memory, run))} per rank at {run.rows} x {run.length} tokens (estimated; docs/scaling.md)"
    )
    lines = [
        ("checkpointing", "blocks are recomputed in the backward pass" if run.checkpointing else "off"),
        ("memory", whole),
    ]
    lines += [("memory", f"{name}: {_short(size)}") for name, size in memory.items() if size]
    if not run.guarded:
        lines.append(("memory", "head: TRL's, which is not estimated"))
    if run.cached and trainer._terms:
        size = _cached_positions(trainer) * (run.kl + run.layers) * shape.hidden * trainer.model.dtype.itemsize
        lines.append(("disk", f"reference cache: about {_short(size)} in {reference_cache_dir()}, less what is there"))
    network = {name: size for name, size in network_per_step(weights, run, engine).items() if size}
    if network:
        parts = ", ".join(f"{name} {_short(size)}" for name, size in network.items())
        lines.append(("network", f"about {_short(sum(network.values()))} per rank and step: {parts}"))
    return lines


def _cached_positions(trainer: DryRunTrainer) -> int:
    """Positions whose states are kept; of the pool, those of an epoch."""
    counts, pool, looked_at = trainer.counts, trainer.pool, {term.tokens for term in trainer._terms}
    if "all" in looked_at:
        return sum(counts.tokens + pool.tokens) - counts.rows - pool.rows
    return sum(pool.labels) + (sum(counts.labels) if "loss" in looked_at else 0)


def planned_run(trainer: DryRunTrainer) -> Run:
    """The largest micro-batch of the run, and what else its memory depends on."""
    args, terms = trainer.args, trainer._terms
    rows, multiple = args.per_device_train_batch_size + trainer.mixed_in, args.pad_to_multiple_of or 1
    length = max(trainer.counts.tokens + trainer.pool.tokens, default=args.max_length or 0)
    length = math.ceil(length / multiple) * multiple
    labels = max(trainer.counts.labels + trainer.pool.labels, default=length)
    reference: Any = "none"
    if trainer._reference is not None:
        reference = "model" if isinstance(trainer._reference, ModelReference) else "adapters off"
    return Run(
        rows=rows,
        length=length,
        kept=rows * (length - 1 if any(term.tokens == "all" for term in terms) else labels),
        micro_batches=args.gradient_accumulation_steps,
        compute_itemsize=2 if trainer.accelerator.mixed_precision == "bf16" else trainer.model.dtype.itemsize,
        optimizer=OptimizerNames(args.optim).value,
        checkpointing=args.gradient_checkpointing,
        guarded=trainer._own_loss,
        reference=reference,
        cached=args.cache_reference,
        kl=any(term.divergence is not None for term in terms),
        layers=len(wanted_layers(terms, trainer._bare_model())),
    )


def advice(trainer: DryRunTrainer) -> list[str]:
    """What stands in the way on this machine, is likely not meant, or has a price."""
    args, launch, model, reference = trainer.args, trainer.launch, trainer.model, trainer._reference
    engine, optimizer, gpus = launch.engine, OptimizerNames(args.optim).value, torch.cuda.device_count()
    alone, terms = engine.name == "one process", ",".join(term.name for term in trainer._terms)
    dropout = max(
        (getattr(config, "lora_dropout", 0.0) for config in getattr(model, "peft_config", {}).values()), default=0.0
    )
    notes = {
        "several processes on CPUs want use_cpu=True in the recipe or on the command line as well.": launch.on_cpu
        and not alone,
        "this machine has no accelerator, and bf16=True is refused here without use_cpu=True.": (
            args.bf16 and alone and not launch.on_cpu and not torch.accelerator.is_available()
        ),
        f"optim={optimizer}: bitsandbytes does not know FSDP's shards. Use adamw_torch.": launch.fsdp
        and "8bit" in optimizer,
        "something is offloaded to CPU memory, which the memory estimate does not take off.": launch.offloads,
        "deepspeed is not installed on this machine: pip install 'trl_emguard[deepspeed]'.": (
            engine.is_deepspeed and importlib.util.find_spec("deepspeed") is None
        ),
        f"this machine has {gpus} GPUs, and the launch has {engine.ranks} ranks (over all machines).": (
            engine.ranks > gpus and not alone and not launch.on_cpu
        ),
        f"no defense acts (defense={args.defense!r}).": not trainer.defenses,
        f"lora_dropout={dropout} is switched off while {terms} acts: two draws of dropout are a distance of their own.": (
            dropout and terms
        ),
        "the reference is a model of its own: the weights are in memory twice. With an adapter it takes none.": (
            isinstance(reference, ModelReference) and not args.cache_reference
        ),
        "nothing is evaluated while training (eval_strategy='no').": args.eval_strategy == "no",
        "dtype=float32 with bf16=True: the frozen weights take twice the memory of dtype=bfloat16, and are cast in every pass.": (
            is_peft_model(model) and model.dtype == torch.float32 and trainer.accelerator.mixed_precision == "bf16"
        ),
        "fsdp_version=1: memory is estimated as for FSDP2.": launch.fsdp and launch.fsdp.fsdp_version == 1,
    }
    return [*launch.notes, *(note for note, holds in notes.items() if holds)]


def _short(number: int, units: dict[str, int] = BYTES) -> str:
    """A number to three digits, in the largest unit that is not larger."""
    unit = next((unit for unit, size in units.items() if number >= size), "")
    value = number / units.get(unit, 1)
    return f"{value:.3g}{unit}" if value < 999.5 else f"{value:.0f}{unit}"


# ---- what is heard meanwhile, and printed ----


@contextmanager
def listening() -> Iterator[list[str]]:
    """Collects what Python's warnings and every logger say at WARNING or above, each thing once."""
    heard: list[str] = []

    def hear(text: object) -> None:
        text = " ".join(str(text).split()).removeprefix("[RANK 0] ")
        if text not in heard:
            heard.append(text)

    ear = logging.Handler(logging.WARNING)
    ear.emit = lambda record: hear(record.getMessage())  # type: ignore[method-assign]
    with ExitStack() as as_before, warnings.catch_warnings():
        for logger in map(logging.getLogger, (None, "transformers", "datasets", "trl", "peft", "accelerate")):
            # One with a name only where it does not hand on to the root what it hears.
            if logger.parent is None or not logger.propagate:
                as_before.callback(setattr, logger, "handlers", logger.handlers)
                logger.handlers = [ear]
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *args, **kwargs: hear(message)
        yield heard


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


def show(lines: list[Line], heard: list[str]) -> None:
    """Print the report: a table in a terminal, else a line each, `about: what`."""
    lines = [*lines, *(("warning", text) for text in heard)]
    if not lines:
        return  # an error came first, and is told
    title, console = "dry run: nothing is trained or written", Console(markup=False)
    if console.is_terminal:
        table = Table("", title)
        for about, group in groupby(lines, key=itemgetter(0)):
            table.add_row(about, "\n".join(what for _, what in group), style="yellow" if about == "warning" else None)
        console.print(table)
    else:
        print(title, *(f"{about}: {what}" for about, what in lines), sep="\n", flush=True)
