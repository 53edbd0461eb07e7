"""Sums of a training step's statistics: added over micro-batches on the device, and over ranks in one collective."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator


class Sums:
    """Sums of one training step, each with a name: for example the cross-entropy and the number of label tokens.

    Every rank must add the same names in the same order, even if its rows contribute nothing to some of them. So one
    vector holds all sums, and ranks can add their vectors.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Discard all sums, for example those that an interrupted step has left."""
        self._names: tuple[str, ...] = ()
        self._values: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        return self._values is None

    def add(self, names: Sequence[str], values: torch.Tensor) -> None:
        """Add a micro-batch's values, `(len(names),)`.

        Raises:
            ValueError: the names, or their order, are not those of the step's first micro-batch.
        """
        if self._values is None:
            self._names, self._values = tuple(names), values
        elif tuple(names) != self._names:
            raise ValueError(
                f"a micro-batch sums up {sorted(names)}, and the first one of its step {sorted(self._names)}."
            )
        else:
            self._values = self._values + values

    def reduce(self, accelerator: Accelerator, copies: int = 1) -> dict[str, float]:
        """Return the sums over all ranks by name, and clear them for the next step.

        Args:
            accelerator: the run's accelerator.
            copies: number of ranks that hold the same rows (above 1 with tensor parallelism). Sums are divided by this
                number, so that each row counts only once.
        """
        assert self._values is not None
        values = accelerator.reduce(self._values, "sum").tolist()
        named = {name: value / copies for name, value in zip(self._names, values, strict=True)}
        self.clear()
        return named


def stacked(values: Mapping[str, Any], like: torch.Tensor) -> torch.Tensor:
    """Return a mapping's values (numbers, or tensors of shape `()`) as a vector of the dtype and device of `like`."""
    return torch.stack([torch.as_tensor(value).to(like) for value in values.values()])
