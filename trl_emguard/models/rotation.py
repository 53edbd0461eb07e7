"""Random rotation, for controls that keep sizes and lose directions."""

import torch


def rotated(columns: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return columns `(n, r)` under one uniformly random rotation of the n-dimensional space, in fp64.

    The columns keep their lengths and the angles between them.
    """
    # The columns are Q R, and random orthonormal columns replace those of Q.
    coordinates = torch.linalg.qr(columns.double(), mode="r").R  # (min(n, r), r)
    frame = torch.linalg.qr(torch.randn(len(columns), len(coordinates), generator=generator, dtype=torch.float64))
    # LAPACK's choice of signs biases Q. The signs of R's diagonal undo this choice and make the columns uniform.
    return (frame.Q * frame.R.diagonal().sign()) @ coordinates
