"""The output head of a causal language model."""

import math

import torch
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from ..ops import logit_transform
from .batches import eval_mode


def output_head(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the head's weight `(V, H)` and its bias `(V,)` or `None`.

    With adapters off, a head in `modules_to_save` is the original one.
    """
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, lm_head.bias
    # FSDP2 leaves a head in shards if its module is never called, so it is gathered once, before it is cut into
    # chunks. Each rank has a gradient of its own, and FSDP2 averages what it gathers itself.
    if isinstance(weight, DTensor):
        weight, bias = _whole(weight), None if bias is None else _whole(bias)
    return weight, bias


def _whole(shards: DTensor) -> torch.Tensor:
    return shards.full_tensor(grad_placements=[Partial("avg")] * shards.device_mesh.ndim)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose own logits are not those that its head makes of its last states.

    Some architectures transform states before the head or logits after it in ways that the fused head does not know,
    and a divergence would then be taken of other distributions than the model's.

    Args:
        model: causal language model without wrappers, with whole weights.

    Raises:
        ValueError: the logits differ.
    """
    with eval_mode(model):
        count = min(8, model.config.get_text_config().vocab_size)
        ids = torch.arange(count, device=model.get_input_embeddings().weight.device)[None]
        own = model(input_ids=ids, use_cache=False).logits.float()
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weight, bias = output_head(model)
        softcap, scale = logit_transform(model.config.get_text_config())
        logits = torch.nn.functional.linear(states.to(weight), weight, bias).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
    difference = ((logits.to(own.device) - own).abs().max() / own.abs().max().clamp(min=1e-6)).item()
    # Weights that are not finite are another matter: a checkpoint may replace them.
    if math.isfinite(difference) and difference > (1e-3 if own.dtype == model.dtype else 0.05):
        raise ValueError(
            f"{type(model).__name__}: its own logits differ by {difference:.2g} of their size from what its head "
            "makes of its last states, so this architecture changes states or logits in a way that the fused head "
            "does not know, and no defense with a loss of its own can train it."
        )
