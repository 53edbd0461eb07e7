"""Plain twin of a defended step: float64, one row at a time without padding, full logits, autograd."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback

from trl_emguard.reference.kinds import ModelReference


class GradientTap(TrainerCallback):
    """Callback that keeps the gradients of the first update."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def move_policy(trainer: Any, by: float = 0.05) -> None:
    """Push the trained weights away from where they started, so that the reference is another model.

    A trainer would refuse a reference that differs from the policy at step 0, so that check is removed here.
    """
    trainer.has_agreed = True
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((by * noise).to(parameter.dtype))


def first_gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Train one step and return the gradients of its update, by parameter name."""
    tap = GradientTap()
    trainer.add_callback(tap)
    trainer.train()
    return tap.gradients


def bare(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def run(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return logits `(T, V)` and the raw output of every block, `(T, H)` each."""
    base = bare(model)
    body = base.base_model
    blocks: list[torch.Tensor] = []
    layers = body.layers
    handles = [
        layer.register_forward_hook(lambda m, a, out: blocks.append(out[0] if out.dim() == 3 else out))
        for layer in layers
    ]
    try:
        logits = model(input_ids=ids[None]).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, blocks


def twin_step(
    trainer: Any,
    layers: tuple[int, ...] = (2, 4),
    mixed_in: Sequence[dict] = (),
    start: Any = None,
    coefs: dict[str, float] | None = None,
    frozen: Mapping[str, torch.Tensor] | None = None,
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Return values and gradients of a step over the whole training set, with the weights that the model has now.

    `layers` are those of `ldifs_layers`; by default "every:2" of four blocks. `mixed_in` are tokenised rows of a pool.
    `start` is a copy of the model before it was moved, for terms that compare with it. `coefs` are coefficients by
    the name of a defense; by default those that the defenses have now. `frozen` are dense updates of linear layers by
    name, which the policy has and the reference has not.
    """
    rows = [*trainer.train_dataset, *mixed_in]
    scope_name = next((d.tokens for d in trainer.defenses if d.name == "kl"), "loss")
    args = trainer.args
    policy = copy.deepcopy(trainer.model).double()
    bare(policy).__dict__.pop("forward", None)  # the patched forward refers to the trainer's model
    policy.eval()
    reference = trainer.reference
    if isinstance(reference, ModelReference):
        other = copy.deepcopy(reference.model).double().eval()
        other.__dict__.pop("forward", None)
        swap = nullcontext
    else:
        other = policy
        if getattr(reference, "adapter", None) is None:
            swap = getattr(policy, "disable_adapter", nullcontext)
        else:

            def swap():
                return _active(policy, reference.adapter)

    with torch.no_grad(), swap():
        references = [run(other, torch.tensor(row["input_ids"])) for row in rows]
    with torch.no_grad():
        for layer, update in (frozen or {}).items():
            module = bare(policy).get_submodule(layer)
            getattr(module, "base_layer", module).weight += update
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(dict(trainer.model.named_parameters())[name].requires_grad)

    ce = kl = ldifs = torch.zeros((), dtype=torch.float64)
    tokens = kl_tokens = 0
    for i, (row, (ref_logits, ref_blocks)) in enumerate(zip(rows, references, strict=True)):
        labels = torch.tensor(row["labels"])[1:]
        logits, blocks = run(policy, torch.tensor(row["input_ids"]))
        kept = labels != -100
        log_p, log_q = logits[:-1].log_softmax(-1), ref_logits[:-1].log_softmax(-1)
        tokens += int(kept.sum())
        ce = ce - log_p[kept].gather(-1, labels[kept][:, None]).sum()
        scope = torch.ones_like(kept) if scope_name == "all" else kept
        if scope_name == "interleaved" and i < len(trainer.train_dataset):
            scope = torch.zeros_like(kept)
        kl_tokens += int(scope.sum())
        a, b = (log_p, log_q) if args.kl_direction == "reverse" else (log_q, log_p)
        kl = kl + (a.exp() * (a - b)).sum(-1)[scope].sum()
        for layer in layers:
            x, x0 = blocks[layer - 1][:-1][kept], ref_blocks[layer - 1][:-1][kept]
            if args.ldifs_normalize:
                x, x0 = (v / v.norm(dim=-1, keepdim=True) for v in (x, x0))
            ldifs = ldifs + (x - x0).pow(2).sum() / len(layers)
    names = args.defense.split(",")
    treft = prefix_change(policy, start, rows) if "treft" in names else torch.zeros(())
    values = {"loss_ce": ce / tokens, "kl": kl / kl_tokens, "ldifs": ldifs / tokens, "treft": treft}
    coefs = {d.name: d.coef for d in trainer.defenses if d.name in values} if coefs is None else coefs
    loss = values["loss_ce"] + sum(coef * values[name] for name, coef in coefs.items())
    loss.backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    return {"loss": loss.item(), **{name: value.item() for name, value in values.items()}}, gradients


def prefix_change(policy: Any, start: Any, rows: Sequence[dict]) -> torch.Tensor:
    """Return TReFT's distance, `()`, from keys and values that are made of the inputs of every block."""
    columns = zip(*(row["input_ids"] for row in rows), strict=False)
    prefix = torch.tensor([[ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)]])

    def keys_and_values(model: Any) -> list[torch.Tensor]:
        inputs = model(input_ids=prefix, output_hidden_states=True).hidden_states[:-1]
        found = []
        for block, x in zip(bare(model).model.layers, inputs, strict=True):
            attended = block.input_layernorm(x)[0]
            found += [block.self_attn.k_proj(attended), block.self_attn.v_proj(attended)]
        return found

    with torch.no_grad():
        before = keys_and_values(copy.deepcopy(start).double().eval())
    changes = [
        ((x - x0).pow(2).sum(-1) / x0.pow(2).sum(-1)).mean()
        for x, x0 in zip(keys_and_values(policy), before, strict=True)
    ]
    return sum(changes) / (len(changes) / 2)


class _active:
    def __init__(self, model: Any, adapter: str):
        self.model, self.adapter = model, adapter

    def __enter__(self):
        self.before = self.model.active_adapter
        self.model.set_adapter(self.adapter)

    def __exit__(self, *exc):
        self.model.set_adapter(self.before)


def relative_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Return ‖ours − theirs‖ / ‖theirs‖ over all parameters together."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[n].double() - theirs[n].double()).pow(2).sum() for n in ours)
    return (difference / sum(g.double().pow(2).sum() for g in theirs.values())).sqrt().item()
