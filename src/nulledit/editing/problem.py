"""What a method is given."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nulledit.linalg.spectrum import Metric


@dataclass(frozen=True)
class LayerProblem:
    """One layer's problem: write `residual` at `keys`, starting from `weight`. All float64.

    For a method with history the columns are all facts recorded so far and `weight` is W₀;
    otherwise they are one batch's and `weight` is the one that batch found.
    """

    layer: int
    """Block number."""
    weight: Tensor
    """[d_out, d_in], what the update is added to."""
    keys: Tensor
    """K [d_in, n]."""
    residual: Tensor
    """R = V − W K [d_out, n]."""
    metric: Metric
    """G, from the method's filter on the layer's spectrum."""
