"""The help page of `trl-emguard sft`, generated from the dataclass fields and docstrings of the options."""

import argparse
import copy
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from shutil import get_terminal_size
from typing import Any, get_args

from ..config import ReferenceOptions
from ..defenses import DefenseArguments
from ..defenses.schedule import Coefficient


# Options of TRL and transformers that recipes use, in the order of the help page.
COMMON = (
    *("model_name_or_path", "dataset_name", "output_dir", "learning_rate", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "packing"),
    *("activation_checkpointing", "dtype", "bf16", "use_cpu", "use_peft", "lora_r", "lora_alpha"),
    *("lora_target_modules", "load_in_4bit", "save_steps", "report_to", "seed"),
)
# Options of the command `trl-emguard sft` itself, and not of the trainer or the model.
COMMAND = (
    "config",
    "dry_run",
    "ema",
    "drift_every",
    "drift_persona",
    "stop_on_drift",
    "accelerate_config",
    "help",
    "help_all",
)
# Help texts of TRL and transformers are shortened to whole sentences of at most this many characters in all. A longer
# first sentence stays.
SHORT_TEXT = 110


class PrintAllOptions(argparse.Action):
    """Action of `--help_all`: print the help of every option and exit, as argparse's `help` action does."""

    def __init__(self, option_strings: list[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(parser.format_all_options(), end="")
        parser.exit()


def methods() -> list[type]:
    """Return the dataclasses with the defenses' options, in the order of the README's table of defenses."""
    return list(reversed(DefenseArguments.__bases__))


def own_fields(cls: type) -> list[str]:
    """Return the names of the fields that a dataclass declares itself, without inherited ones."""
    return [f.name for f in fields(cls) if f.name in inspect.get_annotations(cls)]


def title(cls: type) -> str:
    """Return a heading from a docstring's first paragraph: "Options of `kl`: divergence …." → "kl: divergence …"."""
    docstring = (inspect.getdoc(cls) or "").split("\n\n", maxsplit=1)[0]
    return docstring.removeprefix("Options of ").replace("`", "").rstrip(".")


def help_page(parser: argparse.ArgumentParser, hints: Mapping[str, Any], text: str) -> str:
    """Return a help page with the options that most runs need, each listed once, without its `--no_` variant.

    The page is as wide as the terminal. In a pipe or a file, lines may have 100 characters, or more if the environment
    variable COLUMNS is larger.

    Args:
        parser: parser with all options. The page shows their default values.
        hints: name of an option → its type. The types come separately, because the parser does not keep `int | None`.
        text: introduction with examples, printed unchanged.
    """
    actions = {action.dest: action for action in reversed(parser._actions)}
    width = get_terminal_size().columns - 2
    if not sys.stdout.isatty():
        width = max(100, width)  # without a terminal the width is taken as 80, which would add 60 lines
    formatter = argparse.HelpFormatter(parser.prog, max_help_position=36, width=width)
    for heading, names, shorten in _groups():
        formatter.start_section(heading)
        formatter.add_arguments([_shown(actions[name], hints.get(name), shorten) for name in names])
        formatter.end_section()
    usage = f"usage: {parser.prog} [--config FILE] [--defense NAMES] [--OPTION VALUE ...]"
    return f"{usage}\n\n{text.strip()}\n\n{formatter.format_help()}\n`{parser.prog} --help_all` prints every option.\n"


def _groups() -> Iterator[tuple[str, list[str], bool]]:
    """Yield for each group of the page its heading, its options' names, and whether to shorten their help texts."""
    yield "choice of defenses", own_fields(DefenseArguments), False
    for cls in (*methods(), ReferenceOptions):
        yield title(cls), own_fields(cls), False
    yield "options of TRL and transformers that recipes use", list(COMMON), True
    yield "the command", list(COMMAND), False


def _shown(action: argparse.Action, hint: Any, shorten: bool) -> argparse.Action:
    """Return an option as `--help` shows it: one name, a placeholder for the value, and the default if it has one."""
    shown = copy.copy(action)
    shown.option_strings = [name for name in action.option_strings if "-" not in name.removeprefix("--")][-1:]
    if action.nargs not in (0, "?"):
        shown.nargs = None
    shown.metavar = action.metavar or _metavar(action, hint)
    if shorten:
        shown.help = _shortened(action.help or "")
    if action.default is not None and action.default is not False and action.default != argparse.SUPPRESS:
        shown.help = f"{shown.help} (default: {str(action.default).replace('%', '%%')})"
    return shown


def _metavar(action: argparse.Action, hint: Any) -> str:
    """Return the placeholder for an option's value on the page: its choices, or a word such as N."""
    if action.choices is not None:
        return "|".join(map(str, action.choices))
    if getattr(action.type, "__name__", "") == "string_to_bool":
        return "true|false"
    if action.type is Coefficient:
        return "X|X->X"
    types = {hint, *get_args(hint)}
    return "X" if float in types else "N" if int in types else "TEXT"


def _shortened(text: str) -> str:
    """Return as many sentences from the start of a text as fit into `SHORT_TEXT` characters, at least one."""
    first, *others = re.split(r"(?<=\.)\s+", text)
    for sentence in others:
        if len(first) + len(sentence) >= SHORT_TEXT:
            break
        first = f"{first} {sentence}"
    return first
