"""Keys of training rows in the reference cache, and checks that refuse rows whose hidden states cannot be cached."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel


# Length in bytes of the digest that is a row's key.
KEY_BYTES = 16

# Names of the inputs that a collated batch may have; `row_keys` refuses a batch with any other. A row's digest covers
# its `input_ids` and, by `attention_mask`, its length. The other three inputs do not change the states that the
# reference computes for the row.
_INPUTS = {"input_ids", "attention_mask", "labels", "use_cache", "output_router_logits"}


@dataclass
class CachedRow:
    """Training row whose states belong in the cache.

    Attributes:
        index: index of the row in the data.
        key: digest by which the row is found.
        length: number of tokens, including pads that the collator adds even to a single row.
        positions: number of positions whose states are kept.
    """

    index: int
    key: bytes
    length: int
    positions: int


def row_keys(inputs: Mapping[str, Any], compared: torch.Tensor) -> list[bytes | None]:
    """Return each row's key: a digest of its tokens (without pads) and of the positions whose states are kept.

    Args:
        inputs: collated batch of `(B, T)` tensors.
        compared: `(B, T - 1)`, mask of the positions whose states are kept.

    Returns:
        16 bytes for each row, or `None` if no position of the row is kept.

    Raises:
        ValueError: a row's states would depend on more than its own tokens, or the batch has no attention mask of
            shape `(B, T)`.
    """
    mask = inputs.get("attention_mask")
    more = sorted(set(inputs) - _INPUTS)
    if mask is None or mask.dim() != 2 or more:
        has = f"also returns {', '.join(more)}" if more else "returns no attention mask of shape (rows, tokens)"
        raise ValueError(
            f"the reference cache knows a row by its `input_ids`, and the data collator {has}: leave "
            "`cache_reference` out, or use the default collator."
        )
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError(
            "the data collator pads on the left, which moves the positions of a row, and no cache knows them: pad on "
            "the right, or leave `cache_reference` out."
        )
    keys: list[bytes | None] = []
    lengths = mask.sum(1).tolist()
    for ids, kept, length in zip(inputs["input_ids"].cpu().numpy(), compared.cpu().numpy(), lengths, strict=True):
        positions = np.flatnonzero(kept)
        content = np.concatenate([[length], ids[:length], positions]).astype("<i8").tobytes()
        keys.append(hashlib.blake2b(content, digest_size=KEY_BYTES).digest() if len(positions) else None)
    return keys


def check_length(model: PreTrainedModel, width: int) -> None:
    """Check that the longest row does not change the states of the other rows in its batch.

    Dynamic and longrope rotary embeddings depend on the longest row of a batch, if that row is longer than a limit of
    the model. Cached states must depend on their own row alone.

    Args:
        model: causal language model without wrappers.
        width: number of tokens of the longest row.

    Raises:
        ValueError: the model has such embeddings, and `width` is above the limit.
    """
    config = model.config.get_text_config()
    rotary: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    limit: int = (
        rotary.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None) or width
    )
    if any(kind in json.dumps(rotary) for kind in ('"dynamic"', '"longrope"')) and width > limit:
        raise ValueError(
            f"a row has {width} tokens, too many for the reference cache: beyond {limit} this model's rotary "
            "embeddings depend on the longest row of a batch, and so do the states of the others. Set "
            f"max_length={limit}, or leave `cache_reference` out."
        )
