"""The one n × n system that most of the family comes down to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nulledit.linalg.blocks import AnyMetric


def solve_update(keys: Tensor, residual: Tensor, metric: AnyMetric) -> Tensor:
    """Update Δ [d_out, d_in] that writes `residual` R [d_out, n] at `keys` K [d_in, n], in float64.

        Δ = argmin ‖ΔK − R‖²_F + tr(Δ G⁺ Δᵀ), rows of Δ in range(G)   =   R (I + Kᵀ G K)⁻¹ Kᵀ G

    With G = P/λ₂ this is AlphaEdit's closed form (arXiv:2410.02355), reached through an n × n
    Cholesky factor instead of a d_in × d_in LU. With K, R over all facts so far and R = V − W₀ K it
    is the joint solve that the official sequential rule with its history of keys equals.
    """
    K, R = keys.double(), residual.double()
    return solve_with(K, R, metric.apply(K))


def solve_with(keys: Tensor, residual: Tensor, weighted: Tensor) -> Tensor:
    """The same from GK = `weighted` [d_in, n], for a G that is no AnyMetric; all float64."""
    system = keys.mT @ weighted
    system.diagonal().add_(1.0)  # symmetric, eigenvalues >= 1
    return torch.cholesky_solve(residual.mT, torch.linalg.cholesky(system)).mT @ weighted.mT


def room_left(metric: AnyMetric, keys: Tensor) -> float:
    """Share of the rank of G that edits at `keys` K [d_in, n] have not taken.

        1 − tr(KᵀGK (I + KᵀGK)⁻¹) / rank G

    The trace counts the directions that the solve holds fast: a key far above the ridge counts as
    one, a key that the ridge drowns as nothing. nan where G has no direction at all.
    """
    if not metric.rank:
        return math.nan
    K = keys.double()
    system = K.mT @ metric.apply(K)
    system.diagonal().add_(1.0)
    inverse = torch.linalg.inv(torch.linalg.cholesky(system))
    taken = K.shape[1] - float(inverse.square().sum())  # tr(S (I+S)⁻¹) = n − tr (I+S)⁻¹
    return 1 - taken / metric.rank
