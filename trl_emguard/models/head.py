"""Output head of a causal language model: its weights, and a check that the fused head gives the model's own logits.

The fused head (`ops/head.py`) takes the place of the model's head where this package computes the loss.
"""

import math

import torch
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from ..ops import logit_transform
from .batches import eval_mode


def output_head(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output head's weight `(V, H)` and its bias `(V,)` or `None`.

    If an adapter trains the head (`modules_to_save`), the original head is returned while adapters are off.
    """
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, lm_head.bias
    # FSDP2 gathers a weight only when its module is called. The fused head (`ops/head.py`) uses the weight without a
    # call of the module, for one chunk of tokens after the other, so the weight is gathered here, once for all chunks.
    # Each rank then has its own gradient with respect to the whole weight. `_whole` makes the backward pass average
    # these gradients over the ranks, just as FSDP2 does for weights that it gathers itself.
    if isinstance(weight, DTensor):
        weight, bias = _whole(weight), None if bias is None else _whole(bias)
    return weight, bias


def _whole(shards: DTensor) -> torch.Tensor:
    return shards.full_tensor(grad_placements=[Partial("avg")] * shards.device_mesh.ndim)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Refuse a model whose logits differ from those that the fused head computes from the model's last hidden states.

    Some architectures transform the states before the head, or the logits after the head, in ways that this package's
    fused head does not implement. The divergence would then compare other distributions than the model's.

    Call this under training's autocast, because attention kernels may refuse the dtype that the weights have.

    Args:
        model: causal language model without wrappers, with unsharded weights.

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
    is_exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(ids.device.type)
    # With NaN or infinite weights, `difference` may be NaN or infinite. Such a model is not refused here, because a
    # resumed run loads the weights of its checkpoint only after this check.
    if math.isfinite(difference) and difference > (1e-3 if is_exact else 0.05):
        raise ValueError(
            f"{type(model).__name__}: its own logits differ by {difference:.2g} of their size from what its head "
            "makes of its last states, so this architecture changes states or logits in a way that the fused head "
            "does not know, and no defense with a loss of its own can train it."
        )
