"""Preconditioners: how freely an update may move along each direction of the keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Preconditioner(Protocol):
    """A symmetric G >= 0 [d_in, d_in] as solves need it, never as a matrix."""

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [d_in, n], in float64."""
        ...

    def null_space_share(self, keys: Tensor) -> Tensor:
        """‖P k‖²/‖k‖² [n] of `keys` [d_in, n], P on the directions whose gain is not 0."""
        ...

    def inverse_trace(self, columns: Tensor) -> float:
        """tr(Zᵀ G⁺ Z) for `columns` Z [d_in, n] in the range of G."""
        ...

    @property
    def rank(self) -> int:
        """Number of directions with a gain: how many independent keys can still be written."""
        ...


class BlockGains(NamedTuple):
    """r·(I − U Uᵀ) + U diag(g) Uᵀ. Of a hard null space only the thinner side has to be held."""

    vectors: Tensor
    """U [width, m], orthonormal columns."""
    gains: Tensor
    """g [m], >= 0, the gain along each column of U; 0 protects it."""
    outer_gain: float
    """r >= 0, the gain along every direction orthogonal to U."""


@dataclass(frozen=True)
class SpectralPreconditioner:
    """G with blocks on its diagonal, each a gain for every direction; zero where one is missing."""

    blocks: Mapping[int, BlockGains]
    """By number; a dense layer has the block 0 alone, a mixture one for each open expert."""
    width: int
    """Of the keys of one block."""

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [d_in, n], in float64."""
        K = keys.double()
        found = K.new_zeros(K.shape)
        for rows, (vectors, gains, r) in self._rows():
            part, U = K[rows], vectors.double()
            if len(self.blocks) > 1 and not part.any():  # a fact is routed to few of many
                continue
            inside = U @ ((gains.double() - r)[:, None] * (U.mT @ part))
            torch.add(r * part, inside, out=found[rows])
        return found

    def null_space_share(self, keys: Tensor) -> Tensor:
        """‖P k‖²/‖k‖² [n] of `keys` [d_in, n]."""
        K = keys.double()
        energy = K.new_zeros(K.shape[1])
        for rows, (vectors, gains, r) in self._rows():
            inside = (vectors.double().mT @ K[rows]).square()  # [m, n]
            free = inside[gains > 0].sum(0)
            if r > 0:
                free = free + (K[rows].square().sum(0) - inside.sum(0)).clamp_min(0)
            energy += free
        return energy / K.square().sum(0)

    def inverse_trace(self, columns: Tensor) -> float:
        """tr(Zᵀ G⁺ Z) for `columns` Z [d_in, n]."""
        total = 0.0
        for rows, (vectors, gains, r) in self._rows():
            inside = (vectors.double().mT @ columns[rows]).square().sum(1)  # [m]
            free = gains > 0
            part = (inside[free] / gains[free].double()).sum()
            if r > 0:
                part = part + (columns[rows].square().sum() - inside.sum()) / r
            total += float(part)
        return total

    @property
    def rank(self) -> int:
        """Number of directions with a gain."""
        return sum(
            int((gains > 0).sum()) + (self.width - len(gains) if r > 0 else 0)
            for _, gains, r in self.blocks.values()
        )

    def _rows(self) -> Iterator[tuple[slice, BlockGains]]:
        for i, block in self.blocks.items():
            yield slice(i * self.width, (i + 1) * self.width), block
