"""Distance between the hidden states ("features") that two models compute for the same tokens."""

from collections.abc import Sequence

import torch


def feature_distance(
    policy: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], normalize: bool = True
) -> torch.Tensor:
    """Return the mean over layers of ‖x̂ − x̂₀‖² for each token, with states x of the policy and x₀ of the reference.

    Source: Mukhoti et al., arXiv 2308.13320, who use this distance for features of CLIP.

    Args:
        policy: the policy's states of K layers, `(N, H)` each.
        reference: the reference's states of the same layers and tokens, `(N, H)` each.
        normalize: scale each token's state to unit length in each layer (x̂); otherwise compare the states as they
            are.

    Returns:
        `(N,)`, in fp32 (fp64 for fp64 states); between 0 and 4 for normalised states.
    """

    def prepared(x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.nn.functional.normalize(x, dim=-1) if normalize else x

    distances = [(prepared(x) - prepared(x0)).square().sum(-1) for x, x0 in zip(policy, reference, strict=True)]
    return torch.stack(distances).mean(0)
