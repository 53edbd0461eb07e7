"""`--accelerate_config NAME`: launch the training script with accelerate, as `trl sft` does."""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..defenses.options import option
from ..io.lookup import did_you_mean
from .parser import StrictParser
from .recipes import recipes_dir


# Exit code of a command that Ctrl-C ended, by the convention of shells.
INTERRUPTED = 130
# Options of `accelerate launch` that users cannot pass. `--help` shows the help of `trl-emguard sft`, the option
# `--accelerate_config` takes the place of `--config_file`, and this package decides how to start the training script.
OWN = ("help", "config_file", "module", "no_python", "training_script", "training_script_args")


@dataclass
class LaunchArguments:
    """Options of the command `trl-emguard sft` itself, besides those of the trainer and the model."""

    accelerate_config: str | None = option(
        None,
        "File for `accelerate launch --config_file`, or a shipped one (zero3). Its options may be added "
        "(--num_processes 4). Without it, training runs in this process.",
    )
    dry_run: bool = option(
        False, "Report what the run would do and look for errors instead of training. No weights are loaded."
    )
    ema: bool = option(False, "Also save a moving average of the weights, in output_dir/ema.")
    drift_every: int = option(0, "Log the drift every N steps; with a budget 50.")
    drift_persona: str | None = option(None, "Also log the drift along this persona vector.")
    stop_on_drift: float | None = option(
        None, "Stop where drift_kl exceeds this many nats a token, and save the last weights measured within it."
    )


class LaunchParser(StrictParser):
    """[`StrictParser`] that also accepts the options of `accelerate launch`, on the command line and in the YAML file.

    An option that both accelerate and the training script have belongs to the script, as in `trl sft`. The help does
    not list accelerate's options.

    Args:
        dataclass_types, prog, short_help: as for [`StrictParser`].
        launched: True in a process that accelerate launched. Such a process trains, even if the recipe has an
            `accelerate_config`.
    """

    def __init__(
        self,
        dataclass_types: Any,
        prog: str | None = None,
        short_help: Callable[[StrictParser], str] | None = None,
        launched: bool = False,
    ):
        super().__init__(dataclass_types, prog, short_help)
        self._launched = launched
        self._launch = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        taken = {action.dest for action in self._actions}
        self._launch.add_argument("--accelerate_config", "--accelerate-config")
        self._launch_actions: dict[str, argparse.Action] = {}
        for action in launch_command_parser()._actions:
            names = [name for name in action.option_strings if name.startswith("--")]
            if not names or action.dest in (*OWN, *taken, *self._launch_actions):
                continue
            how: dict[str, Any] = {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            if action.nargs == 0:
                how |= {"action": "store_const", "const": action.const}
            else:
                how |= {"type": action.type, "choices": action.choices, "nargs": action.nargs}
            self._launch.add_argument(*names, **how)
            self._launch_actions[action.dest] = self.add_argument(*names, **how)
            kinds = {int: int, float: float}
            self.hints[action.dest] = (bool if action.nargs == 0 else kinds.get(action.type, str)) | None

    def parse(self, argv: list[str] | None = None) -> tuple:
        """Parse like [`StrictParser.parse`], and keep accelerate's options in `launch_options`, not in the result."""
        *parsed, last = super().parse(argv)
        self.launch_options: list[str] = []
        if not isinstance(last, argparse.Namespace):
            return (*parsed, last)
        for name, value in vars(last).items():
            action = self._launch_actions[name]
            if action.nargs == 0:
                self.launch_options += [action.option_strings[0]] * bool(value)
            elif value is not None:
                self.launch_options.append(f"{action.option_strings[0]}={value}")
        return tuple(parsed)

    def parse_args_into_dataclasses(self, args: Any = None, **kwargs: Any) -> tuple:
        known, _ = self.parse_known_args(args)
        trains = not known.dry_run and (self._launched or not known.accelerate_config)
        if not trains:
            # This process only launches others that train, or makes a dry run. So it must not refuse options that
            # training processes may accept: `ddp_backend` and, on a machine without an accelerator, tf32 and bf16.
            for_ranks = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            for_ranks.add_argument("--ddp_backend", "--ddp-backend")
            self.set_defaults(ddp_backend=None)
            has_accelerator = torch.accelerator.is_available()
            if not has_accelerator:
                for_ranks.add_argument("--tf32")
                self.set_defaults(tf32=None)
            _, args = for_ranks.parse_known_args(list(args))
            if not has_accelerator:
                args = [*args, "--use_cpu", "true"]  # otherwise transformers would refuse bf16
        return super().parse_args_into_dataclasses(args, **kwargs)

    def without_launch_options(self, argv: Sequence[str]) -> list[str]:
        """Return a command line without `--accelerate_config` and accelerate's options."""
        return self._launch.parse_known_args(list(argv))[1]


def find_accelerate_config(name: str) -> Path:
    """Find a config file of accelerate by its path, or a shipped one by its name.

    Raises:
        FileNotFoundError: `name` is neither a file nor a shipped name. The message lists the shipped names and
            suggests the closest.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted((recipes_dir() / "accelerate_configs").glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    raise FileNotFoundError(
        f"accelerate_config={name!r} is neither a file nor a shipped name.{did_you_mean(name, shipped)} "
        f"Known: {', '.join(shipped)}."
    )


def launch_arguments(config: Path, options: Sequence[str], argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed arguments of `accelerate launch`.

    Args:
        config: config file of accelerate.
        options: options of `accelerate launch`.
        argv: command line of the training script.

    Raises:
        ValueError: accelerate knows an option, but refuses its value.
    """
    parser = launch_command_parser()

    def refuse(message: str) -> None:
        raise ValueError(f"accelerate launch: {message}.")

    parser.error = refuse
    return parser.parse_args(["--config_file", str(config), *options, "--module", "trl_emguard.scripts.sft", *argv])


def launch(arguments: argparse.Namespace, is_command: bool) -> int:
    """Launch the training script, wait for it, and return its exit code. Its processes report their own errors.

    Args:
        arguments: arguments of `accelerate launch`.
        is_command: True if this process has nothing to do afterwards. A launch of one process then takes its place,
            except on Windows, and does not return.
    """
    if is_command and os.name == "posix":
        accelerate_launch.simple_launcher = _become
    sys.stdout.flush()
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:
        return error.returncode if error.returncode > 0 else 1
    except ChildFailedError as error:
        # If a signal killed the failed process, its code is negative. No command can exit with such a code, so 1 is
        # returned instead.
        return max(error.get_first_failure()[1].exitcode, 1)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SignalException as error:
        # With several ranks, torch stops them on Ctrl-C or SIGTERM and then raises this. The code is a shell's.
        return 128 + error.sigval
    return 0


def _become(arguments: argparse.Namespace) -> None:
    """Replace this process by the training, in place of accelerate's launcher of one process.

    Accelerate would start a child and wait for it. A SIGTERM would then end this process alone, and the child would
    train on, unknown to the cluster or user that stopped it.
    """
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], command, environment)
