"""TrlParser, made strict: a mistyped option must never train an undefended model.

TrlParser alone accepts abbreviations such as `--defens kl`. It also accepts any value in a YAML file: `defense: no`
becomes False, `defense:` becomes None, and `choices` are not checked. Before an error it prints two hundred options.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, get_args, get_type_hints

from trl import TrlParser

from ..defenses.registry import DEFENSES
from ..defenses.schedule import Coefficient
from ..io.lookup import did_you_mean
from ..io.strict import parse_yaml
from .options import PrintAllOptions
from .recipes import find_recipe


# Options that a YAML file cannot set.
COMMAND_LINE_ONLY = ("help", "help_all", "config")


# Unknown key that a YAML file may have because it was written for another version of TRL or transformers, for axolotl
# or for LLaMA-Factory → advice that the error message gives.
OTHER_NAMES = {
    "torch_dtype": "it is named `dtype` now",
    "max_seq_length": "it is named `max_length` now",
    "sequence_len": "it is named `max_length` here",
    "cutoff_len": "it is named `max_length` here",
    "warmup_ratio": "it is `warmup_steps` now, where a number below 1 is a share of the steps",
    "group_by_length": "it is `train_sampling_strategy: group_by_length` now",
    "evaluation_strategy": "it is named `eval_strategy` now",
    "overwrite_output_dir": "it is gone: a run writes into its output_dir, and resumes only where you say so",
    "logging_dir": "it is gone: set the environment variable TENSORBOARD_LOGGING_DIR",
    "dataset_mixture": "it is named `datasets` now",
    "no_cuda": "it is named `use_cpu` now",
    "tokenizer": "the tokenizer is the model's own",
    "base_model": "it is named `model_name_or_path` here",
    "micro_batch_size": "it is named `per_device_train_batch_size` here",
    "num_epochs": "it is named `num_train_epochs` here",
    "optimizer": "it is named `optim` here",
    "lr_scheduler": "it is named `lr_scheduler_type` here",
    "adapter": "it is `use_peft: true` here",
    "lora_target": "it is named `lora_target_modules` here",
    "sample_packing": "it is named `packing` here",
    "val_set_size": "name evaluation rows by `dataset_test_split` and set `eval_strategy`",
}


# Options whose type is text, and for which a YAML file may also give a list or a number.
NOT_TEXT_ALONE = ("ldifs_layers", "steering_layers", "fsdp")
# Text option that users of other tools may give a list or a mapping → hint on the right text, for the error message.
FORMS = {
    "dataset_name": "one file or name; `datasets` takes several, each file as `path: json` and `data_files: FILE`",
    "defense": "several are written as interleave++,kl",
    "interleave_where": "COLUMN=VALUE",
}


# Old name of an option → new name. If both are given, transformers silently ignores the value under the old name.
OLD_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class StrictParser(TrlParser):
    """[`~trl.TrlParser`] that refuses unknown options and YAML keys, and suggests the nearest known name.

    Every error is one line on stderr and exit code 2, before a model, a dataset or a device is touched.

    Args:
        dataclass_types: dataclasses whose fields are the options.
        prog: name of the command, for messages.
        short_help: function that gets the parser and returns the text of `--help`. Without it, `--help` prints what
            `--help_all` prints.

    Attributes:
        hints: name of an option → its type.
    """

    def __init__(
        self,
        dataclass_types: Any,
        prog: str | None = None,
        short_help: Callable[["StrictParser"], str] | None = None,
    ):
        super().__init__(dataclass_types, prog=prog, allow_abbrev=False)
        self._short_help = short_help
        # `_take_config` removes this option before this parser sees it. It is added here only for the help.
        self.add_argument(
            "--config",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="YAML file of options, or the path of a shipped recipe. The command line wins over it.",
        )
        self.add_argument(
            "--help_all",
            "--help-all",
            action=PrintAllOptions,
            help="show every option of TRL and transformers and exit",
        )
        self.hints = {name: hint for cls in self.dataclass_types for name, hint in get_type_hints(cls).items()}

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self) -> str:
        return self._short_help(self) if self._short_help else self.format_all_options()

    def format_all_options(self) -> str:
        """Return the help of every option."""
        return super().format_help()

    def parse(self, argv: list[str] | None = None) -> tuple:
        """Parse options into one object per dataclass. The command line overrides `--config FILE` (YAML)."""
        argv, config = self._take_config(sys.argv[1:] if argv is None else list(argv))
        if config is not None:
            self._check_config(config)
            config.pop("env", None)
            self.set_defaults_with_config(**config)
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._unexpected(unknown[0], str(parsed.defense)))
        self._check_old_names(vars(parsed), self._given(argv) | (config or {}).keys())
        times = [word.partition("=")[0] for word in argv].count("--defense")
        if times > 1:
            self.error(f"--defense is given {times} times: give it once. Several are written as interleave++,kl.")
        try:
            return self.parse_args_into_dataclasses(argv)
        except (ValueError, TypeError, OSError) as error:
            self.error(str(error))

    def _given(self, argv: list[str]) -> set[str]:
        """Return the names of the options on a command line."""
        words = {word.split("=", maxsplit=1)[0] for word in argv}
        return {action.dest for action in self._actions if words & set(action.option_strings)}

    def _check_old_names(self, values: dict[str, Any], given: set[str]) -> None:
        for old, new in OLD_NAMES.items():
            if {old, new} <= given and values[old] != values[new]:
                self.error(
                    f"{old}={values[old]!r} would be ignored beside {new}={values[new]!r}, its name now: give "
                    f"--{new} alone, which wins over the config file's."
                )

    def _take_config(self, argv: list[str]) -> tuple[list[str], dict[str, Any] | None]:
        finder = argparse.ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        finder.add_argument("--config", action="append", default=[])
        finder.error = self.error  # type: ignore[method-assign]
        found, rest = finder.parse_known_args(argv)
        if not found.config:
            return rest, None
        if len(found.config) > 1:
            self.error(f"--config is given {len(found.config)} times: they are not merged, so give it once.")
        name = found.config[0]
        try:
            config = parse_yaml(find_recipe(name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            self.error(str(error))
        except (OSError, ValueError) as error:
            self.error(f"config {name!r} cannot be read: {error}")
        if not isinstance(config, dict):
            self.error(f"config {name!r} must hold `key: value` lines.")
        return rest, config

    def _check_config(self, config: dict[str, Any]) -> None:
        actions = {action.dest: action for action in reversed(self._actions)}
        for name in COMMAND_LINE_ONLY:
            del actions[name]
        unknown = [str(key) for key in config if key != "env" and key not in actions]
        if unknown:
            # All wrong keys are named at once, because a recipe of another tool or version has several.
            self.error(" ".join(self._unknown_key(key, actions) for key in unknown))
        for key, value in config.items():
            if key == "env":
                self._set_environment(value)
            else:
                self._check_config_value(key, value, actions[key])
                config[key] = self._as_given(key, value, actions[key])

    def _as_given(self, key: str, value: Any, action: argparse.Action) -> Any:
        """Return a YAML value in the parser's form: text for a text option, a list if the option takes several."""
        if self._is_text(key, action) and value is not None and not isinstance(value, bool):
            return str(value)
        if action.nargs not in ("+", "*") or value is None or isinstance(value, list):
            return value
        if isinstance(value, dict):
            return [value]
        try:
            return [self._get_value(action, str(value))]
        except argparse.ArgumentError as error:
            self.error(f"config: {error}")

    def _is_text(self, key: str, action: argparse.Action) -> bool:
        types = _types(self.hints[key])
        return types <= {str, type(None)} and action.nargs not in ("+", "*") and key not in NOT_TEXT_ALONE

    def _unknown_key(self, key: str, known: Iterable[str]) -> str:
        if key in OTHER_NAMES:
            return f"unknown key in the config file {key!r}: {OTHER_NAMES[key]}."
        return self._unknown(key, known, "key in the config file")

    def _check_config_value(self, key: str, value: Any, action: argparse.Action) -> None:
        types = _types(self.hints[key])
        if value is None:
            if type(None) not in types:
                self.error(
                    f"config: `{key}:` is empty. Give it a value (the default is {action.default!r}), or leave it out."
                )
            return
        if bool in types:
            if not isinstance(value, bool):
                self.error(f"config: {key}={value!r} must be true or false.")
            return
        number = float in types or types <= {int, type(None)}
        if isinstance(value, bool) and (number or action.choices is not None or action.default is not None):
            self.error(
                f"config: `{key}: {str(value).lower()}` is not a value for {key} (YAML reads yes, no, on and off as "
                "true and false): put it in quotes, or give another."
            )
        # YAML reads 1e-4 as text, so this check accepts text in place of a number. argparse converts the text later,
        # like a value on the command line.
        if number and not isinstance(value, (str, int, *types)):
            self.error(f"config: {key}={value!r} must be a {'number' if float in types else 'whole number'}.")
        if isinstance(value, list | dict) and action.choices is None and self._is_text(key, action):
            form = f" ({FORMS[key]})" if key in FORMS else ""
            self.error(f"config: {key}={value!r} must be text{form}.")
        if action.choices is not None:
            choices = _texts(action.choices)
            if str(value) not in choices:
                self.error(
                    f"config: {self._unknown(str(value), choices, f'value of {key}')} Known: {', '.join(choices)}."
                )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse's own message lists the choices, but does not suggest the nearest one.
        if action.choices is not None and value not in action.choices:
            choices = _texts(action.choices)
            text = f"{self._unknown(str(value), choices, 'value')} Known: {', '.join(choices)}."
            raise argparse.ArgumentError(action, text)

    def _set_environment(self, variables: Any) -> None:
        if not isinstance(variables, dict):
            self.error("config: `env:` must hold `NAME: value` lines.")
        try:
            os.environ.update({name: str(value) for name, value in variables.items()})
        except (ValueError, TypeError, OSError) as error:
            self.error(f"config: `env:` holds a name or value that no environment variable can have ({error}).")

    def _option_strings(self) -> list[str]:
        return [string for action in self._actions for string in action.option_strings]

    def _unexpected(self, word: str, defense: str) -> str:
        """Return the message on a word of the command line that no option takes, with the parsed value of `--defense`.

        A word that is a defense must not lead to an option of the same beginning: the run would lack the defense.
        """
        if word.startswith("-"):
            return self._unknown(word, self._option_strings(), "option")
        if word in DEFENSES:
            given = [name for name in defense.split(",") if name in DEFENSES and name != word]
            return f"unexpected word {word!r}: several defenses are one word: --defense {','.join([*given, word])}."
        if word.endswith((".yaml", ".yml")):
            return f"unexpected word {word!r}: give it by --config {word}."
        near = did_you_mean(word.partition("=")[0], self._option_strings(), cutoff=0.7)
        return f"unexpected word {word!r}: it follows an option that takes one value, or lacks its option.{near}"

    @staticmethod
    def _unknown(name: str, known: Iterable[str], kind: str) -> str:
        name = name.split("=", maxsplit=1)[0] if name.startswith("-") else name
        return f"unknown {kind} {name!r}.{did_you_mean(name, known, cutoff=0.5)}"


def _texts(choices: Iterable[Any]) -> list[str]:
    return [str(getattr(choice, "value", choice)) for choice in choices]


def _types(hint: Any) -> set[Any]:
    """Return the types that an option's type consists of; `float` is one of them for a coefficient."""
    types = set(get_args(hint)) or {hint}
    return types | {float} if Coefficient in types else types
