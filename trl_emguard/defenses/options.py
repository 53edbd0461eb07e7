"""Helpers for the options of defenses: dataclass fields with help texts, and checks that several defenses use."""

import math
import re
from collections.abc import Sequence
from dataclasses import field, fields
from numbers import Real
from typing import Any


def option(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field with a default, a help text and, optionally, the list of its allowed values.

    Config, command line and docs all use this one definition of an option.
    """
    metadata: dict[str, Any] = {"help": help}
    if choices is not None:
        metadata["choices"] = list(choices)
    return field(default=default, metadata=metadata)


def document(cls: type, base: type) -> None:
    """Append a dataclass's fields to its docstring, except those that it inherits from `base`."""
    inherited = {f.name for f in fields(base)}
    lines = [
        f"    {f.name} (defaults to `{f.default!r}`):\n        {f.metadata['help']}"
        for f in fields(cls)
        if f.name not in inherited
    ]
    cls.__doc__ = (cls.__doc__ or "").rstrip() + "\n\n    Parameters:\n    " + "\n    ".join(lines) + "\n"


def check_number(name: str, value: object, alternative: str = "") -> float:
    """Check that a coefficient is a finite number ≥ 0, and return it as a float.

    Raises:
        ValueError: `value` is not a finite number ≥ 0. The message names the argument, the value and the fix, and ends
            with the text `alternative`, which may name another form of the value.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(
            f"{name}={value!r} is not a coefficient: give a finite number, 0 (off) or above{alternative}."
        )
    return float(value)


def check_choice(name: str, value: object, choices: Sequence[str]) -> Any:
    """Return `value` if it is one of `choices`.

    Raises:
        ValueError: any other value.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known: give one of {', '.join(map(repr, choices))}.")
    return value


def check_flag(name: str, value: object) -> bool:
    """Return `value` if it is a boolean.

    Raises:
        ValueError: any other value.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false.")
    return value


def listed_layers(name: str, spec: object, num_layers: int | None, forms: str) -> list[int]:
    """Return the sorted numbers of the blocks that an option such as `ldifs_layers` lists, counted from 1 to L.

    The output of the last block, L, is meant before the model's final norm, unlike the last entry of `hidden_states`.

    Args:
        name: name of the argument, for messages.
        spec: value of the argument: `"4,8"`, `"[4, 8]"`, `4` or `[4, 8]`.
        num_layers: L; `None` to check only the form, before the model is known.
        forms: examples of accepted values, as text for the message.

    Raises:
        ValueError: a value of another form, a layer that is listed twice, or a layer outside 1 … L.
    """
    if isinstance(spec, str) and re.fullmatch(r"\s*\[?\s*\d+(\s*,\s*\d+)*\s*\]?\s*", spec):
        layers = [int(number) for number in re.findall(r"\d+", spec)]
    elif isinstance(spec, int) and not isinstance(spec, bool):
        layers = [spec]
    elif isinstance(spec, list | tuple) and spec and all(type(layer) is int for layer in spec):
        layers = list(spec)
    else:
        raise ValueError(f"{name}={spec!r} is not a choice of layers: give {forms}.")
    last = max(layers) if num_layers is None else num_layers
    outside = [layer for layer in layers if not 1 <= layer <= last]
    if outside:
        upper = "L" if num_layers is None else num_layers
        raise ValueError(f"{name}={spec!r}: layer {outside[0]} is out of range: the blocks count from 1 to {upper}.")
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name}={spec!r} names a layer twice: name each once.")
    return sorted(layers)
