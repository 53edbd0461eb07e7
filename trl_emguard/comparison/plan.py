"""The plan of a comparison, from its YAML file: which runs are trained, and what they are measured on."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..defenses.registry import options_of_others, parse_defense
from ..defenses.schedule import Schedule
from ..evaluation.questions import OPERATORS
from ..io.lookup import did_you_mean
from ..io.recipes import find_recipe
from ..io.strict import parse_yaml
from ..version import __version__
from .inputs import contents


KEYS = ("recipe", "runs", "seeds", "baselines", "benign_task", "evaluate")
BASELINES = ("early_stop", "alpha", "ema", "random_vector")
ALPHAS = (0.25, 0.5, 0.75)
UNDEFENDED = "none"
# Options that an entry of `runs` must not set. The comparison sets them itself, or all runs take them from the
# recipe. Runs thus differ only in what is compared. LoRA dropout is 0 in all runs, because the defenses `kl` and
# `ldifs` switch dropout off. If other runs kept it, dropout would differ as well.
OWN_OPTIONS = (
    *("output_dir", "config", "seed", "dry_run", "resume_from_checkpoint", "model_name_or_path", "lora_dropout"),
    *("ema", "push_to_hub", "dataset_name", "dataset_config", "dataset_train_split", "datasets"),
)
# Endings of the names of options that reports omit, because others may read a report. The option `env` sets
# environment variables, which may hold API keys.
SECRETS = ("token", "key", "secret", "password", "env")
# Options that reports show despite their endings: their values are tokens of the vocabulary, which are no secrets.
TOKENS = ("eos_token", "pad_token")
# For the baseline early_stop, the undefended run saves a checkpoint after each quarter of its steps.
QUARTERS = {"save_strategy": "steps", "save_steps": 0.25, "save_total_limit": 4}
# Names of free baselines, made from the undefended run without more training: `step N` is a checkpoint of this run,
# `alpha X` its adapter scaled by X, `ema` its averaged weights. A user's run that BASELINE_NAMES matches is refused.
EMA = "ema"
BASELINE_NAMES = re.compile(rf"(step|alpha) |{EMA}$")
# End of the name of a baseline that repeats a run with the defense `steering`, but steers along a random vector.
RANDOM = " random_vector"
# Name of the question set for the benign task, arithmetic. Only runs trained on this task are measured on the set.
BENIGN_TASK = "benign_task"
# Options that choose training rows. A training on the benign task overrides `dataset_name` and `dataset_train_split`,
# but not the options listed here, so a comparison with the benign task is refused if the recipe or a run sets one.
OTHER_ROWS = ("datasets", "dataset_config")


@dataclass(frozen=True)
class Run:
    """One training of a comparison, or a finished adapter that is only evaluated.

    Attributes:
        name: the run's name in the report, without the seed.
        options: options of `trl-emguard sft` that override or extend the recipe's.
        seed: seed of the training.
        adapter: folder of a finished adapter; `None` for a training.
        is_random: True if a random vector of equal norms replaces the steering vector.
        key: hash of everything that the training's outcome depends on.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    adapter: str | None = None
    is_random: bool = False
    key: str = ""

    @property
    def defense(self) -> str:
        return str(self.options.get("defense", UNDEFENDED))

    @property
    def folder(self) -> str:
        """Name of the run's folder. It contains a part of `key`, so another recipe or option gives another folder."""
        return f"{re.sub(r'[^A-Za-z0-9_+=-]+', '_', self.name)}-seed{self.seed}-{self.key[:8]}"


@dataclass(frozen=True)
class Baselines:
    """Choice of a comparison's baselines, the models that a defense should beat.

    Attributes:
        early_stop: True if checkpoints of the undefended run are compared.
        alphas: factors by which the undefended run's adapter is scaled. Each factor gives one baseline.
        ema: True if the moving average of the undefended run's weights is compared.
        random_vector: True if every steering run is repeated with a random vector.
    """

    early_stop: bool = False
    alphas: tuple[float, ...] = ()
    ema: bool = False
    random_vector: bool = False


@dataclass(frozen=True)
class Plan:
    """Runs, baselines and evaluation options of a comparison.

    Attributes:
        recipe: file of the recipe.
        recipe_options: the options in the recipe file.
        runs: runs of all seeds, seed by seed. For each seed, the undefended run comes first.
        baselines: baselines that the comparison includes.
        has_benign_task: True if option sets are also trained on the benign task, arithmetic with permuted operators.
        evaluate: options of `trl-emguard evaluate`, by name.
        output_dir: folder of the comparison.
    """

    recipe: Path
    recipe_options: dict[str, Any]
    runs: list[Run]
    baselines: Baselines
    has_benign_task: bool
    evaluate: dict[str, Any]
    output_dir: Path

    @property
    def benign_runs(self) -> list[Run]:
        """Runs that are trained a second time, on the benign task; empty if the comparison has no benign task.

        Finished adapters, and runs that steer along a random vector, are not among them.
        """
        return [run for run in self.runs if self.has_benign_task and run.adapter is None and not run.is_random]

    @property
    def content(self) -> dict[str, Any]:
        """Plan as plain values for the report: options, seeds, baselines, benign task; no secrets ([`SECRETS`])."""

        def shown(value: Any) -> Any:
            if isinstance(value, Mapping):
                kept = {k: v for k, v in value.items() if not str(k).lower().endswith(SECRETS) or k in TOKENS}
                return {str(name): shown(inner) for name, inner in kept.items()}
            if isinstance(value, list | tuple):
                return [shown(inner) for inner in value]
            if str(value).lstrip().startswith("{"):  # transformers accepts dicts as JSON text, which may hold secrets
                try:
                    return shown(json.loads(value))
                except ValueError:
                    return "not shown: it is no valid JSON"
            return value if value is None or isinstance(value, bool | int | float) else str(value)

        return {
            "recipe": shown(self.recipe_options),
            "runs": {run.name: shown(run.options) if run.adapter is None else run.adapter for run in self.runs},
            "seeds": sorted({run.seed for run in self.runs}),
            "baselines": shown(asdict(self.baselines)),
            "benign_task": self.has_benign_task,
            "evaluate": shown(self.evaluate),
        }

    def option(self, run: Run, name: str) -> Any:
        """Return an option's value in a run, from the run's options or else the recipe; `None` if neither sets it."""
        return run.options.get(name, self.recipe_options.get(name))

    def check_inputs(self, key: str) -> None:
        """Refuse a changed recipe, and changed files or folders that the run with this `key` reads.

        Raises:
            ValueError: something has changed since the plan was read, so the key stands for another training.
        """
        run = next(run for run in self.runs if run.key == key)
        # A file of rows is hashed anew each time, which takes about a second for each GB, much less than a training.
        if _key(replace(run, key=""), *_read_recipe(self.recipe), self.output_dir) != key:
            raise ValueError(
                f"the run {run.name!r}: {self.recipe}, or a file or folder that the run reads, has changed since this "
                "comparison began; start it again."
            )


def read_plan(path: str, known: Collection[str], lists: Collection[str], output_dir: Path) -> Plan:
    """Read a comparison's YAML file, and the recipe that it names.

    Args:
        path: the comparison's YAML file.
        known: names of the options of `trl-emguard sft`.
        lists: names of the options among them that take several values.
        output_dir: folder of the comparison. A run may read a folder that contains the comparison's folder. The
            comparison's files then do not count as inputs of the run.

    Raises:
        FileNotFoundError: no such file, or no such recipe.
        ValueError: an unknown key or option, a value of a wrong kind, or a recipe that is not a YAML mapping of
            options; the message names file and key.
    """
    if not Path(path).expanduser().is_file():
        raise FileNotFoundError(f"--config={path!r} is not a file.")
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        config = parse_yaml(text)
        if not isinstance(config, dict):
            raise ValueError("it must hold `key: value` lines")
        _check_names(config, KEYS, "key", text)
        if "recipe" not in config or not config.get("runs"):
            raise ValueError("it needs `recipe` and `runs`")
        recipe = find_recipe(str(config["recipe"]))
        recipe_text, recipe_options = _read_recipe(recipe)
        seeds = config.get("seeds", [0])
        if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
            raise ValueError(f"seeds={seeds!r} must be a list of whole numbers")
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds={seeds!r} holds a seed twice, which would count one training as two")
        baselines = _baselines(config.get("baselines") or [])
        sets = _sets(config["runs"], recipe_options, known, lists, text)
        if baselines.random_vector:
            sets = _with_random_vectors(sets)
        has_benign_task = _has_benign_task(config.get("benign_task"), sets, recipe_options)
        kept = (QUARTERS if baselines.early_stop else {}) | ({"ema": True} if baselines.ema else {})
        runs = [
            replace(run, seed=seed, options=run.options | (kept if run.name == UNDEFENDED else {}))
            for seed in seeds
            for run in sets
            if run.adapter is None or seed == seeds[0]  # a finished adapter is measured once, not for each seed
        ]
        runs = [replace(run, key=_key(run, recipe_text, recipe_options, output_dir)) for run in runs]
        evaluate = config.get("evaluate") or {}
        if not isinstance(evaluate, dict):
            raise ValueError("`evaluate` must hold options of `trl-emguard evaluate`")
    except UnicodeDecodeError as error:
        raise ValueError(f"--config={path!r} is not UTF-8 text ({error}): save it as UTF-8.") from error
    except ValueError as error:
        message = str(error).rstrip(".")
        raise ValueError(f"{path}: {message}" + ("" if message.endswith("?") else ".")) from error
    return Plan(recipe, recipe_options, runs, baselines, has_benign_task, evaluate, output_dir)


def _read_recipe(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a recipe's text and its options."""
    try:
        text = path.read_text(encoding="utf-8")
        options = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"the recipe {path} cannot be read: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"the recipe {path} must hold `option: value` lines")
    return text, options


def _sets(entries: Any, recipe: dict, known: Collection[str], lists: Collection[str], text: str) -> list[Run]:
    """Return the undefended run, then each entry's runs: one per combination of swept values. Seeds are set later."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("`runs` must be a list of option sets")
    found = {UNDEFENDED: Run(UNDEFENDED, {"defense": UNDEFENDED})}
    for entry in entries:
        options = dict(entry) if "adapter" in entry else {"defense": recipe.get("defense", UNDEFENDED), **entry}
        given, adapter = options.pop("name", None), options.pop("adapter", None)
        _check_names(options, [name for name in known if name not in OWN_OPTIONS], "option of `runs`", text)
        if adapter is not None and options:
            raise ValueError(f"the run of adapter {adapter!r} is trained already: leave out {', '.join(options)}")
        for chosen in _unfold(options, lists):
            name = _name(given, chosen, options, adapter)
            if chosen.get("defense") == UNDEFENDED and len(chosen) == 1 and given is None:
                continue  # `found` has the undefended run already
            if BASELINE_NAMES.match(name) or name.endswith(RANDOM):
                raise ValueError(f"a run named {name!r} would be mistaken for a baseline: give it another `name`")
            if name in found:
                raise ValueError(f"two runs are named {name!r}: give one of them a `name`")
            if adapter is None:
                _check_owners(name, chosen)
            found[name] = Run(name, chosen, adapter=None if adapter is None else str(adapter))
    return list(found.values())


def _check_owners(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an option that is read only by defenses that the run does not name.

    Such an option, unlike the recipe's, can only be a mistake: it changes nothing, and the report would show it as the
    run's coefficient.
    """
    others = options_of_others(parse_defense(options["defense"]))
    for option in (option for option in options if option in others):
        raise ValueError(
            f"the run {name!r}: {option}={options[option]!r} is an option of {', '.join(others[option])}, and the "
            f"run has defense={options['defense']!r}: leave it out, or name its defense"
        )


def _with_random_vectors(runs: list[Run]) -> list[Run]:
    """Return the runs, each steering run followed by the same run with a random vector."""
    found = []
    for run in runs:
        found.append(run)
        if run.adapter is None and "steering" in parse_defense(run.defense):
            found.append(replace(run, name=run.name + RANDOM, is_random=True))
    if len(found) == len(runs):
        raise ValueError("the baseline random_vector stands beside steering runs, and no run has that defense")
    return found


def _has_benign_task(value: Any, runs: list[Run], recipe: Mapping[str, Any]) -> bool:
    """Check the value of `benign_task`, and return True if runs are also trained on the benign task.

    This second training of a run has the benign task's rows instead of the recipe's.

    Raises:
        ValueError: the value is unknown, or an option asks for other training rows (`OTHER_ROWS`).
    """
    if value is None:
        return False
    if value != OPERATORS:
        raise ValueError(
            f"benign_task={value!r} is unknown.{did_you_mean(str(value), [OPERATORS])} Known: {OPERATORS}"
        )
    for name in OTHER_ROWS:
        if any({**recipe, **run.options}.get(name) is not None for run in runs):
            raise ValueError(f"benign_task trains on rows of its own, and `{name}` would ask for others: leave it out")
    return True


def _unfold(options: Mapping[str, Any], lists: Collection[str]) -> list[dict[str, Any]]:
    """Return one option set for each combination of the values that `options` sweeps over.

    For an option that takes one value, a list is a sweep. For an option that takes several values, a list of lists is
    a sweep.
    """
    values = []
    for name, value in options.items():
        is_sweep = isinstance(value, list) and (name not in lists or all(isinstance(v, list) for v in value))
        if is_sweep and not value:
            raise ValueError(f"`{name}` sweeps over no value")
        values.append(value if is_sweep else [value])
    return [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*values)]


def _name(given: Any, chosen: Mapping[str, Any], options: Mapping[str, Any], adapter: Any) -> str:
    """Return a run's name: the given name, the adapter's folder or the defense, followed by `option=value` parts.

    An option other than `defense` gets such a part if the file gives it a list. Without a given name, an option whose
    value is a number gets a part as well.
    """
    start = given if given is not None else Path(str(adapter)).name if adapter else chosen.get("defense", UNDEFENDED)
    rest = [
        f"{name}={_short(value)}"
        for name, value in chosen.items()
        if name != "defense" and (isinstance(options[name], list) or (given is None and _is_number(value)))
    ]
    return " ".join([str(start), *rest])


def _is_number(value: Any) -> bool:
    """Return True for a number, for a text that is one (YAML reads `1e-5` as text), and for a coefficient schedule."""
    try:
        return Schedule.parse(str(value)) is not None or math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 else f"{text[:20]}…{hashlib.sha256(text.encode()).hexdigest()[:4]}"


def _baselines(entries: Any) -> Baselines:
    if not isinstance(entries, list):
        raise ValueError("`baselines` must be a list")
    found: dict[str, Any] = {}
    for entry in entries:
        name, values = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, None)
        # Only a known name is accepted, and only the baseline alpha takes values (`alpha: [0.5, 0.75]`).
        if name not in BASELINES or (values is not None and name != "alpha"):
            raise ValueError(
                f"baseline {entry!r} is unknown.{did_you_mean(str(name), BASELINES)} Known: {', '.join(BASELINES)}"
            )
        if name == "alpha":
            alphas = ALPHAS if values is None else tuple(values) if isinstance(values, list) else (values,)
            if not all(isinstance(alpha, int | float) and 0 < alpha < 1 for alpha in alphas):
                raise ValueError(f"alpha={values!r} must be numbers between 0 and 1")
            found["alphas"] = tuple(dict.fromkeys((*found.get("alphas", ()), *alphas)))
        else:
            found[name] = True
    return Baselines(**found)


def _check_names(names: Mapping[str, Any], known: Collection[str], kind: str, text: str) -> None:
    for name in (name for name in names if name not in known):
        lines = [i for i, row in enumerate(text.splitlines(), 1) if re.search(rf"\b{re.escape(str(name))}\s*:", row)]
        where = f"{kind} {name!r}" + (f" in line {lines[0]}" if lines else "")
        if kind != "key" and name in OWN_OPTIONS:
            seeds = " List seeds under `seeds`" if name == "seed" else ""
            raise ValueError(f"{where}: the comparison sets it itself, or the recipe does: leave it out.{seeds}")
        # YAML reads `{defense: kl, ldifs}` as two options: `defense` with the value `kl`, and `ldifs` with `None`.
        cut = " In braces, a value with a comma needs quotes" if names[name] is None else ""
        raise ValueError(f"unknown {where}.{did_you_mean(str(name), known)}{cut}")


def _key(run: Run, text: str, recipe: Mapping[str, Any], output_dir: Path) -> str:
    """Return a hash of the recipe, the run, the package's version, and every file or folder that the run reads."""
    others = options_of_others(parse_defense(run.defense))
    read = {name: value for name, value in {**recipe, **run.options}.items() if name not in others}
    everything = json.dumps([__version__, text, asdict(run), contents(read, output_dir)], sort_keys=True, default=str)
    return hashlib.sha256(everything.encode()).hexdigest()
