"""What facts weigh in the solve of a batch: its own, and those of batches before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.io.settings import Count, NotNegative, Positive, checked
from nulledit.linalg.angles import unit_columns


@checked
@dataclass(frozen=True)
class StreamSettings:
    """Weights in the solve of one batch, whose facts weigh 1 in those of later batches."""

    tau: Positive = 1.0
    """τ, weight of each fact of the batch in its own solve. Below 1 it is written harder
    (poly2-hybrid: 0.3 to 0.8)."""
    rho: NotNegative = 0.0
    """ρ, further weight of what all facts of the batch have in common, which is written less
    (poly2-hybrid: 2 to 3, as ρ of a single fact times the batch's size n)."""
    guard: NotNegative = 0.0
    """λ: the past facts nearest to the batch weigh 1 + λ·(largest cosine of their key with one of
    the batch's), so that what it endangers is held faster (PathGuard)."""
    guarded: Count = 100
    """How many past facts those are."""


def own_weights(settings: object, n: int) -> Tensor | None:
    """T = τI + (ρ/n) 11ᵀ [n, n] of a batch of n facts, float64; None where it is I."""
    if not isinstance(settings, StreamSettings) or (settings.tau, settings.rho) == (1.0, 0.0):
        return None
    return settings.tau * torch.eye(n, dtype=torch.float64) + settings.rho / n


def endangered(settings: object, keys: Tensor, past_keys: Callable[[], Tensor]) -> Tensor | None:
    """√(λ c_j) k_j [d_in, m] of the past keys k_j nearest to a batch's `keys` [d_in, n].

    c_j is the largest cosine of k_j with one of them, at least 0. None where nothing is guarded;
    `past_keys` [d_in, N] are not asked for then.
    """
    if not isinstance(settings, StreamSettings) or not settings.guard:
        return None
    past = past_keys()
    cosines = (unit_columns(past).mT @ unit_columns(keys)).max(1).values.clamp_min(0)
    c, nearest = cosines.topk(min(settings.guarded, past.shape[1]))
    return past[:, nearest] * (settings.guard * c).sqrt()
