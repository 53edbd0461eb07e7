"""Training engine (DDP, DeepSpeed, FSDP) that `accelerate launch` would use, read from its config file and options."""

import argparse
import copy
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import FullyShardedDataParallelPlugin, HfDeepSpeedConfig, str_to_bool
from transformers import TrainerCallback, TrainingArguments

from ..checks import Engine as EngineFacts
from ..checks import refuse_unsharded_fsdp
from ..models.callback_state import refuse_sharded
from .memory import Engine


# Beginnings of the IP addresses that RFC 5737 reserves for documentation, so that no machine has them. The accelerate
# config `zero3_multi_node.yaml`, made for several machines, has such an address as a placeholder.
PLACEHOLDERS = ("192.0.2.", "198.51.100.", "203.0.113.")


@dataclass(frozen=True)
class Launch:
    """Facts about the launch of a run, read from the config file and the options of `accelerate launch`.

    Attributes:
        engine: kind of data parallelism, and number of ranks.
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`; `None` if the launch does not set it.
        fsdp: accelerate's FSDP options; `None` without FSDP.
        offloads: whether weights or optimizer states are kept in CPU memory or on disk, off the accelerator.
        on_cpu: whether the launch makes training run on CPUs, even if the recipe does not say so.
        model_ranks: number of ranks that work on the same row together (tensor, context or sequence parallelism).
        splits_sequences: whether context or sequence parallelism is on.
        notes: messages on settings that accelerate ignores, or that it accepts although they are wrong.
    """

    engine: Engine
    mixed_precision: str | None = None
    fsdp: FullyShardedDataParallelPlugin | None = None
    offloads: bool = False
    on_cpu: bool = False
    model_ranks: int = 1
    splits_sequences: bool = False
    notes: tuple[str, ...] = ()

    @property
    def data_ranks(self) -> int:
        """Number of ranks that train on different rows. Ranks that work on the same row together count as one."""
        return self.engine.ranks // self.model_ranks

    @property
    def facts(self) -> EngineFacts:
        """Facts about the engine for [`check_engine`], taken from the launch because a dry run starts no engine."""
        return EngineFacts(
            sharding="DeepSpeed" if self.engine.is_deepspeed else "FSDP" if self.fsdp is not None else None,
            fsdp_version=getattr(self.fsdp, "fsdp_version", None),
            fsdp_checkpointing=bool(getattr(self.fsdp, "activation_checkpointing", False)),
            splits_sequences=self.splits_sequences,
        )


def read_launch(arguments: argparse.Namespace | None) -> Launch:
    """Return the facts of the run that `accelerate launch` would start.

    Args:
        arguments: parsed arguments of `accelerate launch`; `None` for a run in this process.

    Raises:
        ValueError: accelerate refuses the file or the options, a DeepSpeed config cannot be read, or the number of
            ranks is no multiple of the ranks that work on the same row.
        FileNotFoundError: a DeepSpeed config does not exist.
    """
    if arguments is None:
        return Launch(Engine("one process"))
    try:
        args, *_ = _validate_launch_command(copy.copy(arguments))
        fsdp, offloads = _read_fsdp(args)
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"accelerate refuses {arguments.config_file}: {error}") from error
    # The branches have the order of accelerate's `launch_command`. Without DeepSpeed and FSDP, accelerate starts one
    # process unless `multi_gpu` is set. The option `--multi_gpu` or the accelerate file sets it. Without a file,
    # accelerate sets `multi_gpu` by itself if several processes are to start and it finds several GPUs.
    name: Any = "one process"
    ranks, notes = int(args.num_processes or 1), []
    if args.use_deepspeed and not args.cpu:
        stage, offloads = _read_deepspeed(args)
        name = f"zero{stage}" if stage else "ddp"
    elif fsdp:
        name = "fsdp2"
    elif args.multi_gpu and not args.cpu and ranks > 1:
        name = "ddp"
    elif ranks > 1:
        notes.append(
            f"num_processes={ranks} starts one process. On GPUs, name an accelerate file with `distributed_type: "
            "MULTI_GPU`, such as --accelerate_config multi_gpu. On CPUs, --multi_gpu starts several."
        )
        ranks = 1
    if str(args.main_process_ip).startswith(PLACEHOLDERS):
        notes.append(
            f"main_process_ip={args.main_process_ip} is a placeholder: set it to the first machine's address, "
            "num_machines and num_processes (of all machines) to what you have, and machine_rank on each machine."
        )
    tensor, *sequence = _read_parallelism(args)
    model_ranks = tensor * math.prod(sequence)
    if ranks % model_ranks:
        raise ValueError(
            f"num_processes={ranks} is no multiple of the {model_ranks} ranks that share each row (tp_size x cp_size "
            "x sp_size): change either."
        )
    return Launch(
        Engine(name, ranks),
        args.mixed_precision,
        fsdp,
        offloads,
        bool(args.cpu or args.use_cpu),
        model_ranks,
        math.prod(sequence) > 1,
        tuple(notes),
    )


def _read_parallelism(args: argparse.Namespace) -> list[int]:
    """Return the sizes of tensor, context and sequence parallelism; each is 1 if the launch does not set them."""
    if not args.use_parallelism_config:
        return [1, 1, 1]
    return [int(getattr(args, f"parallelism_config_{kind}_size")) for kind in ("tp", "cp", "sp")]


def _read_fsdp(args: argparse.Namespace) -> tuple[FullyShardedDataParallelPlugin | None, bool]:
    """Return the FSDP options (`None` without FSDP), and whether FSDP offloads weights to CPU memory."""
    if not args.use_fsdp or args.cpu:
        return None, False
    offloads, checkpointing = (
        str_to_bool(str(value), to_bool=True)
        for value in (args.fsdp_offload_params, args.fsdp_activation_checkpointing)
    )
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=int(args.fsdp_version),
        activation_checkpointing=checkpointing,
        state_dict_type=args.fsdp_state_dict_type,
    )
    return plugin, bool(offloads)


def _read_deepspeed(args: argparse.Namespace) -> tuple[int, bool]:
    """Return the ZeRO stage (0 to 3), and whether weights or optimizer states are offloaded."""
    path, nowhere = args.deepspeed_config_file, {None, "none"}
    if path is None:
        devices = {args.offload_optimizer_device, args.offload_param_device}
        return 2 if args.zero_stage is None else int(args.zero_stage), not devices <= nowhere
    if not os.path.isfile(path):
        raise FileNotFoundError(f"deepspeed_config_file={path!r} is not a file.")
    try:
        get = HfDeepSpeedConfig(path).get_value
        devices = {get(f"zero_optimization.offload_{part}.device") for part in ("optimizer", "param")}
        return int(get("zero_optimization.stage", 0)), not devices <= nowhere
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"deepspeed_config_file={path!r} cannot be read: {error}") from error


@contextmanager
def simulated_ranks(ranks: int) -> Iterator[None]:
    """Make accelerate report `ranks` processes inside the `with` block, although only this one runs."""
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


def check_callbacks(callbacks: Sequence[TrainerCallback], engine: Engine) -> None:
    """Refuse callbacks, which need whole weights on every rank, under an engine that shards the weights.

    Raises:
        ValueError: there is a callback, and the engine is ZeRO-3 or FSDP.
    """
    for callback in callbacks if engine.shards_weights else ():
        refuse_sharded(callback, "DeepSpeed ZeRO-3" if engine.is_deepspeed else "FSDP")


def check_settings(args: TrainingArguments, callbacks: Sequence[TrainerCallback], launch: Launch) -> None:
    """Refuse training arguments and callbacks that do not work with the launch's engine.

    A dry run starts no engine. Trainer and callbacks accept such settings then, so they are checked here.

    Args:
        args: training arguments.
        callbacks: callbacks of the run, for [`check_callbacks`].
        launch: facts about the launch.

    Raises:
        ValueError: two settings do not work together.
    """
    engine, fsdp = launch.engine, launch.fsdp
    if args.fsdp and launch.engine.ranks > 1:
        raise ValueError(
            f"fsdp={args.fsdp} in the recipe: a dry run takes the engine from the accelerate file alone. Leave it "
            "out, and put FSDP's settings into that file, as in the shipped fsdp2."
        )
    if fsdp and launch.on_cpu:
        refuse_unsharded_fsdp("use_cpu: true in the accelerate file")
    check_callbacks(callbacks, engine)
    if args.save_only_model and args.load_best_model_at_end and (engine.is_deepspeed or fsdp):
        raise ValueError(f"save_only_model=True does not work with load_best_model_at_end=True under {engine.name}.")
    if args.auto_find_batch_size and engine.name == "zero3":
        raise ValueError("auto_find_batch_size=True does not work with ZeRO-3: leave it out, or use ZeRO-2.")
    if args.activation_checkpointing and fsdp and fsdp.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing does not work with activation_checkpointing=True, which checkpoints as "
            "well: set the first to false."
        )
    if args.save_only_model and fsdp and "SHARDED" in str(fsdp.state_dict_type):
        raise ValueError(
            "save_only_model=True does not work with fsdp_state_dict_type=SHARDED_STATE_DICT: use FULL_STATE_DICT."
        )
