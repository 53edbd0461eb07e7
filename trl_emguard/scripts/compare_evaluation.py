"""Options of the evaluation in a comparison, from the section `evaluate` of its YAML file."""

import argparse
import json
from pathlib import Path

from ..comparison.plan import Plan
from ..io.lookup import did_you_mean
from . import evaluate as evaluation
from .shared import refuse


# Options of `evaluate` that a comparison's YAML file cannot set. The comparison chooses the models and the folder
# itself, and it asks no judge.
SET_BY_COMPARISON = ("model", "base", "adapter", "output_dir")
OF_JUDGE = ("judge", "rejudge", *evaluation.OF_JUDGE)


def evaluate_arguments(plan: Plan, model: str, output_dir: Path) -> argparse.Namespace:
    """Return the arguments of `trl-emguard evaluate`, parsed from `evaluate` in the comparison's YAML file.

    Raises:
        ValueError: an option of `evaluate` is unknown, not for a comparison, or does not accept its value.
    """
    parser = evaluation.make_parser()
    not_of_evaluate = ("help", *SET_BY_COMPARISON, *OF_JUDGE)
    known = [action.dest for action in parser._actions if action.dest not in not_of_evaluate]
    words = ["--model", model, "--output_dir", str(output_dir)]
    for name, value in plan.evaluate.items():
        if name in SET_BY_COMPARISON:
            raise ValueError(f"`evaluate`: {name}={value!r}: the comparison sets it itself: leave it out.")
        if name in OF_JUDGE:
            raise ValueError(
                f"`evaluate`: {name}={value!r}: no judge is asked in a comparison. Leave it out, and judge afterwards "
                f"by `trl-emguard evaluate --rejudge {output_dir / 'evaluation'} --judge ... --output_dir ...`."
            )
        if name not in known:
            raise ValueError(f"unknown option of `evaluate` {name!r}.{did_you_mean(name, known)}")
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}", *(json.dumps(v, default=str) if isinstance(v, dict) else str(v) for v in values)]

    parser.error = refuse  # type: ignore[method-assign]
    try:
        return parser.parse_args(words)
    except ValueError as error:
        raise ValueError(f"`evaluate`: {error}") from error
