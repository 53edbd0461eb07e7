"""Functions that several commands share: print errors in one line, check for matplotlib, name adapters, read JSON."""

import argparse
import sys
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from ..io.strict import parse_json


RESUMES = "interrupted: the same command resumes where it stopped."


def run_command(name: str, call: Callable[[], int | None], interrupted: str = "interrupted.") -> int:
    """Run a command and return its exit status. Errors that a user can cause are printed in one line.

    Args:
        name: name of the command, for error messages.
        call: function that runs the command and returns its exit status, or `None` for 0.
        interrupted: text to show after Ctrl-C.
    """
    try:
        return call() or 0
    except (ValueError, OSError) as error:
        # Errors of transformers' loaders may have several lines, which are joined here.
        print(f"trl-emguard {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def raise_message(message: str) -> NoReturn:
    """Raise `ValueError` with a parser's error message. A parser's own method `error` would end the process."""
    raise ValueError(" ".join(message.split()))


def raised_here(error: BaseException) -> bool:
    """Return True if code of this package raised the error. Its message then names a fix."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"].startswith("trl_emguard.")


def check_charts() -> None:
    """Check that matplotlib is installed, before a command trains the runs that its charts will show.

    Raises:
        ValueError: matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("the report's charts need matplotlib: pip install 'trl_emguard[report]'.")


def name_adapters(options: list[str], flag: str) -> dict[str, str]:
    """Return a dict of name → adapter from options `[NAME=]ADAPTER`. The default name is the last part of the path.

    An option is a path without a name if it is itself an existing folder, or if a `/` precedes its `=`. In a default
    name, `_` replaces each dot, because adapters' names must not have dots.

    Raises:
        ValueError: two adapters have the same name.
    """
    adapters: dict[str, str] = {}
    for option in options:
        name, equals, adapter = option.partition("=")
        if not equals or "/" in name or Path(option).is_dir():
            name, adapter = Path(option).resolve().name.replace(".", "_"), option
        if name in adapters:
            raise ValueError(
                f"{flag} has two adapters named {name!r}, {adapters[name]} and {adapter}: name them, NAME={adapter}."
            )
        adapters[name] = adapter
    return adapters


def json_mapping(text: str) -> dict[str, Any]:
    """Return a JSON object as a dict.

    Raises:
        argparse.ArgumentTypeError: the text is no JSON object.
    """
    try:
        found = parse_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, as '{{\"enable_thinking\": false}}' is")
    return found
