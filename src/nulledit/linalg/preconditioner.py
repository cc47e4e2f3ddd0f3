"""Preconditioners: how freely an update may move along each direction of the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

from torch import Tensor


class Preconditioner(Protocol):
    """A symmetric G = Φ D Φᵀ >= 0 [d_in, d_in] as solves need it, never as a matrix.

    Φ [d_in, m] is orthonormal: the directions that have a gain, where those are held as vectors,
    else all directions as they are. Solves of many batches work on coordinates ΦᵀK.
    """

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [d_in, n], in float64."""
        ...

    def coordinates(self, keys: Tensor) -> Tensor:
        """ΦᵀK [m, n] of `keys` K [d_in, n], in float64."""
        ...

    def weigh(self, coordinates: Tensor) -> Tensor:
        """D X of `coordinates` X [m, n]."""
        ...

    def expand(self, coordinates: Tensor) -> Tensor:
        """Φ X [d_in, n] of `coordinates` X [m, n]."""
        ...

    def inverse_trace(self, coordinates: Tensor) -> float:
        """tr(Xᵀ D⁺ X) of `coordinates` X [m, n] in the range of D."""
        ...

    def null_space_share(self, keys: Tensor) -> Tensor:
        """‖P k‖²/‖k‖² [n] of `keys` [d_in, n], P on the directions whose gain is not 0."""
        ...

    @property
    def rank(self) -> int:
        """Number of directions with a gain: how many independent keys can still be written."""
        ...


class BlockGains(NamedTuple):
    """r·(I − U Uᵀ) + U diag(g) Uᵀ. Of a hard null space only the thinner side has to be held.

    Without r its coordinates are along the columns of U, else along all directions as they are.
    """

    vectors: Tensor
    """U [width, m], orthonormal columns."""
    gains: Tensor
    """g [m], >= 0, the gain along each column of U; 0 protects it."""
    outer_gain: float
    """r >= 0, the gain along every direction orthogonal to U."""

    @property
    def size(self) -> int:
        """How many coordinates there are."""
        return self.vectors.shape[0 if self.outer_gain else 1]

    def coordinates(self, keys: Tensor) -> Tensor:
        """Of `keys` [width, n]: [size, n]."""
        return keys if self.outer_gain else self.vectors.double().mT @ keys

    def weigh(self, coordinates: Tensor) -> Tensor:
        """`coordinates` [size, n] times the gains."""
        g, r = self.gains.double()[:, None], self.outer_gain
        if not r:
            return g * coordinates
        U = self.vectors.double()
        return (U @ ((g - r) * (U.mT @ coordinates))).add_(coordinates, alpha=r)

    def expand(self, coordinates: Tensor) -> Tensor:
        """The keys [width, n] that have `coordinates` [size, n]."""
        return coordinates if self.outer_gain else self.vectors.double() @ coordinates

    def inverse_trace(self, coordinates: Tensor) -> float:
        """Σ of squared `coordinates` [size, n], each over its gain, where there is one."""
        r, free = self.outer_gain, self.gains > 0
        inside = self.vectors.double().mT @ coordinates if r else coordinates
        energy = inside.square().sum(1)  # [m]
        total = (energy[free] / self.gains[free].double()).sum()
        if r:
            total = total + (coordinates.square().sum() - energy.sum()) / r
        return float(total)

    def free_energy(self, keys: Tensor) -> Tensor:
        """‖P k‖² [n] of `keys` [width, n]."""
        inside = (self.vectors.double().mT @ keys).square()  # [m, n]
        free = inside[self.gains > 0].sum(0)
        if self.outer_gain:
            free = free + (keys.square().sum(0) - inside.sum(0)).clamp_min(0)
        return free

    @property
    def rank(self) -> int:
        """Number of directions with a gain."""
        outer = len(self.vectors) - len(self.gains) if self.outer_gain else 0
        return int((self.gains > 0).sum()) + outer


@dataclass(frozen=True)
class SpectralPreconditioner:
    """G with blocks on its diagonal, each a gain for every direction; zero where one is missing."""

    blocks: Mapping[int, BlockGains]
    """By number; a dense layer has the block 0 alone, a mixture one for each open expert."""
    width: int
    """Of the keys of one block."""
    d_in: int
    """Of the keys of all blocks, missing ones included."""

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [d_in, n], in float64."""
        return self.expand(self.weigh(self.coordinates(keys)))

    def coordinates(self, keys: Tensor) -> Tensor:
        """ΦᵀK [m, n] of `keys` K [d_in, n], in float64."""
        work, height = BlockGains.coordinates, self._height
        return self._by_block(work, keys.double(), self._rows, self._places, height)

    def weigh(self, coordinates: Tensor) -> Tensor:
        """D X of `coordinates` X [m, n]."""
        work, height = BlockGains.weigh, self._height
        return self._by_block(work, coordinates, self._places, self._places, height)

    def expand(self, coordinates: Tensor) -> Tensor:
        """Φ X [d_in, n] of `coordinates` X [m, n]."""
        work, height = BlockGains.expand, self.d_in
        return self._by_block(work, coordinates, self._places, self._rows, height)

    def inverse_trace(self, coordinates: Tensor) -> float:
        """tr(Xᵀ D⁺ X) of `coordinates` X [m, n]."""
        return sum(b.inverse_trace(coordinates[self._places[i]]) for i, b in self.blocks.items())

    def null_space_share(self, keys: Tensor) -> Tensor:
        """‖P k‖²/‖k‖² [n] of `keys` [d_in, n]."""
        K = keys.double()
        free = K.new_zeros(K.shape[1])
        for i, block in self.blocks.items():
            free += block.free_energy(K[self._rows[i]])
        return free / K.square().sum(0)

    @property
    def rank(self) -> int:
        """Number of directions with a gain."""
        return sum(block.rank for block in self.blocks.values())

    @cached_property
    def _rows(self) -> dict[int, slice]:
        """Where each block's keys are."""
        return {i: slice(i * self.width, (i + 1) * self.width) for i in self.blocks}

    @cached_property
    def _places(self) -> dict[int, slice]:
        """Where each block's coordinates are."""
        ends = accumulate((block.size for block in self.blocks.values()), initial=0)
        return {i: slice(*pair) for i, pair in zip(self.blocks, pairwise(ends), strict=True)}

    @property
    def _height(self) -> int:
        """How many coordinates there are, m."""
        return sum(block.size for block in self.blocks.values())

    def _by_block(
        self,
        work: Callable[[BlockGains, Tensor], Tensor],
        given: Tensor,
        source: Mapping[int, slice],
        result: Mapping[int, slice],
        height: int,
    ) -> Tensor:
        """What `work` makes of the part of `given` that `source` says of each block.

        It stands where `result` says, in `height` rows.
        """
        if len(self.blocks) == 1 and self.d_in == self.width:
            (block,) = self.blocks.values()
            return work(block, given)
        found = given.new_zeros(height, given.shape[1])
        for i, block in self.blocks.items():
            part = given[source[i]]
            if part.any():  # a fact is routed to few of many experts
                found[result[i]] = work(block, part)
        return found
