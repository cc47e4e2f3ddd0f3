"""Equality-constrained editing: the new values are met exactly, at the least cost in C.

    minimise tr(Δ C Δᵀ) subject to ΔK = R      →      Δ = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹

ROME is its case of one fact, EMMET the batch. Projected inside, C⁻¹ has gains of zero outside the
null space; a key with nothing in there can't be written and gets no column of Δ, as in the rest of
the family: reports show it as its free share.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.io.settings import NotNegative, checked
from nulledit.linalg.preconditioner import Preconditioner
from nulledit.methods.filters import FLOOR
from nulledit.methods.problem import LayerProblem
from nulledit.methods.registry import Solve

logger = logging.getLogger(__name__)

NOTHING_FREE = 1e-12  # of a key's energy: below it the free part is rounding
DEPENDENT = 1e-10  # of the largest eigenvalue of the keys' correlations in C⁻¹: below it, a copy


@checked
@dataclass(frozen=True)
class RomeSettings:
    """What C is."""

    moment: bool = True
    """Whether C is the second moment; false: C = I (`mom2_adjustment: false` in the settings that
    AlphaEdit's code has for ROME on LLaMA3)."""


@checked
@dataclass(frozen=True)
class EmmetSettings:
    """How strict the equality is."""

    ridge: NotNegative = 0.0
    """Added to Kᵀ C⁻¹ K. 0: the paper's equation. The published code adds 0.1 where λ₀ = 10,000,
    which is 1,000 here and turns the method into MEMIT with λ₀ = 1,000."""


def inverse_gains(eigenvalues: Tensor, threshold: float, settings: object) -> Tensor:
    """C⁻¹: 1/s, with s not below 1e-6 of the largest; ones where settings ask for C = I."""
    del threshold
    if isinstance(settings, RomeSettings) and not settings.moment:
        return torch.ones_like(eigenvalues)
    return 1 / eigenvalues.clamp_min(FLOOR * float(eigenvalues[-1]))


def writable(keys: Tensor, preconditioner: Preconditioner) -> Tensor:
    """Which of `keys` [d_in, n] have a part that edits may use, as indices."""
    return (preconditioner.null_space_share(keys) > NOTHING_FREE).nonzero().squeeze(1)


def solve_rome(problem: LayerProblem) -> Tensor:
    """Δ = (v − W k)(C⁻¹k)ᵀ/(kᵀ C⁻¹ k): ROME (arXiv:2202.05262, Eq. 2).

    Several columns are written in turn, each on what the one before left; of equal keys the last
    one holds.
    """
    update = torch.zeros_like(problem.weight)
    for i in writable(problem.keys, problem.preconditioner).tolist():
        key = problem.keys[:, i : i + 1]
        direction = problem.preconditioner.apply(key)  # C⁻¹k [d_in, 1]
        missing = problem.residual[:, i : i + 1] - update @ key
        update += missing @ (direction / (key.mT @ direction)).mT
    return update


def solve_emmet(problem: LayerProblem) -> Tensor:
    """Δ = R (Kᵀ C⁻¹ K + ridge·I)⁻¹ Kᵀ C⁻¹: EMMET (arXiv:2403.14236).

    Where keys depend on each other equality can't hold for all; a pseudo-inverse then gives the
    nearest values (equal keys get their mean).
    """
    chosen = writable(problem.keys, problem.preconditioner)
    K, R = problem.keys[:, chosen], problem.residual[:, chosen]
    if not len(chosen):
        return torch.zeros_like(problem.weight)
    weighted = problem.preconditioner.apply(K)  # C⁻¹K [d_in, n]
    system = K.mT @ weighted
    system.diagonal().add_(problem.settings.ridge)
    scale = system.diagonal().rsqrt()  # to correlations: dependence is about angles, not lengths
    values, vectors = torch.linalg.eigh(scale[:, None] * (system + system.mT) / 2 * scale)
    kept = values > DEPENDENT * values[-1]
    if not kept.all():
        logger.warning(
            "layer %d: %d of %d keys depend on the others; values are met as nearly as can be",
            problem.layer,
            int((~kept).sum()),
            len(kept),
        )
    basis = scale[:, None] * vectors[:, kept]  # [n, rank]
    return ((R @ basis) / values[kept]) @ (weighted @ basis).mT


EQUALITY = (
    Solve(
        name="rome",
        about="one fact at a time, its value met exactly: a rank-one update",
        paper="arXiv:2202.05262",
        settings=RomeSettings,
        gains=inverse_gains,
        solve=solve_rome,
        one_by_one=True,
        cost="one product with C⁻¹ per fact; keys anew for every fact",
    ),
    Solve(
        name="emmet",
        about="a whole batch of values met exactly: ROME in batches",
        paper="arXiv:2403.14236",
        settings=EmmetSettings,
        gains=inverse_gains,
        solve=solve_emmet,
        cost="n × n eigendecomposition",
    ),
)
