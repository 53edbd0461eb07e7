"""Options of all shipped defenses as one dataclass, for configs of any TRL trainer."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .base import Defense
from .inoculation import InoculationOptions
from .inoculation_adapter import InoculationAdapterOptions
from .interleaving.defense import InterleavingOptions
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
    """Choice of defenses, with the options of every method. Mix it into a TRL config, before the config's class."""

    defense: str = option(
        "none",
        "Defenses, separated by commas: 'kl', 'ldifs', 'treft', 'steering', 'inoculation', 'inoculation_adapter', one "
        "of 'interleave', 'interleave+' and 'interleave++'; or 'none' for plain training.",
    )

    def check_defense(self) -> Sequence[type[Defense]]:
        """Check `defense`, its options and how the defenses go together; return the active ones.

        Raises:
            ValueError: the message names the argument, its value and the fix.
        """
        # A sweep may hand over numpy's numbers, which JSON does not know.
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
