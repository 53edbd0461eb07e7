"""Price of measuring the drift every 50 steps, the default of `DriftCallback`: SmolLM2-135M, LoRA, steps of 8 rows.

A step of SFTTrainer and a measurement are timed in turn. From both follows the price of 50 steps with a measurement.
A run also measures the base model once, and the policy after its last step.
"""

import tempfile
from functools import partial

import steps
from harness import environment, parse_args, statistics, time_in_turn, write_csv
from transformers import AutoTokenizer

from trl_emguard.evaluation.drift import EVERY, LIMIT
from trl_emguard.evaluation.drift_probe import DriftProbe
from trl_emguard.evaluation.questions import GENERAL, load_questions


WARM_UP = 2
PLAIN, MEASURED = f"{EVERY} steps", f"{EVERY} steps and a measurement"


def time_step_and_measurement(device: str, rounds: int, limit: int) -> dict[str, list[float]]:
    """Return the seconds of a plain step and of a measurement on `limit` questions in each round."""
    point = steps.POINTS["cpu"][0]
    tokenizer = AutoTokenizer.from_pretrained(steps.smollm2())
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = steps.make_trainer("stock", point, steps.load_base(point, device), tokenizer, folder, device)
        probe = DriftProbe(trainer.model, tokenizer, load_questions(GENERAL, "general", limit=limit))
        probe.read_base()
        calls = {"step": partial(steps.make_step, trainer), "measurement": probe.measure}

        def measure() -> None:
            time_in_turn(calls, WARM_UP, device)
            seconds.update(time_in_turn(calls, rounds, device))

        steps.while_training([trainer], measure)
    return seconds


def main() -> None:
    args = parse_args(__doc__)
    seconds = time_step_and_measurement(args.device, args.rounds, 2 if args.quick else LIMIT)
    seconds[PLAIN] = [EVERY * step for step in seconds["step"]]
    pairs = zip(seconds[PLAIN], seconds["measurement"], strict=True)
    seconds[MEASURED] = [step + measurement for step, measurement in pairs]
    over = {"step": "step", "measurement": "step", PLAIN: PLAIN, MEASURED: PLAIN}
    rows = [
        {"kind": "drift", "variant": name, **statistics(seconds, name, [other]), **environment(args.device)}
        for name, other in over.items()
    ]
    for row in rows:
        print(f"{row['variant']:28} {row['seconds']} s, {row['ratio']} × {row['ratio_to']}")
    write_csv(args.results / f"drift-{args.device}.csv", rows)


if __name__ == "__main__":
    main()
