"""Random rotation, for control experiments in which vectors keep their lengths but get random directions."""

import torch


def rotated(columns: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return columns `(n, r)`, all rotated by the same uniformly random rotation of n-dimensional space, in fp64.

    The columns keep their lengths and the angles between them.
    """
    # A QR decomposition writes the columns as Q R. R fixes their lengths and angles, and Q is replaced by random
    # orthonormal columns.
    coordinates = torch.linalg.qr(columns.double(), mode="r").R  # (min(n, r), r)
    frame = torch.linalg.qr(torch.randn(len(columns), len(coordinates), generator=generator, dtype=torch.float64))
    # LAPACK chooses the signs of the columns of `frame.Q` by a rule, so `frame.Q` alone is not uniformly distributed.
    # Multiplying the columns by the signs on the diagonal of `frame.R` repairs this.
    return (frame.Q * frame.R.diagonal().sign()) @ coordinates
