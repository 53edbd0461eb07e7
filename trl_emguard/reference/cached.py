"""Reference whose hidden states are written to disk before training, and read from there in training steps."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from ..data.places import Collator
from ..defenses.base import Defense, ReferenceDefense
from ..evidence import InactiveDefenseError
from ..guard.forward import States
from ..guard.scopes import positions_in_scope
from ..guard.terms import wanted_layers
from ..io.files import check_writable
from .cache import Collate, ReferenceCache, reference_cache_dir
from .kinds import Reference


class CachedReference(Reference):
    """Reference that reads its states from disk. Another reference has computed them for all rows before training.

    Args:
        reference: reference that computes the states.
        defenses: active defenses. Rows that they add to the batches are cached as well.
        accelerator: the run's accelerator.
    """

    def __init__(self, reference: Reference, defenses: Sequence[Defense], accelerator: Accelerator):
        self.kind = reference.kind
        self.model = reference.model
        self._live = reference
        self._defenses = defenses
        self._accelerator = accelerator
        self._terms = [defense for defense in defenses if isinstance(defense, ReferenceDefense)]
        self._cache: ReferenceCache | None = None

    @property
    def text(self) -> str:
        return f"{self._live.text}, cached"

    def fill(self, rows: Dataset, collator: Collator, batch_size: int, is_quiet: bool) -> str:
        """Compute and write the states that are not on disk yet.

        Args:
            rows: tokenised training rows.
            collator: the run's data collator.
            batch_size: number of rows in one pass of the reference.
            is_quiet: whether to hide the progress bar.

        Returns:
            A line for the log: number and size of the cached rows, how many were computed now, and the folder.
        """
        check_writable("TRL_EMGUARD_CACHE/reference", reference_cache_dir())
        layers = wanted_layers(self._terms, self.model)
        collate, count = self._collate(rows, collator)
        # The lambda below uses the names `live` and `accelerator` instead of `self`. The cache keeps the lambda, and
        # `self` keeps the cache. With `self` in the lambda there would be a cycle of references, and only the garbage
        # collector could free the model.
        live, accelerator = self._live, self._accelerator
        head = live.head()
        cache = ReferenceCache(
            model=self.model,
            run=lambda inputs, positions: live.run(inputs, positions, layers, accelerator),
            head=head,
            layers=layers,
            keeps_last=any(term.divergence is not None for term in self._terms),
            accelerator=accelerator,
            without=live.unused_adapters,
        )
        said = cache.fill(collate, count, batch_size, is_quiet)
        cache.head = live.park(accelerator, head)
        self._cache = cache
        return said

    def _collate(self, rows: Dataset, collator: Collator) -> tuple[Collate, int]:
        """Return a function that makes batches of the rows to cache ([`Collate`]), and the number of these rows.

        The function maps indices of rows to their batch and a mask of the positions whose states are cached. The
        indices count the training rows first, and then the rows that defenses add to batches.
        """
        sources: list[tuple[Any, set[str]]] = [(rows, set())]
        for defense in self._defenses:
            extra = defense.extra_rows()
            if extra is not None:
                sources.append((extra, set(defense.scopes)))
        every = [(source, i, scopes) for source, scopes in sources for i in range(len(source))]
        marked = {scope for _, scopes in sources for scope in scopes}

        def collate(indices: Sequence[int]) -> tuple[dict[str, Any], torch.Tensor]:
            chosen = [every[i] for i in indices]
            batch = collator([source[i] for source, i, _ in chosen])
            like = batch["input_ids"]
            marks = {
                scope: torch.tensor([scope in scopes for *_, scopes in chosen])[:, None].expand_as(like)
                for scope in marked
            }
            positions = [positions_in_scope(batch, term.tokens, marks) for term in self._terms]
            return batch, functools.reduce(torch.logical_or, positions)

        return collate, len(every)

    knows_all_positions = False

    def before(self, batch: Mapping[str, Any], positions: torch.Tensor, layers: Sequence[int]) -> States:
        assert self._cache is not None
        if self._live.shares_weights and self._cache.head[0].requires_grad:
            raise InactiveDefenseError(
                "the reference has moved: its states are on disk, but its head is the policy's, which was unfrozen "
                "after the trainer was built. Unfreeze it before, on the model that you pass, or pass a `ref_model`."
            )
        return self._cache.states(batch, positions)

    def fingerprint(self, policy: nn.Module) -> str:
        return self._live.fingerprint(policy)

    def distance_of_rounding(self, term: ReferenceDefense, share: float) -> float:
        """Return the mean distance that a defense finds between cached states and copies of them with rounding errors.

        Rounding is imitated by an error of `share`, relative to each number of a state. The check that policy and
        reference start equal tolerates such a distance ([`~trl_emguard.reference.agreement.check_agreement`]).
        """
        assert self._cache is not None
        return self._cache.distance_of_rounding(term.token_loss, wanted_layers([term], self.model), share)
