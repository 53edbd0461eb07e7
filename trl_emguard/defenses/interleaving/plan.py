"""The plan of an epoch, or of a stream: which rows of a pool stand behind which training rows."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class MixPlan:
    """Rows of the pool behind places of the training rows, as a function of seed, epoch and place alone.

    The j-th of S rows stands behind place ⌊(j + ½) · P / S⌋: evenly spread, so that any b places in a row carry at
    most ⌈b · S / P⌉ of them.

    Attributes:
        places: P, the training rows of an epoch.
        rows: S, the rows that an epoch takes from the pool, each once.
        pool: number of rows in the pool, S or more, best first.
        redraw: whether every epoch continues in the pool where the last one stopped, beginning again at its end,
            instead of taking the first S each time.
        seed: seed of the order in which an epoch's rows come.
    """

    places: int
    rows: int
    pool: int
    redraw: bool
    seed: int

    def before(self, place: int) -> int:
        """Return how many of an epoch's rows stand before a place."""
        return (2 * place * self.rows + self.places - 1) // (2 * self.places)

    def at(self, epoch: int, place: int) -> list[int]:
        """Return the rows of the pool that stand behind a place."""
        due = range(self.before(place), self.before(place + 1))
        if not due:
            return []
        first = epoch * self.rows if self.redraw else 0
        order = _order(self.rows, self.seed, epoch)
        return [(first + int(order[j])) % self.pool for j in due]


@dataclass(frozen=True)
class StreamMixPlan(MixPlan):
    """Plan of a stream, which may end, and begin again, before or after the places that a run was planned for.

    The rows come best first, and a place has the same row in a run of any length and batch size. `places` and `rows`
    are those of the run as it is planned.

    Loader workers divide the plan: a place is one of a worker's own rows, and workers with as many rows hold together
    what one would hold (Σ_w ⌊x + w / n⌋ = ⌊n · x⌋).

    Attributes:
        rate: rows of the pool per training row.
        worker, workers: number of this worker, and of all that have rows.
    """

    rate: float
    worker: int = 0
    workers: int = 1

    def before(self, place: int) -> int:
        return math.floor(place * self.rate + (self.worker + 0.5) / self.workers)

    def at(self, epoch: int, place: int) -> list[int]:
        due = range(self.before(place), self.before(place + 1))
        return [(j * self.workers + self.worker) % self.pool for j in due]


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def planned_rows(places: int, fraction: float) -> int:
    """Return how many rows of a pool make up a fraction of a mix that holds `places` other rows."""
    return round(places * fraction / (1 - fraction))
