"""Base classes of defenses. Their hooks do nothing by default, and stand in the order in which a run calls them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ..evidence import Evidence
from .schedule import Weighted


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..data.places import Loading
    from ..data.prepare import Rows, StreamPlan, Tokenizing


@dataclass(frozen=True)
class Paper:
    """Source of a method: title and arXiv id."""

    title: str
    id: str


IN_TRAINING_DEFENSES = Paper("In-Training Defenses against Emergent Misalignment in Language Models", id="2508.06249")


@dataclass
class Marks:
    """Masks and counts that a defense reads from a micro-batch.

    Attributes:
        scopes: named sets of tokens, each as a mask, `(B, T)` boolean. Cross-entropy is summed for each scope, and a
            term may be limited to one scope.
        counts: numbers to be summed over micro-batches and ranks, by name. Every batch must give the same names.
    """

    scopes: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, float | torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """Record of a finished training step, equal on every rank.

    Attributes:
        sums: sums over micro-batches and ranks, by name: `ce` (cross-entropy) and `tokens` (number of labels), for
            each scope also `ce/SCOPE` and `tokens/SCOPE`; for a defense called NAME its own counts as `NAME/COUNT`,
            and, if it has a term, `NAME/value`, `NAME/positions`, `NAME/evidence` and `NAME/requires_grad`, which
            [`~trl_emguard.evidence.Evidence`] explains.
        has_moved: whether the policy had been updated before this step.
    """

    sums: dict[str, float]
    has_moved: bool


class Defense:
    """An in-training defense.

    The trainer's code names no defense. It builds the defenses that `defense=` lists and calls their hooks, which are
    defined here in the order of a run. By default a hook does nothing. A defense that adds a term to the loss is a
    [`ReferenceDefense`], whose term is a distance per token, or a [`ModelDefense`], whose term does not depend on the
    batch.

    To write your own defense, derive a class from one of these three, give it a `name`, and call [`register`]:

    ```python
    @register
    class KeyDistance(ReferenceDefense):
        name = "key_distance"

        def layers(self, num_layers):
            return (num_layers // 2,)

        def token_loss(self, policy, reference):
            return (policy[0] - reference[0]).float().square().mean(-1)


    EMGuardTrainer(model, EMGuardConfig(defense="key_distance"), train_dataset=dataset)
    ```

    Options of your own are a dataclass, mixed into the config: `class MyConfig(MyOptions, EMGuardConfig)`.

    Args:
        args: the run's configuration, which [`check_options`] has checked.
        inputs: values of the trainer's keyword arguments that the class attribute `inputs` lists.
    """

    name: ClassVar[str] = ""
    papers: ClassVar[tuple[Paper, ...]] = ()
    # Dataclass of the options, which the config inherits.
    Options: ClassVar[type] = object
    # Option that switches the defense off when it is 0.
    switch: ClassVar[str] = ""
    # Keyword arguments of the trainer that the defense reads.
    inputs: ClassVar[tuple[str, ...]] = ()
    # Flag: the training loss must come from this package's forward, and not from the trainer's.
    own_loss: ClassVar[bool] = False
    # Names of the scopes that `read_batch` marks.
    scopes: ClassVar[tuple[str, ...]] = ()
    # Columns of the training rows that reach the data collator.
    columns: ClassVar[tuple[str, ...]] = ()
    # Columns with a whole number per token that `prepare_tokenized` adds. They are cut, packed and laid out as the
    # tokens are, and reach `read_batch` as `(B, T)` integers, 0 for padding and rows that other defenses add.
    token_columns: tuple[str, ...] = ()
    # Metrics whose latest value is logged; all others are averaged over the steps between two logs.
    running_metrics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, args: Any, **inputs: Any):
        del args, inputs

    # ---- choice ----

    @classmethod
    def check_options(cls, args: Any) -> None:
        """Raise `ValueError`, naming option, value and fix, for a bad option. Runs before anything is loaded."""
        del args

    @classmethod
    def check_with(cls, args: Any, others: Sequence[type[Defense]]) -> None:
        """Raise `ValueError` if the defense does not work together with the other active defenses."""
        del args, others

    @classmethod
    def is_on(cls, args: Any) -> bool:
        """Return whether the options switch the defense on."""
        return not cls.switch or getattr(args, cls.switch) != 0

    @property
    def active(self) -> bool:
        """True unless the options switch the defense off. The log names an inactive defense; its hooks never run."""
        return True

    def options(self) -> dict[str, Any]:
        """Return the options that define the defense, as JSON, for `defense.json` and the model card."""
        return {}

    def options_like(self, then: dict[str, Any], is_on_all_ranks: bool) -> dict[str, Any]:
        """Return [`options`] in the format of a checkpoint, which an earlier version of the package may have written.

        Args:
            then: options that the checkpoint has recorded.
            is_on_all_ranks: whether every rank calls this function, so that it may run code that ranks run together.
                Otherwise only the ranks that look for a checkpoint call it.
        """
        del then, is_on_all_ranks
        return self.options()

    def meet(self, others: Sequence[Defense]) -> None:
        """Take notice of the other active defenses, once all are built."""
        del others

    def continue_from(self, options: dict[str, Any]) -> None:
        """Take over the values of a checkpoint's [`options`] that this run's config leaves open."""
        del options

    def describe(self) -> list[str]:
        """Return lines that a run prints at its start, once the rows are known."""
        return []

    def check_tuning(self, has_adapter: bool) -> None:
        """Raise `ValueError` if the defense cannot act on what is trained. Runs before weights load.

        Args:
            has_adapter: whether an adapter is trained, and not the model itself.
        """
        del has_adapter

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise `ValueError` if the defense cannot act on a model of this (text) config. Runs before weights load."""
        del config

    # ---- rows ----

    def prepare_rows(self, rows: Rows) -> Rows:
        """Return the user's raw training rows, changed or unchanged. Evaluation rows never come here."""
        return rows

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if the defense cannot act with this tokenizer. Runs before rows are tokenised."""
        del tokenizer

    def prepare_tokenized(self, rows: Rows, tokenizing: Tokenizing) -> Rows:
        """Return the tokenised training rows (`input_ids` and `labels`, neither cut nor packed), changed or not."""
        del tokenizing
        return rows

    def add_rows(self, rows: Rows, plan: StreamPlan) -> Rows:
        """Return the rows with further rows mixed in. Called only if rows are packed or streamed, and before that."""
        del plan
        return rows

    def train_loader(self, loading: Loading) -> Loading:
        """Return how rows become batches, changed or not. Called when the trainer is built and for each training."""
        return loading

    def extra_rows(self) -> Dataset | None:
        """Return the tokenised rows that batches get in addition to the training rows, without repeats."""
        return None

    # ---- model ----

    def check_policy(self, model: PreTrainedModel) -> None:
        """Raise `ValueError` if the defense cannot act on this policy (causal language model without wrappers)."""
        del model

    def training(self, model: PreTrainedModel) -> AbstractContextManager:
        """Return a context manager that is entered before training and exited after it, also after an error.

        Register hooks on modules here: a compiled model needs them before it is compiled.

        Args:
            model: causal language model without wrappers.
        """
        del model
        return nullcontext()

    def policy_pass(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> AbstractContextManager:
        """Return a context manager for the policy's forward pass in training.

        It is never entered for the reference pass, evaluation, generation or saving, and it is exited before the
        backward pass. With gradient checkpointing the inside of a decoder block runs a second time in the backward
        pass: hook whole blocks, or make hooks inside of blocks act in the second run too (`inoculation_adapter.py`).

        Args:
            model: causal language model without wrappers.
            batch: collated micro-batch, `(B, T)` tensors, labels included.
        """
        del model, batch
        return nullcontext()

    # ---- step ----

    def read_batch(self, batch: dict[str, Any]) -> Marks:
        """Return what the defense reads from a micro-batch, and remove the keys that the model does not know."""
        del batch
        return Marks()

    def end_step(self, step: Step) -> dict[str, float]:
        """Record a finished step, and return metrics to log."""
        del step
        return {}

    # ---- proof ----

    def begin(self, evidence: dict[str, Any]) -> None:
        """Prepare for training, with the [`evidence`] of the checkpoint to resume from; empty for a new run."""
        del evidence

    def save(self, folder: str) -> None:
        """Write data that a resumed run needs, and that is too large for [`evidence`], into a checkpoint's folder."""
        del folder

    def load(self, folder: str) -> None:
        """Read what [`save`] has written, before a run resumes. Raise `ValueError` if it is missing or corrupt."""
        del folder

    def evidence(self) -> dict[str, Any]:
        """Return counts and flags that show whether the defense has acted so far, as JSON for `defense.json`."""
        return {}

    def verdict(self, final: bool = False) -> str | None:
        """Return why the run is not defended, or `None`.

        Args:
            final: whether training ends here.
        """
        del final
        return None

    @classmethod
    def surrounds_policy(cls) -> bool:
        """Return whether [`policy_pass`] makes the policy's pass in training differ from that of the saved model."""
        return cls.policy_pass is not Defense.policy_pass


class TermDefense(Weighted, Defense):
    """A defense that adds a term to the loss, and owns the evidence that the term forms a gradient."""

    own_loss = True

    _proof: Evidence | None = None

    @property
    def proof(self) -> Evidence:
        """Evidence that the term acts, counted step by step."""
        if self._proof is None:
            self._proof = Evidence()
        return self._proof

    def end_step(self, step: Step) -> dict[str, float]:
        value, positions, gradient, requires_grad = self._sums(step)
        self.proof.end_step(value, positions, gradient, requires_grad, has_moved=self._should_show(step))
        return {self.name: value / positions} if positions else {}

    def _should_show(self, step: Step) -> bool:
        """Return whether the term must form a gradient: the policy has moved, and no schedule sets `coef` to 0."""
        return step.has_moved and (self.schedule is None or self.coef != 0)

    def _sums(self, step: Step) -> list[float]:
        return [step.sums[f"{self.name}/{what}"] for what in ("value", "positions", "evidence", "requires_grad")]

    def begin(self, evidence: dict[str, Any]) -> None:
        self._proof = Evidence.read(self.name, evidence)

    def evidence(self) -> dict[str, Any]:
        return self.proof.as_json()

    def verdict(self, final: bool = False) -> str | None:
        return self.proof.verdict(self.name, final)


class ReferenceDefense(TermDefense):
    """A defense that adds `coef · (1/N) Σ_t d(policy, reference)_t` to the loss.

    d is a distance per token. The sum goes over the positions of the scope `tokens`: `"loss"` for those that predict a
    label, `"all"` for those that predict any real token, or a scope that another defense marks, such as mixed-in
    rows. N counts the positions of the scope `mean_over` (by default `tokens`) over all micro-batches and ranks of the
    step. Set `divergence` to compute d from the two next-token distributions, or override [`layers`] and
    [`token_loss`] to compute it from block outputs.
    """

    tokens: str = "loss"
    mean_over: str | None = None
    divergence: Literal["reverse", "forward"] | None = None

    def layers(self, num_layers: int) -> Sequence[int]:
        """Return the blocks whose outputs [`token_loss`] compares, counted from 1 to `num_layers`."""
        del num_layers
        return ()

    def token_loss(self, policy: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
        """Return the distance of each token, `(N,)`, as a differentiable function of `policy`.

        Args:
            policy: the policy's outputs of the blocks in [`layers`], `(N, H)` each.
            reference: the reference's outputs of the same blocks at the same tokens, `(N, H)` each.
        """
        raise TypeError(f"{type(self).__name__} must set `divergence`, or override `layers` and `token_loss`.")


class ModelDefense(TermDefense):
    """A defense that adds `coef · d(model)` to the loss of a step.

    d does not depend on the batch: each micro-batch adds an equal share of d, and every rank computes the same value.
    """

    def model_states(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the states that [`model_loss`] compares, connected to the weights by autograd.

        This is called in every micro-batch, after the policy's pass and outside of every [`policy_pass`] context, but
        still within the call of the wrapped model. Every rank must run the same modules.

        Args:
            model: causal language model without wrappers.
            batch: collated micro-batch.
        """
        raise TypeError(f"{type(self).__name__} must override `model_states`.")

    def model_loss(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Return d, `()`, as a differentiable function of the states."""
        raise TypeError(f"{type(self).__name__} must override `model_loss`.")

    def end_step(self, step: Step) -> dict[str, float]:
        value, shares, gradient, requires_grad = self._sums(step)
        # Every rank has added the same value, so the sums are divided to count the step once.
        value, gradient = value / shares, gradient / shares
        self.proof.end_step(value, 1, gradient, requires_grad, has_moved=self._should_show(step))
        return {self.name: value}
