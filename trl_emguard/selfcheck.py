"""Self-check of untested library versions: private names that this package uses, and two steps of defended training.

`python -m trl_emguard.selfcheck` prints nothing on success, and otherwise ends with an error that names the fault.
"""

import inspect
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTTrainer

from .config import EMGuardConfig
from .trainer import EMGuardTrainer


# Private methods of SFTTrainer (most inherited from transformers' Trainer) that the package overrides or calls. If TRL
# or transformers renamed a method that the package overrides, the override would silently never be called.
PRIVATE = (
    "_determine_best_metric",
    "_finalize_training",
    "_get_dataloader",
    "_get_grad_norm",
    "_get_output_dir",
    "_get_train_sampler",
    "_load_optimizer_and_scheduler",
    "_prepare_dataset",
    "_push_from_checkpoint",
    "_remove_unused_columns",
    "_run_epoch",
    "_save_checkpoint",
    "_set_signature_columns_if_needed",
)


class SelfCheckError(RuntimeError):
    """Error for a library that differs from its tested versions in something that this package relies on."""


def check_names() -> None:
    """Look for the methods in `PRIVATE`, and compare their parameters with those of the package's overrides.

    Raises:
        SelfCheckError: a method is gone, or its parameters differ from those of its override.
    """
    for name in PRIVATE:
        if not hasattr(SFTTrainer, name):
            raise SelfCheckError(f"SFTTrainer.{name} is gone")
        ours, theirs = (
            " ".join(inspect.signature(getattr(owner, name)).parameters) for owner in (EMGuardTrainer, SFTTrainer)
        )
        if ours not in (theirs, "self args kwargs"):
            raise SelfCheckError(f"SFTTrainer.{name} takes ({theirs}), and its override ({ours})")


class PlainGradients(TrainerCallback):
    """Callback that compares the gradient of each training step with the gradient of [`plain_loss`].

    [`plain_loss`] computes the same loss without the package's patches, from the logits of a whole row at once. The
    package's own loss computes logits in chunks.

    Args:
        rows: all rows of one step.

    Attributes:
        steps: number of steps that were compared.
    """

    def __init__(self, rows: list[dict[str, list[int]]]):
        self.rows = rows
        self.steps = 0
        self._wanted: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        ce, terms = plain_loss(model, self.rows)
        # Before the first update the adapter changes nothing, so the defense terms and their gradients are 0. Only the
        # second step can test them, if the first one has made them large enough.
        if self.steps and terms < 0.1 * ce:
            raise SelfCheckError(f"the first step moved nothing: the terms are {terms:.1e}, and CE is {ce:.1e}")
        self._wanted = dict(zip(trained, torch.autograd.grad(ce + terms, list(trained.values())), strict=True))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = dict(model.named_parameters())
        for name, wanted in self._wanted.items():
            if not torch.allclose(found[name].grad, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max())):
                raise SelfCheckError(f"the gradient of {name} in step {self.steps + 1} is not that of the loss")
        self.steps += 1


def plain_loss(model: PeftModel, rows: list[dict[str, list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two means over positions that predict a label: CE, and the sum of the two defense terms.

    The terms compare the policy (adapter on) with the reference (adapter off): KL(policy ‖ reference) of next-token
    distributions, and the squared distance between outputs of the first block, scaled to unit length.
    """
    values: list[torch.Tensor] = []
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        kept = labels != -100
        with torch.no_grad(), model.disable_adapter():
            log_q, before = _run(model, row["input_ids"], kept)
        log_p, after = _run(model, row["input_ids"], kept)
        ce = -log_p.gather(-1, labels[kept][:, None])[:, 0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        values.append(torch.stack([ce, kl + (after - before).pow(2).sum(-1)]))
    ce, terms = torch.cat(values, dim=1).mean(1)
    return ce, terms


def _run(model: PeftModel, ids: list[int], kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities `(P, V)`, and the first block's output scaled to unit length `(P, H)`.

    P is the number of positions that are true in the mask `kept`, which has one entry for each token except the last.
    """
    bare = model.get_base_model()
    outputs = bare.base_model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    states = outputs.hidden_states[1][0, :-1][kept]
    logits = bare.lm_head(outputs.last_hidden_state[0, :-1][kept])
    return logits.log_softmax(-1), states / states.norm(dim=-1, keepdim=True)


def check_steps(folder: str | Path) -> None:
    """Train a tiny model for two steps of two micro-batches; check each step's gradient and the saved checkpoint.

    Raises:
        SelfCheckError: a gradient differs, a step was not made, or the checkpoint is not whole.
    """
    tokens = [list(range(2, 8 + 3 * i)) for i in range(4)]
    rows = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in tokens]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            initializer_range=0.3,
            pad_token_id=1,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    words = Tokenizer(WordLevel({str(i): i for i in range(32)}, unk_token="0"))
    config = EMGuardConfig(
        str(folder),
        defense="kl,ldifs",
        kl_coef=1.0,
        ldifs_coef=1.0,
        ldifs_layers="1",
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        save_strategy="steps",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
    )
    check = PlainGradients(rows)
    trainer = EMGuardTrainer(
        model,
        config,
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="1"),
        callbacks=[check],
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"),
    )
    trainer.train()
    if check.steps != 2:
        raise SelfCheckError(f"{check.steps} of two steps were made")
    if not trainer.has_whole_checkpoint():
        raise SelfCheckError("the checkpoint is not whole")


if __name__ == "__main__":
    try:
        check_names()
        with tempfile.TemporaryDirectory() as scratch:
            check_steps(scratch)
    except SelfCheckError as error:
        sys.exit(str(error))
