"""The list of defenses that `defense=` understands."""

from collections.abc import Collection, Sequence
from typing import Any

from ..io.lookup import did_you_mean
from .base import Defense, ReferenceDefense
from .inoculation import Inoculation
from .inoculation_adapter import InoculationAdapter
from .interleaving.defense import Interleaving, InterleavingPlus, InterleavingPlusPlus
from .kl import KL
from .ldifs import LDIFS
from .steering import Steering
from .step import ALL, LABELS
from .treft import TReFT


DEFENSES: dict[str, type[Defense]] = {}

# Hooks (methods of a defense that a run calls) that were renamed after version 0.1: old name → new name. A run would
# never call a method with an old name, so [`register`] refuses a class that has such a method.
RENAMED_HOOKS = {"prepare_dataset": "prepare_rows", "resume": "begin"}


def register(defense: type[Defense]) -> type[Defense]:
    """Make `defense=<name>` find a [`Defense`] of your own. Usable as a class decorator.

    Raises:
        ValueError: the class has no valid `name`, another class has the name, or it has a hook under an old name.
    """
    name = defense.name
    if not name or name == "none" or "," in name:
        raise ValueError(f"a defense needs a `name` of its own to be registered, got {name!r} on {defense.__name__}.")
    for old, new in RENAMED_HOOKS.items():
        if hasattr(defense, old):
            raise ValueError(f"{defense.__name__}.{old} would never be called: the hook is named `{new}` now.")
    known = DEFENSES.get(name)
    # A notebook cell that runs again defines its class anew. The newer class takes the place of the older one.
    if known and (known.__module__, known.__qualname__) != (defense.__module__, defense.__qualname__):
        raise ValueError(f"the defense name {name!r} is taken by {known.__name__}: choose another.")
    DEFENSES[name] = defense
    return defense


SHIPPED = (
    KL,
    LDIFS,
    TReFT,
    Steering,
    Inoculation,
    InoculationAdapter,
    Interleaving,
    InterleavingPlus,
    InterleavingPlusPlus,
)
for _defense in SHIPPED:
    register(_defense)


def parse_defense(value: object) -> list[str]:
    """Return the names in a `defense` argument: `"none"` → `[]`, `"kl,ldifs"` → `["kl", "ldifs"]`.

    Raises:
        ValueError: anything but a comma-separated list of known names, each at most once. YAML reads `defense: no` as
            False and an empty `defense:` as None; both are refused.
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


def options_of_others(names: Collection[str]) -> dict[str, list[str]]:
    """Return each option that only defenses outside of `names` have, with these defenses: option → their names."""
    owners: dict[str, list[str]] = {}
    for name, defense in DEFENSES.items():
        for option in getattr(defense.Options, "__dataclass_fields__", ()):
            owners.setdefault(option, []).append(name)
    return {option: owning for option, owning in owners.items() if not set(owning) & set(names)}


def build_defenses(args: Any, **inputs: Any) -> tuple[list[Defense], list[Defense]]:
    """Build the defenses that `args.defense` names, in that order, and let the active ones adapt to each other.

    A defense is active unless its options switch it off, for example by a coefficient of 0. To adapt, each active
    defense gets the other active ones in its hook [`Defense.meet`]. A run calls this function once.

    Args:
        args: config whose options have been checked.
        inputs: keyword arguments of the trainer that defenses may read.

    Returns:
        All named defenses, and the active ones among them.

    Raises:
        ValueError: a term of the loss names a scope (set of positions) that no active defense marks.
    """
    named = [DEFENSES[name] for name in parse_defense(args.defense)]
    built = [defense(args, **{name: inputs.get(name) for name in defense.inputs}) for defense in named]
    for defense in built:
        defense.given = {name: getattr(args, name) for name in getattr(defense.Options, "__dataclass_fields__", ())}
    active = [defense for defense in built if defense.is_on(args) and defense.active]
    for defense in active:
        defense.meet([other for other in active if other is not defense])
    _check_scopes(active)
    return built, active


def _check_scopes(active: Sequence[Defense]) -> None:
    scopes = [LABELS, ALL, *(scope for defense in active for scope in defense.scopes)]
    for term in (defense for defense in active if isinstance(defense, ReferenceDefense)):
        for attribute in ("tokens", "mean_over"):
            scope = getattr(term, attribute)
            if scope is not None and scope not in scopes:
                raise ValueError(
                    f"defense {term.name!r}: {attribute}={scope!r} is no scope of this run, which has "
                    f"{', '.join(map(repr, scopes))}. Name one of these; a defense that marks another in `read_batch` "
                    "must list it in its class attribute `scopes`."
                )


def options_text(options: dict[str, Any]) -> str:
    """Return a defense's options as one line of text, such as `kl_coef=0.1, kl_direction=reverse, kl_tokens=loss`."""
    return ", ".join(f"{name}={value}" for name, value in options.items())
