"""`EMGuardConfig`: SFTConfig, the choice of defense, and the options of every defense."""

import copy
import os
from dataclasses import dataclass, fields
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from trl import SFTConfig

from .checks import check_arguments
from .defenses import DefenseArguments
from .defenses.options import document, option
from .defenses.registry import parse_defense


@dataclass
class ReferenceOptions:
    """Options of the reference (the safe model that some defenses compare the policy with), and of resuming."""

    resume_from_checkpoint: str | None = option(
        None,
        "A checkpoint folder to resume from, or 'true' for the newest whole one in `output_dir`. In Python it is for "
        "the first `train()` without an argument.",
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = option(
        None,
        "Keyword arguments for `from_pretrained` of a reference that is loaded from the policy's path (full "
        "fine-tuning without `ref_model`). By default the reference is a copy of the policy as it was given.",
    )
    cache_reference: bool = option(
        False,
        "Whether the reference's states of all training rows are computed once and kept on disk, below "
        "`$TRL_EMGUARD_CACHE` or `~/.cache/trl_emguard`. It pays over several epochs or runs.",
    )


@dataclass
class EMGuardConfig(ReferenceOptions, DefenseArguments, SFTConfig):
    """Configuration of [`EMGuardTrainer`]: SFTConfig with the same defaults, and the options of the defenses.

    Raises:
        ValueError: an unknown defense, a bad option, an `output_dir` that is a file, or a combination that cannot
            train; always before any model is loaded.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "ref_model_init_kwargs"]

    def __post_init__(self):
        # A mistyped defense is reported first, since transformers' own checks take long, print, and look for devices.
        parse_defense(self.defense)
        if self.output_dir is not None and os.path.isfile(self.output_dir):
            raise ValueError(f"output_dir={self.output_dir!r} is a file: name a folder, or a path that is free.")
        if self.ddp_backend is not None and "LOCAL_RANK" not in os.environ:
            raise ValueError(
                f"ddp_backend={self.ddp_backend!r} is for several processes, and this is one that nobody launched: "
                "leave it out."
            )
        # Text is true in Python, and a command line turns off by "false" what a YAML file turns on.
        if str(self.resume_from_checkpoint).lower() == "false":
            self.resume_from_checkpoint = None
        # `accelerate launch` passes `use_cpu` of accelerate's config file on as ACCELERATE_USE_CPU. TrainingArguments
        # leaves its own `use_cpu` as it is. This code sets it, and a run's YAML file need not repeat the option.
        if parse_flag_from_env("ACCELERATE_USE_CPU"):
            self.use_cpu = True
        # By default TRL turns checkpointing on under its old name, and transformers warns of that name.
        if self.activation_checkpointing is None and self.gradient_checkpointing:  # type: ignore[has-type]
            self.activation_checkpointing = True
        super().__post_init__()
        self.check_defense()

    def check_defense(self):
        active = super().check_defense()
        check_arguments(self, active)
        return active

    @classmethod
    def from_args(cls, args: TrainingArguments) -> "EMGuardConfig":
        """Return an `EMGuardConfig` with the values of a plain `TrainingArguments` or `SFTConfig`, and no defense.

        Raises:
            TypeError: `args` is of a config class with fields of its own, which would be lost.
        """
        known = {f.name for f in fields(cls)}
        lost = sorted(f.name for f in fields(args) if f.init and f.name not in known)
        if lost:
            raise TypeError(
                f"args is a {type(args).__name__}, whose fields {', '.join(lost)} an EMGuardConfig does not have: "
                "derive that class from EMGuardConfig."
            )
        # `to_dict` gives the fields of TrainingArguments as a user passes them: text and dicts for the enums and
        # classes that `__post_init__` made. It runs on a deep copy of `args`, because it overwrites dtypes inside
        # nested dicts. The hub token, the parallelism config and the fields that subclasses add are copied from `args`
        # instead, because `to_dict` would replace every token (also `eos_token`) by a placeholder, dtypes by text, and
        # a parallelism config by `None`.
        base = {f.name for f in fields(TrainingArguments)} - {"hub_token", "parallelism_config"}
        own = {f.name: copy.copy(getattr(args, f.name)) for f in fields(args) if f.init and f.name not in base}
        return cls(**{**copy.deepcopy(args).to_dict(), **own})


document(EMGuardConfig, SFTConfig)
