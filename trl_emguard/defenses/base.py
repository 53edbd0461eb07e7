"""Base classes of defenses, with the methods (hooks) that a training run calls. By default a hook does nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from ..evidence import Evidence
from .schedule import Weighted
from .step import TERM_SUMS, Marks, Step


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from ..data.places import Loading
    from ..data.prepare import Rows, StreamPlan, Tokenizing


@dataclass(frozen=True)
class Paper:
    """Paper that describes the method of a defense: its title and arXiv id."""

    title: str
    id: str


IN_TRAINING_DEFENSES = Paper("In-Training Defenses against Emergent Misalignment in Language Models", id="2508.06249")


class Defense:
    """An in-training defense.

    The trainer has no code for a particular defense. It builds the defenses that `defense=` lists and calls their
    hooks. These are the methods below, roughly in the order in which a run calls them. By default a hook does nothing.
    A defense that adds a term to the loss is a [`ReferenceDefense`], whose term is a distance per token from a
    reference model, or a [`ModelDefense`], whose term does not depend on the batch.

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

    Put options of your own into a dataclass, and mix it into the config: `class MyConfig(MyOptions, EMGuardConfig)`.

    Args:
        args: the run's configuration, which [`check_options`] has checked.
        inputs: values of the trainer's keyword arguments that the class attribute `inputs` lists.
    """

    name: ClassVar[str] = ""
    papers: ClassVar[tuple[Paper, ...]] = ()
    # Dataclass with the defense's options, from which the run's config class inherits. `object` means no options.
    Options: ClassVar[type] = object
    # Name of the option that switches the defense off when its value is 0; empty if there is no such option.
    switch: ClassVar[str] = ""
    # Names of the trainer's keyword arguments whose values are passed on to the defense's `__init__`.
    inputs: ClassVar[tuple[str, ...]] = ()
    # True if the defense adds a term to the loss, or reads the sums of cross-entropy over its scopes. Then the
    # training loss is computed by the model's forward, as patched by this package, and not by the TRL trainer.
    own_loss: ClassVar[bool] = False
    # Names of the scopes (sets of tokens) that `read_batch` marks.
    scopes: ClassVar[tuple[str, ...]] = ()
    # Columns of training rows that the defense's data collator reads. Trainer would remove them as unused otherwise.
    columns: ClassVar[tuple[str, ...]] = ()
    # Columns with a whole number per token that `prepare_tokenized` adds. They are cut, packed and padded together
    # with the tokens, and reach `read_batch` as `(B, T)` integers: 0 for padding and for rows that other defenses add.
    token_columns: tuple[str, ...] = ()
    # Names of `end_step` metrics logged with their latest value. All others are means over the steps between two logs.
    running_metrics: ClassVar[tuple[str, ...]] = ()
    # Values that the config gives to the fields of `Options`. [`build_defenses`] sets them.
    given: Mapping[str, Any] = {}

    def __init__(self, args: Any, **inputs: Any):
        del args, inputs

    # ---- options, and checks before weights load ----

    @classmethod
    def check_options(cls, args: Any) -> None:
        """Raise `ValueError` or `FileNotFoundError` with a bad option's name, value and fix, before a model loads."""
        del args

    @classmethod
    def check_with(cls, args: Any, others: Sequence[type[Defense]]) -> None:
        """Raise `ValueError` if the defense does not work together with the other active defenses."""
        del args, others

    @classmethod
    def is_on(cls, args: Any) -> bool:
        """Return whether the options switch the defense on. Called before the defense is built, and after."""
        return not cls.switch or getattr(args, cls.switch) != 0

    @property
    def active(self) -> bool:
        """False if the defense is off although [`is_on`] says otherwise: a term whose coefficient is 0, for example.

        A defense that is off is named in the log, and not used.
        """
        return True

    def options(self) -> dict[str, Any]:
        """Return the options that define the defense, as JSON values, for `defense.json` and the model card.

        By default these are the fields of [`Options`] with the values that the config gives. A run that resumes must
        have the same options as its checkpoint.
        """
        return dict(self.given)

    def options_like(self, then: dict[str, Any], is_on_all_ranks: bool) -> dict[str, Any]:
        """Return this run's [`options`] in the form that the checkpoint's options have, so that both can be compared.

        An earlier version of the package may have written the checkpoint, in another form.

        Args:
            then: this defense's options as the checkpoint records them.
            is_on_all_ranks: whether every rank calls this function, so that it may run code in which ranks wait for
                each other. Otherwise only the ranks that look for a checkpoint call it.
        """
        del then, is_on_all_ranks
        return self.options()

    def meet(self, others: Sequence[Defense]) -> None:
        """Adapt to the other active defenses. This hook is called after all defenses have been built."""
        del others

    def continue_from(self, options: dict[str, Any]) -> None:
        """Adopt the checkpoint's [`options`] where this run's config leaves a value open. Called before resuming."""
        del options

    def describe(self) -> list[str]:
        """Return lines on the defense, printed when training starts or in a dry run. The rows are prepared by then."""
        return []

    def check_tuning(self, has_adapter: bool) -> None:
        """Raise `ValueError` if the defense does not support this tuning (adapter or full). Runs before weights load.

        Args:
            has_adapter: whether an adapter is trained, and not the model itself.
        """
        del has_adapter

    def check_model(self, config: PreTrainedConfig) -> None:
        """Raise `ValueError` if the defense does not support a model with this config. Runs before weights load.

        Args:
            config: the model's config; for a vision-language model, the config of its text model.
        """
        del config

    # ---- rows ----

    def prepare_rows(self, rows: Rows) -> Rows:
        """Return the user's raw training rows, changed or unchanged. No hook is called with evaluation rows."""
        return rows

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `ValueError` if the defense cannot act with this tokenizer. Runs before rows are tokenised."""
        del tokenizer

    def prepare_tokenized(self, rows: Rows, tokenizing: Tokenizing) -> Rows:
        """Return the tokenised training rows, changed or not.

        Args:
            rows: `input_ids` and `labels` among other columns. The rows are not yet cut or packed.
            tokenizing: facts on the tokenisation, for defenses that tokenise rows of their own.
        """
        del tokenizing
        return rows

    def add_rows(self, rows: Rows, plan: StreamPlan) -> Rows:
        """Return the training rows with the defense's rows mixed in. Called only for streams or rows to be packed."""
        del plan
        return rows

    def train_loader(self, loading: Loading) -> Loading:
        """Return `loading`, the settings by which rows become batches. The defense may change them.

        This hook is called when the trainer is built, and again for each training.
        """
        return loading

    def extra_rows(self) -> Dataset | None:
        """Return the tokenised rows, each listed once, that the defense's collator adds to batches; `None` if none."""
        # `cache_reference=True` stores the reference model's states of these rows. A dry run takes each row to come
        # once in an epoch.
        return None

    # ---- model ----

    def check_policy(self, model: PreTrainedModel) -> None:
        """Raise `ValueError` if the defense cannot act on the policy (causal language model to train, unwrapped)."""
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
        """Return a context manager that is active during the policy's forward pass in training.

        It is never entered for the reference pass, evaluation, generation or saving, and it is exited before the
        backward pass. With gradient checkpointing, the inside of a decoder block runs again in the backward pass. So
        register module hooks on whole blocks. Hooks inside of blocks must also act in the second run; see
        `inoculation_adapter.py`.

        Args:
            model: causal language model without wrappers.
            batch: collated micro-batch, `(B, T)` tensors, labels included. In SFT, the key
                [`~trl_emguard.defenses.step.MARKS`] holds the masks that defenses have read from it, as [`Marks`].
        """
        del model, batch
        return nullcontext()

    # ---- step ----

    def read_batch(self, batch: dict[str, Any]) -> Marks:
        """Return [`Marks`] read from a batch. Remove keys that only the defense reads, as the model refuses them.

        Training calls this hook once for each micro-batch, before the micro-batch's forward pass. A dry run calls it
        too, with the first batch and with single rows.
        """
        del batch
        return Marks()

    def end_step(self, step: Step) -> dict[str, float]:
        """Add a finished step to the counts of [`evidence`], and return metrics to log: name → value."""
        del step
        return {}

    # ---- evidence that the defense acts, and checkpoints ----

    def begin(self, evidence: dict[str, Any]) -> None:
        """Prepare for training: begin the counts of [`evidence`] anew, or continue from a checkpoint's evidence.

        Args:
            evidence: result of [`evidence`] when the checkpoint to resume from was saved; empty for a new run.
        """
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
        """Return the reason why the run is not defended, or `None` if no fault was found.

        Args:
            final: whether training has ended.
        """
        del final
        return None

    @classmethod
    def surrounds_policy(cls) -> bool:
        """Return whether the class overrides [`policy_pass`], and so may change the policy's outputs in training."""
        return cls.policy_pass is not Defense.policy_pass


def added_scopes(others: Sequence[Defense]) -> list[str]:
    """Return the scopes of rows that other defenses mix in. A defense that adds no rows may mark the user's own."""
    adding = [other for other in others if type(other).extra_rows is not Defense.extra_rows]
    return [scope for other in adding for scope in other.scopes]


class TermDefense(Weighted, Defense):
    """A defense that adds a term to the loss, and collects evidence that this term has a gradient."""

    own_loss = True

    _proof: Evidence | None = None

    @property
    def proof(self) -> Evidence:
        """Counts, updated in every step, that show whether the term has a gradient."""
        if self._proof is None:
            self._proof = Evidence()
        return self._proof

    def end_step(self, step: Step) -> dict[str, float]:
        value, positions, gradient, requires_grad = self._sums(step)
        self.proof.end_step(value, positions, gradient, requires_grad, has_moved=self._should_show(step))
        return {self.name: value / positions} if positions else {}

    def _should_show(self, step: Step) -> bool:
        """Return True if a gradient is expected: the policy has visibly changed, and no schedule makes `coef` 0."""
        return step.has_moved and (self.schedule is None or self.coef != 0)

    def _sums(self, step: Step) -> list[float]:
        return [step.sums[f"{self.name}/{what}"] for what in TERM_SUMS]

    def begin(self, evidence: dict[str, Any]) -> None:
        self._proof = Evidence.read(self.name, evidence)

    def evidence(self) -> dict[str, Any]:
        return self.proof.as_json()

    def verdict(self, final: bool = False) -> str | None:
        return self.proof.verdict(self.name, final)


class ReferenceDefense(TermDefense):
    """A defense that adds `coef · (1/N) Σ_t d(policy, reference)_t` to the loss.

    d is the distance between policy and reference at position t. The sum runs over the positions of the scope
    `tokens`: `"loss"` (positions that predict a label), `"all"` (positions that predict any token but padding), or a
    scope that another defense marks, such as mixed-in rows. N is the number of positions in the scope `mean_over` (by
    default the scope `tokens`), over all micro-batches and ranks of the step. Set `divergence` to compute d from the
    two next-token distributions, or override [`layers`] and [`token_loss`] to compute d from block outputs.
    """

    tokens: str = "loss"
    mean_over: str | None = None
    divergence: Literal["reverse", "forward"] | None = None

    def layers(self, num_layers: int) -> Sequence[int]:
        """Return the blocks whose outputs [`token_loss`] compares, counted from 1 to `num_layers`."""
        del num_layers
        return ()

    def token_loss(self, policy: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
        """Return the distance to the reference at each of P tokens, `(P,)`, as a differentiable function of `policy`.

        Args:
            policy: the policy's outputs of the blocks in [`layers`], `(P, H)` each.
            reference: the reference's outputs of the same blocks at the same tokens, `(P, H)` each.
        """
        raise TypeError(f"{type(self).__name__} must set `divergence`, or override `layers` and `token_loss`.")


class ModelDefense(TermDefense):
    """A defense that adds `coef · d(model)` to the loss of a step.

    d does not depend on the batch: each micro-batch adds an equal share of d, and every rank computes the same value.
    """

    def model_states(self, model: PreTrainedModel, batch: Mapping[str, Any]) -> list[torch.Tensor]:
        """Return the states (tensors) from which [`model_loss`] computes d, connected to the weights by autograd.

        This method is called in every micro-batch, after the policy's pass and outside of every [`policy_pass`]
        context, but still inside the call of the engine's wrapper (DDP, DeepSpeed, FSDP). Every rank must run the same
        modules.

        Args:
            model: causal language model without wrappers.
            batch: collated micro-batch.
        """
        raise TypeError(f"{type(self).__name__} must override `model_states`.")

    def model_loss(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Return the defense's term of the loss, a scalar, as a differentiable function of the states."""
        raise TypeError(f"{type(self).__name__} must override `model_loss`.")

    def end_step(self, step: Step) -> dict[str, float]:
        value, shares, gradient, requires_grad = self._sums(step)
        # Each micro-batch on each rank has added w · d to `value`, w to `shares` and w · gradient size to `gradient`.
        # The weight w is `LossGuard.share`, such as 1/4. Division by `shares` thus gives d and the mean gradient size.
        value, gradient = value / shares, gradient / shares
        self.proof.end_step(value, 1, gradient, requires_grad, has_moved=self._should_show(step))
        return {self.name: value}
