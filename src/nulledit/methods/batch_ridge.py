"""A ridge that knows the batch: what its own facts weigh in the system that writes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.io.settings import NotNegative, Positive, checked


@checked
@dataclass(frozen=True)
class BatchRidge:
    """T = τI + (ρ/n) 11ᵀ in the place of I; facts of batches before weigh 1, as ever."""

    tau: Positive = 1.0
    """τ, weight of each fact of the batch in its own solve. Below 1 it is written harder
    (poly2-hybrid: 0.3 to 0.8)."""
    rho: NotNegative = 0.0
    """ρ, further weight of what all facts of the batch have in common, which is written less
    (poly2-hybrid: 2 to 3, as ρ of a single fact times the batch's size n)."""


def own_weights(settings: object, n: int) -> Tensor | None:
    """T [n, n] of a batch of n facts, float64; None where it is I."""
    if not isinstance(settings, BatchRidge) or (settings.tau, settings.rho) == (1.0, 0.0):
        return None
    return settings.tau * torch.eye(n, dtype=torch.float64) + settings.rho / n
