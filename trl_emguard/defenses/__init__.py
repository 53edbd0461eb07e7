"""One file per defense. `DEFENSES` is the list of what `defense=` understands; `register` adds to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..io.lookup import did_you_mean
from .base import Defense, Paper, ReferenceDefense
from .inoculation import Inoculation
from .interleaving.defense import Interleaving, InterleavingPlus, InterleavingPlusPlus
from .kl import KL
from .ldifs import LDIFS
from .steering import Steering


if TYPE_CHECKING:
    from ..config import EMGuardConfig


DEFENSES: dict[str, type[Defense]] = {}


def register(defense: type[Defense]) -> type[Defense]:
    """Make `defense=<name>` find a [`Defense`] of your own. Usable as a class decorator.

    Raises:
        ValueError: the class has no `name`, or the name is taken.
    """
    name = defense.name
    if not name or name == "none" or "," in name:
        raise ValueError(f"a defense needs a `name` of its own to be registered, got {name!r} on {defense.__name__}.")
    if name in DEFENSES:
        raise ValueError(f"the defense name {name!r} is taken by {DEFENSES[name].__name__}: choose another.")
    DEFENSES[name] = defense
    return defense


for _defense in (KL, LDIFS, Steering, Inoculation, Interleaving, InterleavingPlus, InterleavingPlusPlus):
    register(_defense)


def parse_defense(value: object) -> list[str]:
    """The names in a `defense` argument: `"none"` → `[]`, `"kl,ldifs"` → `["kl", "ldifs"]`.

    Raises:
        ValueError: anything that is not a comma-separated list of known names, each at most once. In particular what
            YAML makes of `defense: no` (False) and of an empty `defense:` (None).
    """
    known = ", ".join(["none", *DEFENSES])
    if not isinstance(value, str) or not value.strip():
        hint = " (YAML reads no, off and an empty value so)" if value in (False, None) else ""
        raise ValueError(f"defense={value!r} is not a defense{hint}. Write 'none' for no defense; known: {known}.")
    names = [name.strip() for name in value.split(",")]
    if names == ["none"]:
        return []
    for name in names:
        if name == "none":
            raise ValueError(f"defense={value!r} mixes 'none' with other names: leave 'none' out, or everything else.")
        if name not in DEFENSES:
            hint = did_you_mean(name, ["none", *DEFENSES], cutoff=0.4)
            raise ValueError(f"defense={value!r}: {name!r} is not a known defense.{hint} Known: {known}.")
    if len(set(names)) < len(names):
        raise ValueError(f"defense={value!r} names a defense twice: name each once.")
    return names


def build_defenses(args: EMGuardConfig) -> list[Defense]:
    """The defenses that `args.defense` names, in that order, each with its options checked.

    Raises:
        ValueError: an unknown name, a bad option, or defenses that exclude each other.
    """
    defenses = [DEFENSES[name](args) for name in parse_defense(args.defense)]
    mixing = [defense.name for defense in defenses if isinstance(defense, Interleaving)]
    if len(mixing) > 1:
        raise ValueError(
            f"defense={args.defense!r}: {' and '.join(mixing)} choose rows of the same pool: name one of them."
        )
    active = [defense for defense in defenses if defense.active]
    for term in active:
        on_safe_rows = isinstance(term, ReferenceDefense) and term.tokens == "interleaved"
        if on_safe_rows and not any(isinstance(defense, Interleaving) for defense in active):
            raise ValueError(
                f"defense={args.defense!r}: {term.name} looks at mixed-in rows alone ({term.name}_tokens='interleaved'), and "
                "nothing is mixed in: add 'interleave', 'interleave+' or 'interleave++'."
            )
    return defenses


__all__ = [
    "DEFENSES",
    "KL",
    "LDIFS",
    "Defense",
    "Inoculation",
    "Interleaving",
    "InterleavingPlus",
    "InterleavingPlusPlus",
    "Paper",
    "ReferenceDefense",
    "Steering",
    "build_defenses",
    "parse_defense",
    "register",
]
