"""What a method is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nulledit.linalg.preconditioner import Preconditioner
from nulledit.linalg.spectrum import Spectrum

TargetLoss = Callable[[Tensor], tuple[float, Tensor]]


@dataclass(frozen=True)
class LayerProblem:
    """One layer's problem: write `residual` at `keys`, starting from `weight`. All float64.

    For a `Solve` with history the columns are all facts recorded so far and `weight` is W₀;
    otherwise they are one batch's and `weight` is the one that the batch found.
    """

    layer: int
    """Block number."""
    weight: Tensor
    """W [d_out, d_in], what the update is added to."""
    original: Tensor
    """W₀ [d_out, d_in], before any edit."""
    keys: Tensor
    """K [d_in, n]."""
    residual: Tensor
    """R = V − W K [d_out, n]."""
    past_keys: Tensor
    """Keys [d_in, m] of the batches before, oldest first; none with history: they are in K."""
    spectrum: Spectrum
    """Of the preserved keys' second moment C = Q diag(s) Qᵀ."""
    preconditioner: Preconditioner
    """G = Q diag(g(s)) Qᵀ of the method's gains, zero where s >= τ if projected inside."""
    projector: Preconditioner
    """P [d_in, d_in] on the null space (s < τ)."""
    projection: str
    """none, inside or after. `after` is done by the caller."""
    settings: Any
    """The method's own settings."""
    target_loss: TargetLoss | None = None
    """Weight [d_out, d_in] -> (mean NLL of the batch's targets in nats, its gradient by the
    weight); only for a `Descent`."""
