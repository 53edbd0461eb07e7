"""Supervised fine-tuning with in-training defenses against emergent misalignment.

The options are those of `trl sft` and of the defenses. `--config` names a YAML file, here or among
the shipped recipes; options on the command line win over it.

examples:
  # Report what training would do, without loading weights.
  trl-emguard sft --config smollm2-135m-instruct/sft.yaml --defense kl --dry_run
  # Train in this process.
  trl-emguard sft --config smollm2-135m-instruct/sft.yaml --defense kl
  # Train on several accelerators.
  trl-emguard sft --config qwen2.5-7b-instruct/kl.yaml --dataset_name FILE --accelerate_config zero3
  # Let accelerate launch the script.
  accelerate launch --config_file FILE -m trl_emguard.scripts.sft --config FILE --defense kl
"""

import argparse
import dataclasses
import os
import sys
import traceback
from collections.abc import Mapping
from typing import Any


# Importing the libraries below prints messages that a user can do nothing about, so filters for these messages are set
# first. The command `trl-emguard` has set them already when it imports this module. A process that runs this module as
# a script, for example under `accelerate launch`, sets them here.
if __name__ == "__main__":
    from .quiet import leave_out_noise

    leave_out_noise("sft")

from accelerate.utils import is_deepspeed_available
from transformers import AutoConfig, TrainerCallback
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..checkpoints.resume import checkpoint_steps
from ..checks import check_format, check_output_dir
from ..config import EMGuardConfig
from ..data.load import SourceOptions, check_apart, load_rows
from ..evaluation.drift import EVERY, DriftCallback
from ..evidence import InactiveDefenseError
from ..io.files import check_writable
from ..models.ema import EMACallback
from ..models.load import text_tokenizer
from ..models.shipped import resolve_model
from ..reference.cache import reference_cache_dir
from ..trainer import EMGuardTrainer
from .launch import INTERRUPTED, LaunchArguments, LaunchParser, find_accelerate_config, launch, launch_arguments
from .options import help_page


def make_parser(launched: bool = False) -> LaunchParser:
    types = (ScriptArguments, EMGuardConfig, ModelConfig, DatasetMixtureConfig, LaunchArguments)
    return LaunchParser(types, "trl-emguard sft", lambda parser: help_page(parser, parser.hints, __doc__), launched)


def main(argv: list[str] | None = None, launched: bool = False) -> int:
    """Run the command and return its exit code.

    Args:
        argv: options of the command; by default those in `sys.argv`.
        launched: True in a process that accelerate launches (`python -m trl_emguard.scripts.sft`). Such a process
            launches nothing itself, and ignores the launch settings of a YAML file, as TRL's scripts do.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser(launched)
    script_args, training_args, model_args, dataset_args, launch_args = parser.parse(argv)
    arguments = None
    if launched:
        _check_launched(parser, argv, launch_args)
    else:
        arguments = _launch_arguments(parser, argv, launch_args)
        if arguments is not None and not launch_args.dry_run:
            _check_launch(parser, arguments)
            return launch(arguments)
    try:
        callbacks = make_callbacks(launch_args)
        if launch_args.dry_run:
            dry_run(script_args, training_args, model_args, dataset_args, callbacks, arguments)
        else:
            run(script_args, training_args, model_args, dataset_args, callbacks)
    except (InactiveDefenseError, ValueError, FloatingPointError, OSError) as error:
        # The package's own errors name a fix, which a traceback would bury. Other errors keep their traceback.
        if not (isinstance(error, InactiveDefenseError) or _raised_here(error)):
            raise
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        how, steps = training_args.save_strategy.value, training_args.save_steps
        text = "--resume_from_checkpoint true resumes from the newest checkpoint."
        if not checkpoint_steps(str(training_args.output_dir)):
            text = f"No checkpoint was written yet (save_strategy={how!r}, save_steps={steps:g})."
        print(f"{parser.prog}: interrupted. {text}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _check_launched(parser: LaunchParser, argv: list[str], launch_args: LaunchArguments) -> None:
    if parser.without_launch_options(argv) != argv:
        parser.error(
            "--accelerate_config, and options of `accelerate launch` beside it, are for `trl-emguard sft`. Under "
            "`accelerate launch`, give them to that: --config_file FILE."
        )
    if launch_args.dry_run and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error(
            f"--dry_run in {os.environ['WORLD_SIZE']} processes: give it to `trl-emguard sft --accelerate_config "
            "FILE`."
        )


def _launch_arguments(
    parser: LaunchParser, argv: list[str], launch_args: LaunchArguments
) -> argparse.Namespace | None:
    """Return the parsed arguments of `accelerate launch`, or `None` for a run in this process."""
    if launch_args.accelerate_config is None:
        if parser.launch_options:
            option = parser.launch_options[0].split("=")[0]
            parser.error(f"{option} is an option of `accelerate launch`: give --accelerate_config as well.")
        return None
    try:
        config = find_accelerate_config(launch_args.accelerate_config)
        return launch_arguments(config, parser.launch_options, parser.without_launch_options(argv))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def _check_launch(parser: LaunchParser, arguments: argparse.Namespace) -> None:
    """Refuse a launch that accelerate would refuse with a traceback, and print notes on its settings."""
    from ..planning.engine import read_launch

    try:
        found = read_launch(arguments)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if found.engine.is_deepspeed and not is_deepspeed_available():
        parser.error(
            f"{arguments.config_file} uses DeepSpeed, which is not installed: pip install 'trl_emguard[deepspeed]'."
        )
    for note in found.notes:
        print(f"{parser.prog}: warning: {note}", file=sys.stderr)


def _raised_here(error: BaseException) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("trl_emguard.")


def make_callbacks(launch_args: LaunchArguments) -> list[TrainerCallback]:
    """Return the callbacks that the options `ema`, `drift_every` and `stop_on_drift` ask for.

    Raises:
        ValueError: an option is out of range, or an average is asked for beside a budget.
    """
    every, budget = launch_args.drift_every, launch_args.stop_on_drift
    if every < 0:
        raise ValueError(f"drift_every={every} must be 0 (off) or more.")
    callbacks: list[TrainerCallback] = [EMACallback()] if launch_args.ema else []
    if every or budget is not None:
        drift = DriftCallback(every or EVERY, budget)
        drift.check_beside(callbacks)
        callbacks.append(drift)
    return callbacks


def run(
    script_args: ScriptArguments,
    training_args: EMGuardConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    callbacks: list[TrainerCallback],
) -> None:
    """Train and save a model.

    Raises:
        ValueError, FileNotFoundError: a bad argument.
        FloatingPointError: training diverged.
        OSError: a checkpoint cannot be written.
        InactiveDefenseError: the run turned out not to be defended. If the check after training finds this, the model
            is saved first.
    """
    check_writable("output_dir", training_args.output_dir)
    if training_args.cache_reference:
        check_writable("TRL_EMGUARD_CACHE/reference", reference_cache_dir())
    check_model(training_args, model_args)
    train_dataset, eval_dataset = read_data(script_args, training_args, model_args, dataset_args)
    path = resolve_model(model_args.model_name_or_path)
    tokenizer = text_tokenizer(path, training_args, train_dataset)
    # `text_tokenizer` returns a tokenizer only if a defended run trains a vision-language model on text. The model's
    # vision tower then gets no gradients. DDP fails on trained parameters without a gradient, unless it looks for
    # unused parameters.
    if tokenizer is not None and training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = True
    trainer = EMGuardTrainer(
        model=path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        callbacks=callbacks,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    output = trainer.train()
    if trainer.is_fsdp_enabled:
        # Trainer saves no model with accelerate's default for FSDP2, SHARDED_STATE_DICT, which is for checkpoints.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(training_args.output_dir)
    trainer.save_metrics("train", output.metrics)
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    # No rank closes the process group (`end`) while another still saves, which may need the group.
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def dry_run(
    script_args: ScriptArguments,
    training_args: EMGuardConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    callbacks: list[TrainerCallback],
    arguments: argparse.Namespace | None,
) -> None:
    """Print a report of the things that [`run`] would do.

    Args:
        arguments: parsed arguments of `accelerate launch`; `None` for a run in this process.

    Raises:
        ValueError, FileNotFoundError, InactiveDefenseError: errors that `run` would raise before its first step.
    """
    from ..planning.engine import read_launch
    from ..planning.report import dry_run, report

    check_model(training_args, model_args)
    report(
        lambda heard: dry_run(
            str(model_args.model_name_or_path),
            training_args,
            read_data(script_args, training_args, model_args, dataset_args),
            get_quantization_config(model_args),
            get_peft_config(model_args),
            callbacks,
            read_launch(arguments),
            heard,
        )
    )


def check_model(training_args: EMGuardConfig, model_args: ModelConfig) -> None:
    """Check that the model exists.

    Raises:
        ValueError: no model is named, or its code is not trusted.
        FileNotFoundError: the name is not that of a shipped model, a folder or a model on the hub.
    """
    name = model_args.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path is missing: name a model folder, a hub id or a shipped model.")
    try:
        AutoConfig.from_pretrained(
            resolve_model(name), revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:  # a folder without a model's config raises ValueError
        if isinstance(error, FileNotFoundError) and _raised_here(error):
            raise
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model_name_or_path={name!r} has code of its own: --trust_remote_code true runs it."
            ) from error
        cause = str(error).strip().splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"model_name_or_path={name!r} is not a shipped model, and cannot be read from a folder or the hub "
            f"({cause}). Check the name, the network, and for a gated model `hf auth login`."
        ) from error


def read_data(
    script_args: ScriptArguments,
    training_args: EMGuardConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
) -> tuple[Any, Any]:
    """Return the training rows, and the evaluation rows or `None` if `eval_strategy` is "no".

    The revision, attention implementation and dtype of `model_args` are put into `training_args.model_init_kwargs`,
    unless they are set there already.

    Raises:
        ValueError, FileNotFoundError: a bad argument.
    """
    check_output_dir(training_args, bool(model_args.use_peft))
    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError("give either `dataset_name` or `datasets` (a list, in the YAML file): one of the two.")
    _check_source(script_args, dataset_args)
    evaluates = training_args.eval_strategy != "no"
    if evaluates:
        check_apart(script_args.dataset_train_split, script_args.dataset_test_split)
    if dataset_args.datasets:
        splits = _read_mixture(dataset_args)
        for split in [script_args.dataset_train_split] + [script_args.dataset_test_split] * evaluates:
            if split not in splits:
                raise ValueError(
                    f"the mixture in `datasets` has no split {split!r}: it has {', '.join(map(repr, splits))}. "
                    "`test_split_size` splits a 'test' off."
                )
        train_dataset = splits[script_args.dataset_train_split]
        eval_dataset = splits[script_args.dataset_test_split] if evaluates else None
    else:
        name, config, streaming = script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming
        train_dataset = load_rows(name, script_args.dataset_train_split, config, streaming)
        options = SourceOptions(split="dataset_test_split")
        test_split = script_args.dataset_test_split
        eval_dataset = load_rows(name, test_split, config, streaming, options) if evaluates else None

    source = "datasets" if dataset_args.datasets else f"dataset_name={script_args.dataset_name!r}"
    for rows in (train_dataset, eval_dataset):
        check_format(rows, training_args, source)
    # `trl sft` passes these values as well. Values that the user put into `model_init_kwargs` win.
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return train_dataset, eval_dataset


def _check_source(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> None:
    """Refuse options of `datasets` if `dataset_name` gives the rows, and the reverse: they would have no effect.

    Raises:
        ValueError: an option of `datasets` is set beside `dataset_name`, or the other way round.
    """
    given: ScriptArguments | DatasetMixtureConfig
    if dataset_args.datasets:
        given, used = script_args, "datasets"
        others = {
            "dataset_streaming": "set `streaming` instead",
            "dataset_config": "set `name` in an entry of `datasets` instead",
        }
    else:
        given, used = dataset_args, "dataset_name"
        others = {
            "streaming": "set `dataset_streaming` instead",
            "test_split_size": "it needs `datasets`; beside `dataset_name`, name rows by `dataset_test_split` instead",
        }
    for name, advice in others.items():
        value = getattr(given, name)
        if value is not None and value is not False:
            raise ValueError(f"{name}={value!r} has no effect with `{used}`: {advice}.")


def _read_mixture(dataset_args: DatasetMixtureConfig) -> Mapping[str, Any]:
    """Return the rows of `datasets` by split: "train", and with `test_split_size` also "test".

    TRL would split without a seed. Each rank and each resumed run would then train on other rows. The seed here is
    constant, not the run's, so that runs with different seeds train on the same rows.

    Raises:
        ValueError: a stream is to be split.
    """
    size = dataset_args.test_split_size
    if size is not None and dataset_args.streaming:
        raise ValueError(f"test_split_size={size} cannot split a stream: leave out `streaming` or `test_split_size`.")
    splits = get_dataset(dataclasses.replace(dataset_args, test_split_size=None))
    return splits if size is None else splits["train"].train_test_split(test_size=size, seed=0)


if __name__ == "__main__":
    sys.exit(main(launched=True))
