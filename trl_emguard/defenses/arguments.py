"""Options of all shipped defenses as one dataclass, for configs of any TRL trainer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import Defense
from .inoculation import InoculationOptions
from .inoculation_adapter import InoculationAdapterOptions
from .interleaving.options import InterleavingOptions
from .kl import KLOptions
from .ldifs import LDIFSOptions
from .options import option
from .registry import DEFENSES, parse_defense
from .steering import SteeringOptions
from .treft import TReFTOptions


@dataclass
class DefenseArguments(
    InterleavingOptions,
    InoculationAdapterOptions,
    InoculationOptions,
    SteeringOptions,
    TReFTOptions,
    LDIFSOptions,
    KLOptions,
):
    """Option `defense`, which names the defenses of a run, together with the options of all shipped defenses.

    Mix this class into a TRL config, before the config's class: `class MyConfig(DefenseArguments, DPOConfig)`.
    """

    defense: str = option(
        "none",
        "Defenses, separated by commas: 'kl', 'ldifs', 'treft', 'steering', 'inoculation', 'inoculation_adapter', one "
        "of 'interleave', 'interleave+' and 'interleave++'; or 'none' for plain training.",
    )

    def check_defense(self) -> Sequence[type[Defense]]:
        """Check `defense`, the options of the named defenses, and their combination. Return the active defenses.

        Raises:
            ValueError: an argument is bad. The message names the argument, its value and the fix.
            FileNotFoundError: an option names a file or folder that does not exist.
        """
        # A hyperparameter sweep may set options to numpy numbers. They become Python numbers here, because options are
        # recorded as JSON (`defense.json`), and Python's `json` refuses most types of numpy numbers.
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                setattr(self, name, value.item())
        names = parse_defense(self.defense)
        self.defense = ",".join(names) or "none"
        named = [DEFENSES[name] for name in names]
        for defense in named:
            defense.check_options(self)
        active = [defense for defense in named if defense.is_on(self)]
        for defense in active:
            defense.check_with(self, [other for other in active if other is not defense])
        return active
