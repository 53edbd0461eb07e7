"""Plan of an epoch or of a stream: which rows of the pool (general instruct rows) follow which training rows."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class MixPlan:
    """Plan that says which of the pool's rows follow each training row.

    The choice depends only on the plan's attributes, the epoch and the training row's place. A place is the row's
    position in the order of an epoch, over all ranks. The j-th (from 0) of the S rows that an epoch takes from the
    pool follows place ⌊(j + ½) · P / S⌋. So the pool's rows are evenly spread: at most ⌈b · S / P⌉ of them follow
    any b successive places.

    Attributes:
        places: P, number of training rows in an epoch.
        rows: S, number of rows that an epoch takes from the pool, each once.
        pool: number of rows in the pool, at least S. The first rows are the best.
        redraw: whether every epoch takes the S rows of the pool that follow those of the previous epoch, and begins
            again at the pool's end. Otherwise every epoch takes the first S rows.
        seed: seed of the order in which an epoch's rows come.
    """

    places: int
    rows: int
    pool: int
    redraw: bool
    seed: int

    def before(self, place: int) -> int:
        """Return how many of the pool's rows come before a place in an epoch."""
        return (2 * place * self.rows + self.places - 1) // (2 * self.places)

    def at(self, epoch: int, place: int) -> list[int]:
        """Return the indices of the pool's rows that follow a place in an epoch."""
        due = range(self.before(place), self.before(place + 1))
        if not due:
            return []
        first = epoch * self.rows if self.redraw else 0
        order = _order(self.rows, self.seed, epoch)
        return [(first + int(order[j])) % self.pool for j in due]


@dataclass(frozen=True)
class StreamMixPlan(MixPlan):
    """Plan for training rows from a stream. A run may take more or fewer of the stream's rows than planned.

    The stream may end and begin again during the run. The pool's rows come best first, and the row that follows a
    place does not depend on the length and batch size of the run. `places` and `rows` are the numbers planned for the
    run.

    Loader workers share the plan, also those of several ranks that read shards of their own. Each worker counts places
    among its own rows. Together, n workers with equally many rows mix in as many rows of the pool as a single worker
    would (Σ_w ⌊x + w / n⌋ = ⌊n · x⌋).

    Attributes:
        rate: rows of the pool per training row.
        worker, workers: index of this worker, and number of workers that have rows.
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
    """Return how many rows of a pool to mix into `places` training rows, so that they are `fraction` of the mix."""
    return round(places * fraction / (1 - fraction))
