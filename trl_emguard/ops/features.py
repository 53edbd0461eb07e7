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

    def prepared(x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.nn.functional.normalize(x, dim=-1) if normalize else x

    distances = [(prepared(x) - prepared(x0)).square().sum(-1) for x, x0 in zip(policy, reference, strict=True)]
    return torch.stack(distances).mean(0)
