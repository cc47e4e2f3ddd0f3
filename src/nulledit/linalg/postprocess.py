"""What some methods do to a finished update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEARLY_ZERO = 1e-8  # added to weights so that an entry of zero has a relative change, as published


def keep_largest(update: Tensor, weight: Tensor, share: float) -> Tensor:
    """`update` with only the `share` of its entries that is largest relative to `weight`.

    RECT (arXiv:2401.04700): of |Δ/W| the top k percent stay as they are, the others become zero.
    """
    count = min(max(round(share * update.numel()), 1), update.numel())
    relative = (update.abs() / (weight.abs() + NEARLY_ZERO)).flatten()
    kept = torch.zeros_like(update).flatten()
    top = relative.topk(count, sorted=False).indices
    kept[top] = update.flatten()[top]
    return kept.reshape(update.shape)


def restrain(update: Tensor, weight: Tensor, base: float) -> Tensor:
    """`update` with its singular values above σ_max(`weight`) brought near to it.

    PRUNE (arXiv:2405.16821): F(σ) = log_α(σ) − log_α(σ_max) + σ_max with α = `base`. The singular
    vectors stay, so what the update maps to zero it still maps to zero. An update with nothing
    above comes back as it is, to the bit.
    """
    if update.norm() <= weight.norm() / weight.shape[0] ** 0.5:  # σ of one <= σ_max of the other
        return update
    limit = torch.linalg.eigvalsh(weight @ weight.mT)[-1].sqrt()
    squares, U = torch.linalg.eigh(update @ update.mT)  # exact enough: only large ones are used
    above = squares > limit.square()
    if not above.any():
        return update
    sigma = squares[above].sqrt()
    restrained = (sigma / limit).log() / math.log(base) + limit
    high = U[:, above]
    return update - (high * (1 - restrained / sigma)) @ (high.mT @ update)
