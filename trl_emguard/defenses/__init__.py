"""Defenses: their base classes, one file per method, and the list of names that `defense=` accepts."""

from .arguments import DefenseArguments
from .base import Defense, ModelDefense, Paper, ReferenceDefense, TermDefense
from .inoculation import Inoculation
from .inoculation_adapter import InoculationAdapter
from .interleaving import Interleaving, InterleavingPlus, InterleavingPlusPlus
from .kl import KL
from .ldifs import LDIFS
from .registry import DEFENSES, build_defenses, parse_defense, register
from .steering import Steering
from .step import Marks, Step
from .treft import TReFT


__all__ = [
    "DEFENSES",
    "KL",
    "LDIFS",
    "Defense",
    "DefenseArguments",
    "Inoculation",
    "InoculationAdapter",
    "Interleaving",
    "InterleavingPlus",
    "InterleavingPlusPlus",
    "Marks",
    "ModelDefense",
    "Paper",
    "ReferenceDefense",
    "Steering",
    "Step",
    "TReFT",
    "TermDefense",
    "build_defenses",
    "parse_defense",
    "register",
]
