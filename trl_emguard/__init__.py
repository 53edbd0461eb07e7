"""In-training defenses against emergent misalignment for TRL's SFTTrainer."""

from importlib import import_module
from typing import TYPE_CHECKING

from .compat import check_environment
from .version import __version__


if TYPE_CHECKING:
    from .config import EMGuardConfig
    from .defenses import Defense, ReferenceDefense, register
    from .evaluation.drift import DriftCallback
    from .evidence import InactiveDefenseError
    from .models.ema import EMACallback
    from .trainer import (
        EMGuardTrainer,
        InoculationTrainer,
        InterleavingTrainer,
        KLTrainer,
        LDIFSTrainer,
        SteeringTrainer,
    )

_ROOMS = {
    "EMGuardConfig": "config",
    "EMGuardTrainer": "trainer",
    "KLTrainer": "trainer",
    "LDIFSTrainer": "trainer",
    "SteeringTrainer": "trainer",
    "InoculationTrainer": "trainer",
    "InterleavingTrainer": "trainer",
    "Defense": "defenses",
    "ReferenceDefense": "defenses",
    "register": "defenses",
    "InactiveDefenseError": "evidence",
    "EMACallback": "models.ema",
    "DriftCallback": "evaluation.drift",
}

__all__ = [
    "Defense",
    "DriftCallback",
    "EMACallback",
    "EMGuardConfig",
    "EMGuardTrainer",
    "InactiveDefenseError",
    "InoculationTrainer",
    "InterleavingTrainer",
    "KLTrainer",
    "LDIFSTrainer",
    "ReferenceDefense",
    "SteeringTrainer",
    "__version__",
    "register",
]


# The names in `_ROOMS` are imported on first use, because the import of TRL takes seconds, and some commands do not
# need TRL. For example, `trl-emguard model` prints the folder of a shipped model.
def __getattr__(name: str):
    if name in _ROOMS:
        return getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


check_environment()
