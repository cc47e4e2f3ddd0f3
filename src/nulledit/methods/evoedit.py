"""EvoEdit: AlphaEdit's ridge in a null space that shrinks with every edit."""

from __future__ import annotations

import torch
from torch import Tensor

from nulledit.errors import NoRoomError
from nulledit.linalg.preconditioner import Preconditioner
from nulledit.linalg.solve import solve_with
from nulledit.methods.filters import RidgeSettings, ridge_gains
from nulledit.methods.problem import LayerProblem
from nulledit.methods.registry import Solve

SPANNED = 1e-8  # of the largest singular value of the unit keys before: below it, not a direction
USED_UP = 1e-6  # of a key's free length: below it, what older edits left of it is rounding


def span(keys: Tensor, preconditioner: Preconditioner) -> Tensor:
    """Orthonormal basis [d_in, rank] of what `keys` [d_in, m] use of the preconditioner's range."""
    if not keys.shape[1]:
        return keys
    free = preconditioner.apply(keys / keys.norm(dim=0).clamp_min(torch.finfo(keys.dtype).tiny))
    U, sigma, _ = torch.linalg.svd(free, full_matrices=False)
    return U[:, sigma > SPANNED * sigma[0]]


def solve_evoedit(problem: LayerProblem) -> Tensor:
    """Δ = R Kᵀ P' (K Kᵀ P' + λ₂ I)⁻¹, P' = P − QQᵀ, Q = orth(P K_p): EvoEdit (arXiv:2510.13851).

    K_p are the keys of all batches before: their outputs stay as they are, to rounding. NoRoomError
    where they have taken all that a new key could use.
    """
    taken = span(problem.past_keys, problem.preconditioner)
    weighted = problem.preconditioner.apply(problem.keys)  # PK/λ₂
    before = weighted.norm(dim=0)
    for _ in range(2):  # once more for what rounding left
        weighted = weighted - taken @ (taken.mT @ weighted)
    void = (weighted.norm(dim=0) <= USED_UP * before) & (before > 0)
    _check_room(problem, taken.shape[1], void)
    return solve_with(problem.keys, problem.residual, weighted)


def _check_room(problem: LayerProblem, taken: int, void: Tensor) -> None:
    """NoRoomError if earlier edits took what keys could use; `void`: keys with nothing left [n]."""
    room = problem.preconditioner.rank
    if not taken or not (taken >= room or void.any()):
        return
    what = f"{room} free directions"
    if taken < room:
        what = f"that {int(void.sum())} of {len(void)} new keys could use ({taken} of {what})"
    raise NoRoomError(
        f"layer {problem.layer}: no room left: edits before have taken all {what}; undo edits, "
        "protect less (null_space.value), or use a method that shares directions, such as alphaedit"
    )


EVOEDIT = Solve(
    name="evoedit",
    about="AlphaEdit whose null space leaves out the keys of every batch before",
    paper="arXiv:2510.13851",
    settings=RidgeSettings,
    gains=ridge_gains,
    solve=solve_evoedit,
    projected=True,
    cost="n × n solve and an SVD of all past keys (d_in × m)",
)
