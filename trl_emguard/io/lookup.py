"""Suggestions for mistyped names."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return " Did you mean 'x'?" with the known name nearest to `name`, or "" if none is near.

    The text begins with a space, so that it can follow a sentence directly.

    Args:
        name: the name as the user typed it.
        known: the names that exist.
        cutoff: lowest similarity of a suggestion, from 0 to 1.
    """
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" Did you mean {near[0]!r}?" if near else ""
