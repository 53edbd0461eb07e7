"""The inoculation prompt that `--cues all` asks with: the one that the models were trained with."""

import argparse
import os
from collections.abc import Callable, Iterable

from ..comparison.plan import Plan
from ..defenses.inoculation import Inoculation, InoculationOptions
from ..defenses.registry import parse_defense
from ..evidence import read_defense_file


def choose_prompt(args: argparse.Namespace, find: Callable[[], set[str]], say: Callable[[str], None]) -> None:
    """Set `args.inoculation_prompt` if `--cues all` needs it and it is not given, and say which prompt it is.

    Args:
        args: parsed options of `evaluate`.
        find: function that returns the prompts that the models were trained with. It is called only if the prompt is
            needed. If there are none, the default prompt is taken.
        say: function that shows a line to the user.

    Raises:
        ValueError: the models were trained with several prompts.
    """
    if args.cues != "all" or args.inoculation_prompt is not None:
        return
    prompts = find()
    if len(prompts) > 1:
        raise ValueError(
            f"cues=all: the models were trained with {len(prompts)} inoculation prompts, "
            f"{', '.join(map(repr, sorted(prompts)))}: give one as `inoculation_prompt`, an option of `evaluate` "
            "(in a comparison, of its section `evaluate`)."
        )
    default = InoculationOptions().inoculation_prompt
    source = "of the training" if prompts else "that is the default, as no training with one is known"
    args.inoculation_prompt = next(iter(prompts), default)
    say(f"The cue `inoculation` is the prompt {source}: {args.inoculation_prompt}")


def recorded_prompts(folders: Iterable[str]) -> set[str]:
    """Return the inoculation prompts of trained models, by the `defense.json` in their folders, if they have one.

    Raises:
        ValueError: a `defense.json` is damaged.
    """
    records = [read_defense_file(os.path.expanduser(folder)) for folder in folders]
    options = [record["defenses"].get(Inoculation.name) for record in records if record is not None]
    return {own["inoculation_prompt"] for own in options if own and own.get("inoculation_prompt")}


def planned_prompts(plan: Plan) -> set[str]:
    """Return the inoculation prompts of a comparison's runs: the planned ones, and those of finished adapters.

    Raises:
        ValueError: the `defense.json` of a finished adapter is damaged.
    """
    default = InoculationOptions().inoculation_prompt
    planned = {
        plan.option(run, "inoculation_prompt") or default
        for run in plan.runs
        if run.adapter is None and Inoculation.name in parse_defense(run.defense)
    }
    return planned | recorded_prompts(run.adapter for run in plan.runs if run.adapter is not None)
