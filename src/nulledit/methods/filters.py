"""The spectral-filter family: Δ = R (I + Kᵀ G K)⁻¹ Kᵀ G, G = Q diag(g(s)) Qᵀ; a method is a g."""

from __future__ import annotations

from torch import Tensor

from nulledit.config import MethodSettings
from nulledit.editing.problem import LayerProblem
from nulledit.linalg.solve import solve_update


def alphaedit_gains(eigenvalues: Tensor, threshold: float, settings: MethodSettings) -> Tensor:
    """AlphaEdit (arXiv:2410.02355): 1/λ₂ where the eigenvalue is below τ, else 0."""
    return (eigenvalues < threshold).to(eigenvalues) / settings.l2


def solve_filter(problem: LayerProblem) -> Tensor:
    """The family's closed form."""
    return solve_update(problem.keys, problem.residual, problem.metric)
