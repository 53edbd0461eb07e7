"""Random rotation, for controls that keep sizes and lose directions."""

import torch


def rotated(columns: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return columns `(n, r)` under one uniformly random rotation of the n-dimensional space, in fp64.

    Lengths of the columns and angles between them stay.
    """
    # The columns are Q R, and random orthonormal columns replace those of Q.
    coordinates = torch.linalg.qr(columns.double(), mode="r").R  # (min(n, r), r)
    frame = torch.linalg.qr(torch.randn(len(columns), len(coordinates), generator=generator, dtype=torch.float64))
    # LAPACK fixes the sign of an entry in every column of Q; the signs of R's diagonal make the columns uniform.
    return (frame.Q * frame.R.diagonal().sign()) @ coordinates
