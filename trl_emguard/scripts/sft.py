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
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path


# Importing the libraries below prints messages that a user can do nothing about, so filters for these messages are set
# first. The command `trl-emguard` has set them already when it imports this module. A process that runs this module as
# a script, for example under `accelerate launch`, sets them here.
if __name__ == "__main__":
    from .quiet import leave_out_noise

    leave_out_noise("sft")

from accelerate.utils import is_deepspeed_available
from transformers import TrainerCallback
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..checkpoints.resume import asks_for_newest, checkpoint_folder, newest_whole_checkpoint
from ..config import EMGuardConfig
from ..data.load import hub_id
from ..evaluation.drift import EVERY, RESULT_FILE, DriftCallback
from ..evidence import InactiveDefenseError
from ..io.files import check_writable
from ..models.ema import EMA_FOLDER, EMACallback
from ..models.ema import STATE_FILE as EMA_STATE
from ..models.load import text_tokenizer
from ..models.shipped import resolve_model
from ..persona.vectors import load_vector
from ..reference.cache import reference_cache_dir
from ..trainer import EMGuardTrainer
from .launch import INTERRUPTED, LaunchArguments, LaunchParser, find_accelerate_config, launch, launch_arguments
from .options import help_page
from .sft_inputs import check_packages, read_data
from .shared import raised_here


def make_parser(launched: bool = False) -> LaunchParser:
    types = (ScriptArguments, EMGuardConfig, ModelConfig, DatasetMixtureConfig, LaunchArguments)
    return LaunchParser(types, "trl-emguard sft", lambda parser: help_page(parser, parser.hints, __doc__), launched)


def main(argv: list[str] | None = None, launched: bool = False, is_command: bool = False) -> int:
    """Run the command and return its exit code.

    Args:
        argv: options of the command; by default those in `sys.argv`.
        launched: True in a process that accelerate launches (`python -m trl_emguard.scripts.sft`). Such a process
            launches nothing itself, and ignores the launch settings of a YAML file, as TRL's scripts do.
        is_command: True if this process has nothing to do afterwards, so that a launch of one process may take its
            place.
    """
    argv, started = sys.argv[1:] if argv is None else list(argv), time.time()
    parser = make_parser(launched)
    script_args, training_args, model_args, dataset_args, launch_args = parser.parse(argv)
    arguments = None
    if launched:
        _check_launched(parser, argv, launch_args)
    else:
        arguments = _launch_arguments(parser, argv, launch_args)
    try:
        callbacks = make_callbacks(launch_args)
        if arguments is not None and not launch_args.dry_run:
            _check_launch(parser, arguments, training_args, model_args, callbacks)
            return launch(arguments, is_command)
        if launch_args.dry_run:
            dry_run(script_args, training_args, model_args, dataset_args, callbacks, arguments)
        else:
            run(script_args, training_args, model_args, dataset_args, callbacks)
    except (InactiveDefenseError, ValueError, FloatingPointError, OSError) as error:
        # The package's own errors name a fix, which a traceback would bury. Other errors keep their traceback.
        if not (isinstance(error, InactiveDefenseError) or raised_here(error)):
            raise
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        text = "" if launch_args.dry_run else f" {_how_to_go_on(training_args, started)}"
        print(f"{parser.prog}: interrupted.{text}", file=sys.stderr)
        return INTERRUPTED
    return 0


def _how_to_go_on(args: EMGuardConfig, started: float) -> str:
    """Return text on how an interrupted run goes on, with `started` the time at which it began.

    A checkpoint that was there before belongs to another run, unless this run resumed from it.
    """
    folder = str(args.output_dir)
    step, _ = newest_whole_checkpoint(folder)
    newest = None if step is None else Path(checkpoint_folder(folder, step))
    if newest and (asks_for_newest(args.resume_from_checkpoint or "") or newest.stat().st_mtime >= started):
        return "--resume_from_checkpoint true resumes from the newest checkpoint."
    if args.resume_from_checkpoint:
        return "The same command begins again at the checkpoint that it names."
    how, steps = args.save_strategy.value, args.save_steps
    return f"No checkpoint was written yet (save_strategy={how!r}, save_steps={steps:g})."


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


def _check_launch(
    parser: LaunchParser,
    arguments: argparse.Namespace,
    training_args: EMGuardConfig,
    model_args: ModelConfig,
    callbacks: Sequence[TrainerCallback],
) -> None:
    """Refuse a launch that accelerate, a callback or each rank would refuse later, and print notes on its settings."""
    from ..planning.engine import check_callbacks, read_launch

    try:
        check_packages(training_args, model_args)
        found = read_launch(arguments)
        check_callbacks(callbacks, found.engine)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if found.engine.is_deepspeed and not is_deepspeed_available():
        parser.error(
            f"{arguments.config_file} uses DeepSpeed, which is not installed: pip install 'trl_emguard[deepspeed]'."
        )
    for note in found.notes:
        print(f"{parser.prog}: warning: {note}", file=sys.stderr)


def make_callbacks(launch_args: LaunchArguments) -> list[TrainerCallback]:
    """Return the callbacks that the options `ema`, `drift_every`, `drift_persona` and `stop_on_drift` ask for.

    Raises:
        ValueError: an option is out of range, the persona vector cannot be loaded, or an average is asked for beside a
            budget.
    """
    every, budget, persona = launch_args.drift_every, launch_args.stop_on_drift, launch_args.drift_persona
    if every < 0:
        raise ValueError(f"drift_every={every} must be 0 (off) or more.")
    callbacks: list[TrainerCallback] = [EMACallback()] if launch_args.ema else []
    if every or budget is not None or persona is not None:
        try:
            vector = None if persona is None else load_vector(persona)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"drift_persona={persona!r}: {error}") from error
        drift = DriftCallback(every or EVERY, budget, persona_vector=vector)
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
    train_dataset, eval_dataset = read_data(script_args, training_args, model_args, dataset_args)
    dataset_name = hub_id(script_args.dataset_name)
    path = resolve_model(model_args.model_name_or_path)
    trainer = EMGuardTrainer(
        model=path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=text_tokenizer(path, training_args, train_dataset),
        callbacks=callbacks,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    folder = Path(training_args.output_dir)
    if training_args.should_save and training_args.push_to_hub and not training_args.resume_from_checkpoint:
        # A push during training takes the whole folder along. A resume may still be refused, and then keeps its files.
        _remove_stale(folder, [], keeps_average=False)
    output = trainer.train()
    if training_args.should_save:
        has_average = any(isinstance(callback, EMACallback) for callback in callbacks)
        _remove_stale(folder, callbacks, has_average or EMA_STATE in trainer.resumed_files)
    trainer.save_model(training_args.output_dir)
    trainer.save_metrics("train", output.metrics)
    trainer.save_state()
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    # Saving may need the process group, so no rank closes it (`end`) before all ranks have saved.
    trainer.accelerator.wait_for_everyone()
    trainer.end()


def _remove_stale(folder: Path, callbacks: list[TrainerCallback], keeps_average: bool) -> None:
    """Remove from a folder the average and the record of drift of an earlier run that this run has not replaced.

    A run that resumes from a checkpoint with an average keeps `ema/`, which is of its own first part. It does not keep
    the record, which would name the step of weights that the run has replaced.
    """
    if not keeps_average and (folder / EMA_FOLDER).is_dir():
        shutil.rmtree(folder / EMA_FOLDER)
        print(f"trl_emguard: removed {folder / EMA_FOLDER}, the average of an earlier run's weights.")
    if not any(isinstance(callback, DriftCallback) and callback.budget is not None for callback in callbacks):
        (folder / RESULT_FILE).unlink(missing_ok=True)


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


if __name__ == "__main__":
    sys.exit(main(launched=True))
