"""Compare defenses: train a recipe with each set of options, once per seed; evaluate all adapters; write one report.

```yaml
# compare.yaml
recipe: smollm2-135m-instruct/sft.yaml
runs:                                # the undefended run is always added
  - {defense: kl, kl_coef: [0.1, 1.0]}          # a list is a sweep: one run per value
  - {defense: "interleave++,kl", interleave_dataset: scores.parquet}    # in braces, a comma needs quotes
  # - {adapter: out/mine}            # an adapter that is trained already
seeds: [0, 1]
baselines: [early_stop, alpha, ema]  # made from the undefended run, without more training
benign_task: permuted_operators      # each option set is also trained on a benign task
evaluate: {samples_per_question: 1}
```

```bash
trl-emguard compare --config compare.yaml --output_dir out/comparison
```

After an interruption, the same command resumes. The report is the file report.html, for any browser.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import ModelConfig

from ..comparison.plan import EMA, Plan, Run, read_plan
from ..config import EMGuardConfig
from ..data.conversation import conversation
from ..data.load import load_rows
from ..data.training import check_format, read_template
from ..defenses.registry import build_defenses
from ..evaluation.questions import QuestionSet
from ..evaluation.run import EvaluationOptions, check_sets
from ..io.files import check_writable, locked
from ..models.callback_state import CheckpointedCallback
from ..models.chat import shared_template_kwargs
from . import evaluate as evaluation
from .compare_evaluation import evaluate_arguments
from .inoculated import choose_prompt, planned_prompts
from .sft import make_callbacks
from .sft import make_parser as make_sft_parser
from .sft_inputs import check_packages
from .shared import check_charts, refuse, run_command, to_path


INTERRUPTED = "interrupted: the same command keeps finished runs, and begins the one that was interrupted anew."
# Options of a training that no run of a comparison may have, and why.
REFUSED = {
    "accelerate_config": "launches several processes, and every run of a comparison is one",
    "load_best_model_at_end": "lets each run choose its last step by its own evaluation loss",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "trl-emguard compare", description=__doc__, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, help="YAML file of the comparison")
    parser.add_argument("--output_dir", required=True, type=to_path, help="folder for runs and report")
    parser.add_argument("--dry_run", action="store_true", help="say what would be trained, and train nothing")
    args = parser.parse_args(argv)
    return run_command("compare", lambda: run(args, argv, Console(width=100)), INTERRUPTED)


def run(args: argparse.Namespace, argv: list[str], console: Console) -> None:
    from ..comparison.measure import check_base_model, check_benign, joined, measure, measure_benign

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False)

    actions = {a.dest: a for a in make_sft_parser()._actions}
    lists = [name for name, action in actions.items() if action.nargs in ("+", "*")]
    plan = read_plan(args.config, list(actions), lists, args.output_dir)
    eval_args = evaluate_arguments(plan, str(plan.recipe_options.get("model_name_or_path")), args.output_dir)
    training_args = check_options(plan, args.dry_run)
    train = load_training_rows(plan.recipe_options, eval_args, training_args, say)
    choose_prompt(eval_args, lambda: planned_prompts(plan), say)
    options, sets = evaluation.make_options(eval_args), evaluation.load_sets(eval_args, train)
    check_sets(sets, None, options)
    check_benign(plan, sets)
    if not any(questions.criterion == "in_domain" for questions in sets):
        say("Note: no set asks for the narrow task, so the report can prefer no run. Add `in_domain` to `evaluate`.")
    if args.dry_run:
        show_plan(plan, args.output_dir, console)
        return
    check_writable("--output_dir", args.output_dir)
    check_charts()
    tokenizer = check_questions(plan.recipe_options, eval_args.model, sets, options)

    from ..comparison.page import write_page
    from ..comparison.report import make_report, make_table, save
    from ..comparison.runs import other_versions, train_all, train_benign

    folder: Path = args.output_dir
    model = (eval_args.model, eval_args.dtype, eval_args.device_map)
    with locked("--output_dir", folder):
        if unfinished(plan, folder):
            check_base_model(model, tokenizer, sets, options)
        trained = train_all(plan, folder, say)
        benign = train_benign(plan, trained, folder, say)
        limit, of_template = eval_args.limit, eval_args.chat_template_kwargs
        command = shlex.join(["trl-emguard", "compare", *argv])
        trained, results = measure(model, trained, sets, options, train.conversations, folder / "evaluation", command)
        benign, of_task = measure_benign(
            model, benign, options, limit, folder / "evaluation_benign", command, of_template
        )
        report = make_report(trained, joined(results, of_task), benign)
        info = results.info | {"plan": plan.content}
        info["other_versions"] = other_versions([*trained, *benign], info["versions"])
        save(report, args.output_dir, info)
        page = write_page(report, args.output_dir, info)
        console.print(make_table(report))
        say(report.sentence)
        say(f"Report: {page.resolve()}")


def load_training_rows(
    recipe: Mapping[str, Any], args: argparse.Namespace, training_args: EMGuardConfig, say: Callable[[str], None]
) -> evaluation.TrainRows:
    """Return the rows that `args.train_data` names, or by default the training rows of the recipe (`dataset_name`).

    By default `args.train_data` is set to the recipe's `dataset_name`. Rows that cannot be had as conversations are
    left out with a note.

    Args:
        recipe: options of the recipe.
        args: parsed options of `evaluate`.
        training_args: config of the undefended run.
        say: function that shows a line to the user.

    Raises:
        FileNotFoundError, ValueError: the rows cannot be loaded, or trained on as the recipe says.
    """
    name = recipe.get("dataset_name")
    if args.train_data is not None:
        if name is not None and Path(args.train_data).resolve() != Path(name).resolve():
            say(
                f"Note: train_data={args.train_data!r} of `evaluate` is not the recipe's dataset_name={name!r}: cues "
                "are derived from the former, and held-out rows are not compared with the latter."
            )
        return evaluation.load_train_rows(args.train_data)
    args.train_data, reason = name, None
    kwargs: dict[str, Any] = {}
    if name is None or recipe.get("dataset_streaming"):
        reason = "they come from `datasets`, or as a stream"
    else:
        rows = load_rows(name, recipe.get("dataset_train_split", "train"), recipe.get("dataset_config"))
        check_format(rows, training_args, f"dataset_name={name!r}")
        kwargs = shared_template_kwargs(rows)
        if args.cues == "none" and not args.in_domain:
            # The conversations are needed only to derive cues (prompts that resemble the rows), and to check that the
            # questions of `in_domain` were not trained on.
            return evaluation.TrainRows([], kwargs)
        try:
            return evaluation.TrainRows([conversation(row) for row in rows], kwargs)
        except ValueError as error:
            reason = str(error)
    say(
        f"Note: the recipe's rows are no source of cues, and are not compared with held-out rows: {reason}. Name rows "
        "that are conversations by `train_data` in `evaluate`."
    )
    return evaluation.TrainRows([], kwargs)


def check_questions(
    recipe: Mapping[str, Any], model: str, sets: Sequence[QuestionSet], options: EvaluationOptions
) -> PreTrainedTokenizerBase:
    """Refuse questions that the chat template of the training does not accept, before the first run is trained.

    The template is the recipe's (`chat_template_path`: a file, or the folder or hub id of a tokenizer), else the
    model's.

    Returns:
        The tokenizer of the training.

    Raises:
        ValueError: the tokenizer has no chat template, the template refuses a question, or TRL would resize the
            model's embeddings to copy the template, so that no adapter would fit the base model.
    """
    from transformers import AutoConfig, AutoTokenizer

    from ..evaluation.candidates import check_template
    from ..models.chat import copy_template
    from ..models.shipped import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(model))
    rows = has = AutoConfig.from_pretrained(resolve_model(model)).get_text_config().vocab_size
    path, end = recipe.get("chat_template_path"), recipe.get("eos_token")
    # SFTTrainer first sets the end token to `eos_token`. If it then copies the template of another tokenizer, it also
    # takes over the end token of that tokenizer.
    if end is not None:
        tokenizer.eos_token = end
    if path is not None and Path(path).is_file() and path.endswith((".jinja", ".j2")):
        tokenizer.chat_template = read_template(path)
    elif path is not None:
        rows = copy_template(tokenizer, AutoTokenizer.from_pretrained(path))
    check_template(tokenizer)
    check_sets(sets, tokenizer, options)
    if rows != has:
        raise ValueError(
            f"chat_template_path={path!r}: to copy this tokenizer's template, TRL would resize the model's embeddings "
            f"from {has} rows to {rows}, and the evaluation could load no adapter. Save the template as a .jinja "
            f"file, name that, and set eos_token: {tokenizer.eos_token!r} beside it."
        )
    return tokenizer


def unfinished(plan: Plan, folder: Path) -> list[tuple[str, Run]]:
    """Return the runs that are still to be trained, on the recipe's rows (`runs`) or the benign task's (`benign`).

    Each comes with one of these two words, the name of the folder of its kind.
    """
    from ..comparison.runs import BENIGN, RUNS, read_status

    own = {one.key: read_status(folder / RUNS / one.folder) for one in plan.runs if one.adapter is None}
    # A run that ended with an error has no steps that its training on the benign task could repeat.
    failed = {key for key, status in own.items() if status is not None and status["error"] is not None}
    benign = [one for one in plan.benign_runs if one.key not in failed]
    return [
        *((RUNS, one) for one in plan.runs if one.key in own and own[one.key] is None),
        *((BENIGN, one) for one in benign if read_status(folder / BENIGN / one.folder) is None),
    ]


def check_options(plan: Plan, is_dry: bool) -> EMGuardConfig:
    """Refuse runs with options that `trl-emguard sft` or a comparison does not accept, before any run is trained.

    Args:
        plan: plan of the comparison.
        is_dry: True for a dry run, which needs no device that could train in bf16.

    Returns:
        The config of the first run, the undefended one.

    Raises:
        ValueError: an option is unknown, empty, one of `REFUSED`, does not accept its value, or needs a package that
            is missing, no option names training rows, the run trains the whole model, its `adapter` cannot be
            measured, or the evaluation would load another model than the training. The message names the run. Or the
            recipe names no model.
    """
    from ..comparison.measure import check_adapters
    from ..comparison.runs import on_benign_rows, sft_arguments

    if not plan.recipe_options.get("model_name_or_path"):
        raise ValueError(f"the recipe {plan.recipe} names no model: add model_name_or_path to it.")
    check_adapters(plan)
    # A finished adapter has no options to check. Runs of the baseline `random_vector` repeat a run of the defense
    # `steering`, with a random vector that does not exist yet. They are skipped too: except for the vector, they have
    # the options of the repeated run, and that run is checked.
    runs = [(one.name, one) for one in plan.runs if one.adapter is None and not one.is_random]
    runs += [(f"{one.name} on the benign task", on_benign_rows(one, Path("unused"), 1)) for one in plan.benign_runs]
    configs = []
    for name, one in runs:
        for option, reason in REFUSED.items():
            value = plan.option(one, option)
            if value not in (None, False):
                raise ValueError(
                    f"the run {name!r}: {option}={value!r} {reason}: leave it out of the recipe and of the runs."
                )
        for option in ("chat_template_path", "eos_token"):
            if one.options.get(option) != plan.recipe_options.get(option) and option in one.options:
                raise ValueError(
                    f"the run {name!r}: {option}={one.options[option]!r} is the run's own, and all models of a "
                    "comparison are asked alike: set it in the recipe."
                )
        if plan.option(one, "dataset_name") is None and not plan.option(one, "datasets"):
            raise ValueError(f"the run {name!r} has no training rows: add dataset_name to {plan.recipe}.")
        parser = make_sft_parser()
        parser.error = refuse  # type: ignore[method-assign]
        try:
            _check_empty(one.options, parser)
            # With `--dry_run true`, the parser accepts bf16 on a machine without an accelerator. A dry run of a
            # comparison trains nothing, so it accepts bf16 there too.
            words = [*sft_arguments(one, plan.recipe, Path("unused")), "--dry_run", str(is_dry).lower()]
            _, training_args, model_args, _, launch_args = parser.parse(words)
            check_packages(training_args, model_args)
            _check_model(training_args, model_args)
            configs.append(training_args)
            # Other seeds and the benign task have the same defenses and callbacks, so these are checked once.
            if one in plan.runs and one.seed == plan.runs[0].seed:
                _check_start(training_args, make_callbacks(launch_args))
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"the run {name!r}: {error}") from error
    return configs[0]


def _check_start(training_args: EMGuardConfig, callbacks: Sequence[TrainerCallback]) -> None:
    """Refuse what a run itself finds when it starts: a missing pool, vector or adapter, and too few measured steps."""
    build_defenses(training_args)
    for callback in callbacks:
        if isinstance(callback, CheckpointedCallback):
            callback.check_steps(training_args.max_steps)


def _check_model(training_args: EMGuardConfig, model_args: ModelConfig) -> None:
    """Refuse options by which training would load or save another model than the evaluation can load.

    Raises:
        ValueError: the whole model is trained, a revision other than "main" is named, or remote code is trusted.
    """
    if not model_args.use_peft:
        raise ValueError(
            "use_peft=False trains the whole model, and a comparison takes LoRA adapters: set use_peft: true in the "
            "recipe."
        )
    given = training_args.model_init_kwargs or {}
    revisions = {"model_revision": model_args.model_revision, "model_init_kwargs: revision": given.get("revision")}
    for name, revision in revisions.items():
        if revision not in (None, "main"):
            raise ValueError(
                f"{name}={revision!r} is not what the evaluation loads: save that revision in a folder, and "
                "name the folder by model_name_or_path."
            )
    if training_args.trust_remote_code or given.get("trust_remote_code"):
        raise ValueError(
            "trust_remote_code=True is not for comparisons, whose evaluation runs no remote code: leave it out, and "
            "name by model_name_or_path a folder of a model that needs none."
        )


def _check_empty(options: Mapping[str, Any], parser: argparse.ArgumentParser) -> None:
    """Refuse empty values, except for options that read the text "None" on a command line as no value.

    Raises:
        ValueError: an option has an empty value, which the command line could only pass on as the text "None".
    """
    actions = {action.dest: action for action in reversed(parser._actions)}
    for name, value in options.items():
        if None in (value if isinstance(value, list) else [value]) and not _takes_none(actions[name]):
            raise ValueError(f"`{name}:` is empty: give it a value or leave it out.")


def _takes_none(action: argparse.Action) -> bool:
    try:
        return action.nargs is None and callable(action.type) and action.type("None") is None
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False


def show_plan(plan: Plan, folder: Path, console: Console) -> None:
    """Print each run's status and steps (if known), the number of runs to train, and baselines that need no training.

    The hours left are estimated from the finished runs, if there are any.
    """
    from ..comparison.runs import BENIGN, RUNS, read_status, training_seconds

    left, known = 0, []
    for number, one in enumerate(plan.runs, start=1):
        status = read_status(folder / RUNS / one.folder)
        steps = plan.option(one, "max_steps")
        if one.adapter is not None:
            text = f"taken from {one.adapter}"
        elif status is not None and status["error"] is not None:
            text = f"failed: {status['error']}"
        elif status is not None:
            text = f"finished, {status['step']} steps"
            known.append(training_seconds(folder / RUNS / one.folder, status))
        else:
            left += 1
            text = f"to train, {steps} steps" if steps else "to train"
        console.print(f"{number:3} {one.name}, seed {one.seed}: {text}", markup=False, highlight=False)
    benign = sum(place == BENIGN for place, _ in unfinished(plan, folder))
    hours = (
        f", about {(left + benign) * sum(known) / len(known) / 3600:.1f} hours as the finished ones" if known else ""
    )
    of_task = f", and {benign} on the benign task" if plan.has_benign_task else ""
    asked = plan.baselines
    free = [
        *(["early checkpoints"] if asked.early_stop else []),
        *(f"alpha {alpha}" for alpha in asked.alphas),
        *([EMA] if asked.ema else []),
    ]
    line = f"{left} runs to train{of_task}{hours}; free baselines: {', '.join(free) or 'none'}."
    console.print(line, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
