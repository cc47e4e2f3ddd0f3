"""The one n × n system that most of the family comes down to, for all keys or batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.errors import SolveError
from nulledit.linalg.preconditioner import Preconditioner

BLOCK = 256  # columns of Z that are joined in one block
SQUARE = 512  # columns of a symmetric product that are made at once


def solve_update(keys: Tensor, residual: Tensor, preconditioner: Preconditioner) -> Tensor:
    """Update Δ [d_out, d_in] that writes `residual` R [d_out, n] at `keys` K [d_in, n], in float64.

        Δ = argmin ‖ΔK − R‖²_F + tr(Δ G⁺ Δᵀ), rows of Δ in range(G)   =   R (I + Kᵀ G K)⁻¹ Kᵀ G

    With G = P/λ₂ this is AlphaEdit's closed form (arXiv:2410.02355), reached through an n × n
    Cholesky factor instead of a d_in × d_in LU. With K, R over all facts so far and R = V − W₀ K it
    is the joint solve that the official sequential rule with its history of keys equals.
    """
    K, R = keys.double(), residual.double()
    return solve_with(K, R, preconditioner.apply(K))


def solve_weighed(keys: Tensor, residual: Tensor, weighted: Tensor, own: Tensor) -> Tensor:
    """The same where a column weighs otherwise in the system than in what is written.

        Δ = R (I + M T)⁻¹ KᵀG   =   R Kᵀ (G⁻¹ + K T Kᵀ)⁻¹,   M = KᵀGK

    `weighted` is GK [d_in, n], `own` T [n, n] >= 0, symmetric; all float64. T = I: `solve_update`.
    """
    return _answers(keys.mT @ weighted, residual, own) @ weighted.mT


def _answers(moment: Tensor, residual: Tensor, own: Tensor) -> Tensor:
    """R (I + M T)⁻¹ [d_out, n] of `moment` M [n, n]."""
    system = moment @ own
    system.diagonal().add_(1.0)  # eigenvalues >= 1: those of M T are of a product of two >= 0
    return torch.linalg.solve(system, residual, left=False)


def gram(matrix: Tensor) -> Tensor:
    """AᵀA [n, n] of `matrix` A [m, n]: the blocks below the diagonal are those above it."""
    n = matrix.shape[1]
    found = matrix.new_empty(n, n)
    for first in range(0, n, SQUARE):
        last = first + SQUARE
        found[first:last, first:] = matrix[:, first:last].mT @ matrix[:, first:]
        found[last:, first:last] = found[first:last, last:].mT
    return found


def factor(keys: Tensor, weighted: Tensor) -> Tensor:
    """The lower factor of I + KᵀGK [n, n] for `keys` K and GK = `weighted`, [d_in, n] each."""
    system = keys.mT @ weighted
    system.diagonal().add_(1.0)  # symmetric, eigenvalues >= 1
    return cholesky(system)


def cholesky(system: Tensor) -> Tensor:
    """The lower factor of a positive definite `system` [n, n]; SolveError where rounding is not."""
    try:
        return torch.linalg.cholesky(system)
    except torch.linalg.LinAlgError as error:
        raise SolveError(
            f"the system of {len(system)} keys can't be solved in float64: its largest entry is "
            f"{float(system.abs().max()):.2g} where 1 is added: try a larger method.l2, or fewer "
            "facts"
        ) from error


def solve_with(keys: Tensor, residual: Tensor, weighted: Tensor) -> Tensor:
    """The same from GK = `weighted` [d_in, n], where only that is known; all float64."""
    return torch.cholesky_solve(residual.mT, factor(keys, weighted)).mT @ weighted.mT


@dataclass(frozen=True)
class RecursiveState:
    """What keys held fast leave of a preconditioner: G' = G − GK (I + KᵀGK)⁻¹ KᵀG = Φ (D − ZZᵀ) Φᵀ.

    The joint solve over all keys so far is a sum over batches, each with the G' that the batches
    before left, and with the residual that the present weight leaves (recursive least squares):

        Δ = Σ_b R_b (I + K_bᵀ G' K_b)⁻¹ K_bᵀ G',      R_b = V_b − W K_b

    So a batch of n columns after N others costs O(m N n), not a solve of N + n columns: nothing
    that the columns before went through is done again. m is the number of coordinates ΦᵀK of a key
    (`Preconditioner`): of a hard null space that is the thinner side, the directions in it.
    """

    preconditioner: Preconditioner
    """G = Φ D Φᵀ."""
    blocks: tuple[Tensor, ...] = ()
    """Z [m, columns] in blocks, float64; none in the dense form."""
    dense: Tensor | None = None
    """D − ZZᵀ [m, m] itself, once Z would be wider than that."""
    columns: int = 0
    """Keys held so far."""
    taken: float = 0.0
    """tr(KᵀGK (I + KᵀGK)⁻¹): how many directions they hold fast, see `room_left`."""

    def write(
        self,
        keys: Tensor,
        residual: Tensor,
        *,
        own: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, RecursiveState]:
        """Δ [d_out, d_in] that writes `residual` R_b at `keys` K_b, and what is left after it.

        With `own` T [n, n], Δ is that of `solve_weighed`; with keys `beside` B [d_in, k], G'⁻¹ is
        G'⁻¹ + BBᵀ in it. What is left is the same, so that later batches meet K_b as all others.
        """
        G = self.preconditioner
        inside = G.coordinates(keys)
        weighted = self._weigh(inside)
        L = factor(inside, weighted)
        Z = torch.linalg.solve_triangular(L, weighted.mT, upper=False).mT
        if own is None and beside is None:
            Y = torch.linalg.solve_triangular(L, residual.mT, upper=False)
            return Y.mT @ G.expand(Z).mT, self._without(Z)
        T = torch.eye(keys.shape[1]).to(inside) if own is None else own.to(inside)
        if beside is not None:  # columns that are to give 0
            others = G.coordinates(beside)
            inside = torch.cat([inside, others], dim=1)
            weighted = torch.cat([weighted, self._weigh(others)], dim=1)
            residual = torch.nn.functional.pad(residual, (0, beside.shape[1]))
            T = torch.block_diag(T, torch.eye(beside.shape[1]).to(T))
        answers = _answers(inside.mT @ weighted, residual, T)
        return answers @ G.expand(weighted).mT, self._without(Z)

    def _weigh(self, inside: Tensor) -> Tensor:
        """(D − ZZᵀ) X of coordinates X [m, n]."""
        if self.dense is not None:
            return self.dense @ inside
        weighted = self.preconditioner.weigh(inside)
        for Z in self.blocks:
            weighted -= Z @ (Z.mT @ inside)
        return weighted

    def _without(self, block: Tensor) -> RecursiveState:
        """What a further `block` of Z [m, n] leaves."""
        columns = self.columns + block.shape[1]
        taken = self.taken + self.preconditioner.inverse_trace(block)
        dense = self.dense
        if dense is None and columns > len(block):
            dense = self._weigh(torch.eye(len(block), dtype=block.dtype, device=block.device))
        if dense is not None:
            left = torch.addmm(dense, block, block.mT, alpha=-1)
            return RecursiveState(self.preconditioner, (), left, columns, taken)
        *before, last = self.blocks or (block[:, :0],)
        if last.shape[1] + block.shape[1] > BLOCK:
            blocks = (*self.blocks, block)
        else:  # many batches of few facts would else be as many small products
            blocks = (*before, torch.cat([last, block], dim=1))
        return RecursiveState(self.preconditioner, blocks, None, columns, taken)


def room_left(preconditioner: Preconditioner, keys: Tensor) -> float:
    """Share of the rank of G that edits at `keys` K [d_in, n] have not taken.

        1 − tr(KᵀGK (I + KᵀGK)⁻¹) / rank G

    The trace counts the directions that the solve holds fast: a key far above the ridge counts as
    one, a key that the ridge drowns as nothing. nan where G has no direction at all.
    """
    if not preconditioner.rank:
        return math.nan
    K = keys.double()
    inverse = torch.linalg.inv(factor(K, preconditioner.apply(K)))
    taken = K.shape[1] - float(inverse.square().sum())  # tr(S (I+S)⁻¹) = n − tr (I+S)⁻¹
    return 1 - taken / preconditioner.rank
