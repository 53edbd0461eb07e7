"""Arithmetic on tensors: torch only, no trl, no trainer. The float64 twins live in `tests/ops`."""

from .features import feature_distance
from .gradient import with_gradient
from .head import HeadOutput, ce_kl_head, logit_transform, token_nll


__all__ = ["HeadOutput", "ce_kl_head", "feature_distance", "logit_transform", "token_nll", "with_gradient"]
