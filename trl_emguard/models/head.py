"""The output head of a causal language model."""

import torch
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel


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
