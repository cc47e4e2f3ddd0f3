"""A small copy of a second moment that is read through its inverse, as gates read it.

C⁻¹ = S M D Mᵀ S, S its root diagonal, M unit lower triangular in float16, and D its pivots, with
the coordinates in reverse. Each entry of M is rounded by a share of itself, so that what C⁻¹ gives
any x errs by a share, too, however wide its eigenvalues range; float16 of C loses the small ones,
and eigenvectors are twice as many numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nulledit.linalg.spectrum import Block

LEAST = 1e-9
"""Of the median eigenvalue, below which none is taken: gates take none below 1e-6."""


def packed(block: Block) -> tuple[Tensor, Tensor]:
    """M below its diagonal [d(d − 1)/2], float16, and the diagonals of S and D [2, d], float64."""
    values = block.eigenvalues.clamp_min(LEAST * float(block.eigenvalues.median()))
    vectors = block.eigenvectors.double()
    inverse = ((vectors / values) @ vectors.mT).flip(0, 1)
    scale = inverse.diagonal().sqrt()
    factor = torch.linalg.cholesky(inverse / scale / scale[:, None])
    pivots = factor.diagonal()
    return (factor / pivots)[_below(len(scale))].half(), torch.stack([scale, pivots.square()])


def unpacked(below: Tensor, diagonals: Tensor) -> Block:
    """The spectrum of C [d, d], from what `packed` gave."""
    scale, pivots = diagonals.double()
    unit = torch.eye(len(scale), dtype=torch.float64)
    unit[_below(len(scale))] = below.double()
    inverted = torch.linalg.solve_triangular(unit, torch.diag(1 / scale), upper=False)
    moment = inverted.mT @ (inverted / pivots[:, None])
    return Block.of(moment.flip(0, 1))


def _below(d: int) -> tuple[Tensor, ...]:
    """Rows and columns of what lies below the diagonal of a matrix [d, d]."""
    return torch.tril_indices(d, d, -1).unbind()
