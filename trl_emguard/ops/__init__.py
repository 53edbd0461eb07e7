"""Arithmetic on tensors, without models or data. Tests in `tests/ops` compare it with slow float64 versions."""

from .features import feature_distance
from .gradient import with_gradient
from .head import HeadOutput, ce_divergence_head, logit_transform, token_nll


__all__ = ["HeadOutput", "ce_divergence_head", "feature_distance", "logit_transform", "token_nll", "with_gradient"]
