"""Distance between two models in feature space."""

from collections.abc import Sequence

import torch


def feature_distance(
    policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], normalize: bool = True
) -> torch.Tensor:
    """LDIFS of each token: mean over layers of ‖x̂ − x̂₀‖² (Mukhoti et al., 2308.13320, there for CLIP features).

    Args:
        policy: for each of K layers, the policy's states, `(N, H)`.
        reference: the reference's states of the same layers and tokens, `(N, H)` each.
        normalize: x̂ is x scaled to unit length, per token and layer; raw states otherwise.

    Returns:
        `(N,)`, in fp32 (fp64 for fp64 states). Between 0 and 4 where the states are normalised.
    """
    distances = []
    for x, x0 in zip(policy, reference, strict=True):
        dtype = torch.promote_types(x.dtype, torch.float32)
        x, x0 = x.to(dtype), x0.to(dtype)
        if normalize:
            x, x0 = torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(x0, dim=-1)
        distances.append((x - x0).square().sum(-1))
    return torch.stack(distances).mean(0)
