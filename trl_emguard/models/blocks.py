"""Decoder blocks of a model, and their outputs. Layer index l means the raw output of block l, for l = 1 … L.

For l < L this output is `hidden_states[l]` of transformers. For l = L it is not: the last entry of `hidden_states` is
taken after the final norm, and the output of block L before it. Index 0 means the input of block 1: the embeddings.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of a causal language model's blocks. Its entry `l - 1` is block l.

    Raises:
        ValueError: no list of `num_hidden_layers` blocks is found.
    """
    count = model.config.get_text_config().num_hidden_layers
    # A vision-language model's vision tower may have as many blocks as its text decoder. So only the text decoder of
    # such a model is searched.
    root = model.get_decoder() if hasattr(model.config, "vision_config") else model.base_model
    for module in root.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"no list of {count} decoder blocks was found in {type(model).__name__}: this architecture is not supported "
        "by defenses that look at block outputs."
    )


def block_states(output: Any, module: nn.Module) -> torch.Tensor:
    """Return the hidden states `(B, T, H)` in a block's output, which is a tensor or a tuple.

    Raises:
        ValueError: the output has another shape, as in architectures that keep several parallel streams of states.
    """
    # Most blocks return a tensor; blocks of older designs return a tuple whose first entry is that tensor.
    states = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(states, torch.Tensor) or states.dim() != 3:
        shape = tuple(states.shape) if isinstance(states, torch.Tensor) else type(states).__name__
        raise ValueError(
            f"{type(module).__name__} returns states of shape {shape}, and not (rows, tokens, width): this "
            "architecture is not supported by defenses that look at block outputs or change them."
        )
    return states


@contextmanager
def record_blocks(
    model: PreTrainedModel, layers: Sequence[int], select: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[dict[int, torch.Tensor]]:
    """Record `select(output)` of the given decoder blocks in every forward pass inside the `with` statement.

    An output is recorded before any other hook changes it. So the change that a steering hook makes to a block's
    output shows only in the recorded outputs of later blocks.

    Args:
        model: causal language model without wrappers.
        layers: block indices, 1 … L, or 0 for the input of block 1.
        select: function that takes a block's output `(B, T, H)`, still attached to the autograd graph, and returns the
            part to keep.

    Yields:
        A dict from layer to selected states. Each forward pass replaces the states of the pass before.
    """
    states: dict[int, torch.Tensor] = {}
    handles = []

    def hook(layer: int):
        def record(module, args, output):
            states[layer] = select(block_states(output, module))

        return record

    def record_input(module, args, kwargs):
        states[0] = select(args[0] if args else kwargs["hidden_states"])

    try:
        # Gradient checkpointing does not make a hook fire twice: the backward pass recomputes only the block's
        # `forward`, and hooks run outside of `forward`.
        for layer in layers:
            if layer == 0:
                handles.append(decoder_blocks(model)[0].register_forward_pre_hook(record_input, with_kwargs=True))
            else:
                handles.append(decoder_blocks(model)[layer - 1].register_forward_hook(hook(layer), prepend=True))
        yield states
    finally:
        for handle in handles:
            handle.remove()
