"""Which adapter of a model acts in a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


class AdapterSwitch:
    """Lets one adapter of a model act, or none, for the passes inside.

    Args:
        model: with all its adapters; one that is added later is not switched.
    """

    def __init__(self, model: PeftModel):
        self.modules = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]

    @contextmanager
    def only(self, adapter: str | None) -> Iterator[None]:
        """`adapter` acts inside, or with `None` the base model."""
        # Only what the forward reads is switched. PEFT's own `disable_adapter` and `set_adapter` also switch
        # `requires_grad`, which would train parameters that the user had frozen.
        before = [(m, m._disable_adapters, m._active_adapter) for m in self.modules]
        try:
            for module in self.modules:
                module._disable_adapters = adapter is None
                if adapter is not None:
                    module._active_adapter = [adapter]
            yield
        finally:
            for module, disabled, active in before:
                module._disable_adapters = disabled
                module._active_adapter = active
            # Autocast keeps the low-precision copy of a weight that it first met under `no_grad`, and such a copy has
            # no gradient: a policy's pass must make its own.
            torch.clear_autocast_cache()
