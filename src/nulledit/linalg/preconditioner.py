"""Preconditioners: how freely an update may move along each direction of the keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Preconditioner(Protocol):
    """A symmetric G >= 0 [d_in, d_in], which nothing needs as a matrix.

    A solver takes any class with these methods; deriving it from this one gives it the share.
    """

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [d_in, n], in float64."""
        ...

    def null_space_energy(self, keys: Tensor) -> Tensor:
        """‖P k‖² [n] of `keys` [d_in, n], P on the directions whose gain is not 0; float64."""
        ...

    def null_space_share(self, keys: Tensor) -> Tensor:
        """‖P k‖²/‖k‖² [n]: the share of each key that lies where the gain is not 0."""
        return self.null_space_energy(keys) / keys.double().square().sum(0)

    def inverse_trace(self, columns: Tensor) -> float:
        """tr(Zᵀ G⁺ Z) for `columns` Z [d_in, n] in the range of G."""
        ...

    @property
    def rank(self) -> int:
        """Number of directions with a gain: how many independent keys can still be written."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is applied."""
        ...


@dataclass(frozen=True)
class SpectralPreconditioner(Preconditioner):
    """G = r·(I − U Uᵀ) + U diag(g) Uᵀ, a gain for each direction; a gain of 0 protects one.

    Only the thinner side of a hard null space needs to be held.
    """

    vectors: Tensor
    """U [d_in, m], orthonormal columns."""
    gains: Tensor
    """g [m], >= 0, the gain along each column of U."""
    outer_gain: float
    """r >= 0, the gain along every direction orthogonal to U."""

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [d_in, n], in float64."""
        K, U, r = keys.double(), self.vectors.double(), self.outer_gain
        return r * K + U @ ((self.gains.double() - r)[:, None] * (U.mT @ K))

    def null_space_energy(self, keys: Tensor) -> Tensor:
        """‖P k‖² [n] of `keys` [d_in, n]."""
        K, U = keys.double(), self.vectors.double()
        inside = (U.mT @ K).square()  # [m, n]
        free = inside[self.gains > 0].sum(0)
        if self.outer_gain > 0:
            free = free + (K.square().sum(0) - inside.sum(0)).clamp_min(0)
        return free

    def inverse_trace(self, columns: Tensor) -> float:
        """tr(Zᵀ G⁺ Z) for `columns` Z [d_in, n]."""
        inside = (self.vectors.double().mT @ columns).square().sum(1)  # [m]
        free = self.gains > 0
        total = (inside[free] / self.gains[free].double()).sum()
        if self.outer_gain > 0:
            total = total + (columns.square().sum() - inside.sum()) / self.outer_gain
        return float(total)

    @property
    def rank(self) -> int:
        """Number of directions with a gain."""
        d, m = self.vectors.shape
        return int((self.gains > 0).sum()) + (d - m if self.outer_gain > 0 else 0)

    @property
    def device(self) -> torch.device:
        """Where it is applied."""
        return self.vectors.device


@dataclass(frozen=True)
class BlockDiagonal(Preconditioner):
    """G with blocks on its diagonal, and zero where a block is missing."""

    blocks: Mapping[int, Preconditioner]
    """By number; a dense layer has the block 0 alone, a mixture one for each open expert."""
    width: int
    """Of the keys of one block."""

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [blocks · width, n], in float64."""
        K = keys.double()
        found = torch.zeros_like(K)
        for rows, block in self._rows():
            if K[rows].any():  # a fact is routed to few of many
                found[rows] = block.apply(K[rows])
        return found

    def null_space_energy(self, keys: Tensor) -> Tensor:
        """‖P k‖² [n] of `keys` [blocks · width, n]."""
        K = keys.double()
        total = K.new_zeros(K.shape[1])
        for rows, block in self._rows():
            total += block.null_space_energy(K[rows])
        return total

    def inverse_trace(self, columns: Tensor) -> float:
        """tr(Zᵀ G⁺ Z) for `columns` Z [blocks · width, n]."""
        return sum(block.inverse_trace(columns[rows]) for rows, block in self._rows())

    @property
    def rank(self) -> int:
        """Number of directions with a gain."""
        return sum(block.rank for block in self.blocks.values())

    @property
    def device(self) -> torch.device:
        """Where it is applied."""
        return next(iter(self.blocks.values())).device

    def _rows(self) -> Iterator[tuple[slice, Preconditioner]]:
        for i, block in self.blocks.items():
            yield slice(i * self.width, (i + 1) * self.width), block
