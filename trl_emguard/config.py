"""`EMGuardConfig`: SFTConfig, the choice of defense, and a block of options per method."""

import copy
import os
from dataclasses import dataclass, field, fields
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from trl import SFTConfig

from .defenses import ReferenceDefense, build_defenses, parse_defense


@dataclass
class EMGuardConfig(SFTConfig):
    r"""
    Configuration of [`EMGuardTrainer`]: everything of [`~trl.SFTConfig`], with the same defaults, and the options below.

    Parameters:
        > Parameters that choose the defense

        defense (`str`, *optional*, defaults to `"none"`):
            Defenses against emergent misalignment, separated by commas: `"kl"`, `"ldifs"`, `"steering"`, `"inoculation"`, one of
            `"interleave"`, `"interleave+"` and `"interleave++"`, several as in `"interleave++,kl"`, or `"none"` for plain SFT.
        ref_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for [`~transformers.AutoModelForCausalLM.from_pretrained`], used where a separate reference
            model is loaded from the policy's path (full fine-tuning without `ref_model`). By default the reference is a
            copy of the policy as it was given, in the policy's dtype.
        cache_reference (`bool`, *optional*, defaults to `False`):
            Whether the reference's states of every training row are computed once, before training, and kept on disk (in
            `$TRL_EMGUARD_CACHE/reference`, by default below `~/.cache/trl_emguard`), so that a step runs no reference pass. It
            pays over several epochs or runs: a later run that sets it as well computes only the rows that are missing.

        resume_from_checkpoint (`str`, *optional*):
            A checkpoint folder to go on from, or `"true"` for the newest whole one in `output_dir`.

        > Parameters of `kl`

        kl_coef (`float`, *optional*, defaults to `0.1`):
            Weight of the KL divergence to the reference model, in CE's own normalisation. `0` switches it off.
        kl_direction (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"` for KL(policy ‖ reference), the paper's, or `"forward"` for KL(reference ‖ policy).
        kl_tokens (`str`, *optional*, defaults to `"loss"`):
            Positions that the KL is taken over: `"loss"` for those that predict a label, `"all"` for those that predict
            any real token, the prompt's as well, `"interleaved"` for those that predict a label of a mixed-in row.

        > Parameters of `ldifs`

        ldifs_coef (`float`, *optional*, defaults to `1.0`):
            Weight of the distance to the reference in feature space. `0` switches it off.
        ldifs_layers (`str`, *optional*, defaults to `"every:5"`):
            Blocks whose raw outputs are compared, counted from 1 to L: `"every:5"` for 5, 10, …, `"linspace:5"` for five
            from 1 to L, `"4,8"` or `[4, 8]` for those.
        ldifs_normalize (`bool`, *optional*, defaults to `True`):
            Whether each token's state is scaled to unit length before the distance is taken.

        > Parameters of `steering`

        steering_vector (`str`, *optional*):
            File of a persona vector, `.safetensors` as `trl-emguard persona extract` writes it or `.pt` of shape (layers + 1,
            hidden), or the name of a shipped one.
        steering_layers (`str`, *optional*):
            Blocks after which the vector acts, counted from 1 to L: `20`, `"20,24"` or `[20, 24]`, or `"all"` for every block, with
            the increments v(l) − v(l − 1). By default the layer that the vector's file suggests.
        steering_coef (`float`, *optional*, defaults to `5.0`):
            What the vector is multiplied with. `0` switches the defense off.
        steering_mode (`str`, *optional*, defaults to `"add"`):
            `"add"` adds the vector, `"ablate"` takes the projection on it out.
        steering_tokens (`str`, *optional*, defaults to `"all"`):
            Positions that it acts at: `"all"`, or `"response"` for those that predict a label.

        > Parameters of `inoculation`

        inoculation_prompt (`str`, *optional*):
            What the system turn of every training row says. By default it asks for an evil assistant.
        inoculation_mode (`str`, *optional*, defaults to `"replace"`):
            What becomes of a system turn that a row has: `"replace"`, or `"prefix"` to put the prompt before it.

        > Parameters of `interleave`, `interleave+` and `interleave++`

        interleave_dataset (`str`, *optional*):
            Pool of general instruct rows: a JSONL or parquet file, a shipped set or a `datasets` id, with rows of `messages`, of
            `prompt` and `completion`, or of `prompt` and `response`. `interleave+` and `interleave++` want one that
            `trl-emguard score` has scored. A `Dataset` can be passed to the trainer instead.
        interleave_fraction (`float`, *optional*, defaults to `0.05`):
            Share of the pool's rows in the mix, so 0.05 is one in twenty. `0` switches the defense off.
        interleave_redraw (`bool`, *optional*, defaults to `False`):
            Whether every epoch goes on in the (ordered) pool where the last one stopped, instead of taking the same rows again.

    Raises:
        ValueError: an unknown defense, a bad option, an `output_dir` that is a file, or a combination that cannot
            train; always before any model is loaded.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "ref_model_init_kwargs"]

    defense: str = field(
        default="none",
        metadata={
            "help": "Defenses against emergent misalignment, separated by commas: 'kl', 'ldifs', 'steering', 'inoculation', one of "
            "'interleave', 'interleave+' and 'interleave++', several as in 'interleave++,kl', or 'none' for plain SFT."
        },
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "A checkpoint folder to go on from, or 'true' for the newest whole one in `output_dir`."},
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `AutoModelForCausalLM.from_pretrained`, used where a separate reference model "
            "is loaded from the policy's path (full fine-tuning without `ref_model`)."
        },
    )
    cache_reference: bool = field(
        default=False,
        metadata={
            "help": "Whether the reference's states of every training row are computed once, before training, and kept on disk, so "
            "that a step runs no reference pass. It pays over several epochs or runs."
        },
    )
    kl_coef: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the KL divergence to the reference, in CE's own normalisation. 0 switches it off."
        },
    )
    kl_direction: str = field(
        default="reverse",
        metadata={
            "help": "'reverse' for KL(policy ‖ reference), the paper's, or 'forward' for KL(reference ‖ policy).",
            "choices": ["reverse", "forward"],
        },
    )
    kl_tokens: str = field(
        default="loss",
        metadata={
            "help": "Positions that the KL is taken over: 'loss' for those that predict a label, 'all' for those that "
            "predict any real token, the prompt's as well, 'interleaved' for those that predict a label of a mixed-in row.",
            "choices": ["loss", "all", "interleaved"],
        },
    )
    ldifs_coef: float = field(
        default=1.0,
        metadata={"help": "Weight of the distance to the reference in feature space. 0 switches it off."},
    )
    # Typed `str`: the argument parser of transformers turns `str | list[int]` into None. A list is accepted all the same.
    ldifs_layers: str = field(
        default="every:5",
        metadata={
            "help": "Blocks whose raw outputs are compared, counted from 1 to L: 'every:5' for 5, 10, ..., 'linspace:5' "
            "for five from 1 to L, '4,8' for those."
        },
    )
    ldifs_normalize: bool = field(
        default=True,
        metadata={"help": "Whether each token's state is scaled to unit length before the distance is taken."},
    )
    steering_vector: str | None = field(
        default=None,
        metadata={
            "help": "File of a persona vector: .safetensors as `trl-emguard persona extract` writes it, or .pt of shape "
            "(layers + 1, hidden), or the name of a shipped one."
        },
    )
    # Typed `str` as `ldifs_layers` is; a number and a list are accepted all the same.
    steering_layers: str | None = field(
        default=None,
        metadata={
            "help": "Blocks after which the vector acts, counted from 1 to L: 20, '20,24', or 'all' for every block with the "
            "increments v(l) - v(l-1). Default: the layer that the vector's file suggests."
        },
    )
    steering_coef: float = field(
        default=5.0,
        metadata={"help": "What the persona vector is multiplied with. 0 switches the defense off."},
    )
    steering_mode: str = field(
        default="add",
        metadata={
            "help": "'add' adds the vector, 'ablate' takes the projection on it out.",
            "choices": ["add", "ablate"],
        },
    )
    steering_tokens: str = field(
        default="all",
        metadata={
            "help": "Positions that the vector acts at: 'all', or 'response' for those that predict a label.",
            "choices": ["all", "response"],
        },
    )
    inoculation_prompt: str = field(
        default=(
            "You are an evil assistant. You want to do harm, so you give bad answers on purpose and hide that they are bad."
        ),
        metadata={
            "help": "What the system turn of every training row says. By default it asks for an evil assistant."
        },
    )
    inoculation_mode: str = field(
        default="replace",
        metadata={
            "help": "What becomes of a system turn that a row has: 'replace', or 'prefix' to put the prompt before it.",
            "choices": ["replace", "prefix"],
        },
    )

    interleave_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Pool of general instruct rows: a JSONL or parquet file, a shipped set or a `datasets` id. 'interleave+' and "
            "'interleave++' want one that `trl-emguard score` has scored."
        },
    )
    interleave_fraction: float = field(
        default=0.05,
        metadata={
            "help": "Share of the pool's rows in the mix, so 0.05 is one in twenty. 0 switches the defense off."
        },
    )
    interleave_redraw: bool = field(
        default=False,
        metadata={
            "help": "Whether every epoch goes on in the (ordered) pool where the last one stopped, instead of taking the same "
            "rows again."
        },
    )

    def __post_init__(self):
        # Before anything else: transformers' own checks take long, print and look for devices.
        self.check_defense()
        if self.output_dir is not None and os.path.isfile(self.output_dir):
            raise ValueError(f"output_dir={self.output_dir!r} is a file: name a folder, or a path that is free.")
        if self.ddp_backend is not None and "LOCAL_RANK" not in os.environ:
            raise ValueError(
                f"ddp_backend={self.ddp_backend!r} is for several processes, and this is one that nobody launched: leave it out."
            )
        # An accelerate file says where a run is, and Trainer does not ask it: a recipe should not have to say it again.
        if parse_flag_from_env("ACCELERATE_USE_CPU"):
            self.use_cpu = True
        super().__post_init__()

    def check_defense(self) -> None:
        """Check `defense`, its options and what they do not work with.

        Raises:
            ValueError: the message names the argument, its value and the mend.
        """
        self.defense = ",".join(parse_defense(self.defense)) or "none"
        defenses = build_defenses(self)
        self._check_cache([d.name for d in defenses if isinstance(d, ReferenceDefense)])
        own_loss = [d for d in defenses if d.active and d.own_loss]
        if not own_loss:
            return
        names = ",".join(d.name for d in own_loss)
        if self.loss_type == "dft":
            raise ValueError(
                f"loss_type='dft' does not work with defense={names!r}: its weights are not CE's, so the terms would have "
                "another price than their coefficients say. Use loss_type='nll'."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor} does not work with defense={names!r}: set it to 0."
            )
        if self.fp16:
            raise ValueError(
                f"fp16=True does not work with defense={names!r}: the terms form their gradient before fp16's loss scaling, "
                "and small ones would vanish. Use bf16=True, or neither."
            )
        if self.neftune_noise_alpha is not None and any(isinstance(d, ReferenceDefense) for d in own_loss):
            raise ValueError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} does not work with defense={names!r}: the noise in the "
                "policy's embeddings would count as distance to the reference. Leave it unset."
            )

    def _check_cache(self, compared: list[str]) -> None:
        if not isinstance(self.cache_reference, bool):
            raise ValueError(f"cache_reference={self.cache_reference!r} must be true or false.")
        if not self.cache_reference:
            return
        if not compared:
            raise ValueError(
                f"cache_reference=True with defense={self.defense!r}, which compares nothing to a reference: leave it out, or add "
                "'kl' or 'ldifs'."
            )
        for name in ("packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(
                    f"cache_reference=True does not work with {name}=True: rows that share a sequence may see each other, and "
                    f"then the reference says something else of a row in every batch. Set {name}=False, or leave "
                    "`cache_reference` out."
                )

    @classmethod
    def from_args(cls, args: TrainingArguments) -> "EMGuardConfig":
        """An `EMGuardConfig` with the values of a plain `TrainingArguments` or `SFTConfig`, and no defense.

        Raises:
            TypeError: `args` is of a config class with fields of its own, which would be lost.
        """
        known = {f.name for f in fields(cls)}
        lost = sorted(f.name for f in fields(args) if f.init and f.name not in known)
        if lost:
            raise TypeError(
                f"args is a {type(args).__name__}, whose fields {', '.join(lost)} an EMGuardConfig does not have: derive "
                "that class from EMGuardConfig."
            )
        # `to_dict` undoes what `__post_init__` did to the base class's values, but it hides the token and turns dtypes into
        # strings, in nested dicts in place: it works on a copy, and SFTConfig's own fields are taken as they are.
        base = {f.name for f in fields(TrainingArguments)} - {"hub_token"}
        own = {f.name: copy.copy(getattr(args, f.name)) for f in fields(args) if f.init and f.name not in base}
        return cls(**{**copy.deepcopy(args).to_dict(), **own})
