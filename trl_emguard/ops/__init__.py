"""Arithmetic on tensors with torch alone. The slow float64 versions that it is tested against are in `tests/ops`."""

from .features import feature_distance
from .gradient import with_gradient
from .head import HeadOutput, ce_divergence_head, logit_transform, token_nll


__all__ = ["HeadOutput", "ce_divergence_head", "feature_distance", "logit_transform", "token_nll", "with_gradient"]
