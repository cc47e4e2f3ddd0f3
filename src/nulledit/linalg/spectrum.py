"""Spectra of second moments in diagonal blocks, and null-space rules.

A dense layer is one block. The virtual key of a mixture of experts has a block for each expert,
zero where the token is not routed (`models/experts.py`). Of its second moment C = E[k kᵀ] over all
tokens only the blocks on the diagonal are kept: with E experts that is 1/E of it. What is left out
are the products of two experts' keys at one token. With m experts a token, ‖Σ_e Δ_e k_e‖² <=
m Σ_e ‖Δ_e k_e‖², so what an update does to preserved keys is at most m times what the blocks say.

An expert that was given fewer tokens than its keys are wide is closed: what was not sampled would
pass for null space. It has no block, edits leave it alone, and where a token is routed to other
experts too, those take its share.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from nulledit.errors import StatisticsError
from nulledit.linalg.preconditioner import BlockGains, SpectralPreconditioner

MASSIVE_SHARE = (
    0.2  # a direction with more of all energy than this is always protected by `leakage`
)

NEWTON_STEPS = 8
"""At most; eigenvectors in float32 take 1, in float16 some 3."""


@dataclass(frozen=True)
class Block:
    """Eigenvalues s of a block C = Q diag(s) Qᵀ, all of them, and the eigenvectors at hand.

    A full block holds every eigenvector. A compact one holds those `start <= i < stop` only (the
    thinner side of a null space) and serves exactly the filters that are constant elsewhere.
    """

    eigenvalues: Tensor
    """s [width], ascending, float64, squared activation units."""
    eigenvectors: Tensor
    """Q[:, start:stop] [width, stop - start]."""
    start: int = 0
    """Index of the first eigenvector held."""

    @classmethod
    def of(cls, moment: Tensor) -> Block:
        """Decompose a second moment C [width, width] (float64, `eigh`)."""
        C = moment.double()
        if not torch.isfinite(C).all():
            raise ValueError("the second moment has entries that are not finite")
        values, vectors = torch.linalg.eigh((C + C.mT) / 2)
        return cls(values.clamp_min(0), vectors)

    @property
    def width(self) -> int:
        """Width of its keys."""
        return len(self.eigenvalues)

    @property
    def stop(self) -> int:
        """One past the index of the last eigenvector held."""
        return self.start + self.eigenvectors.shape[1]

    def filtered(self, gains: Tensor) -> BlockGains:
        """`gains` [width] along its eigenvectors; LookupError if that needs others than it has."""
        odd, rest = _odd_gains(gains)
        if len(odd) and (int(odd[0]) < self.start or int(odd[-1]) >= self.stop):
            raise LookupError(
                f"needs eigenvectors {int(odd[0])} to {int(odd[-1])} of {self.width}; "
                f"held are {self.start} to {self.stop - 1}"
            )
        return BlockGains(self.eigenvectors[:, odd - self.start], gains[odd], rest)

    def reduced(self, *gains: Tensor) -> Block:
        """Without the eigenvectors that no preconditioner of these `gains` needs."""
        odd = torch.cat([_odd_gains(g)[0] for g in gains])
        start, stop = (int(odd.min()), int(odd.max()) + 1) if len(odd) else (self.start, self.start)
        kept = self.eigenvectors[:, start - self.start : stop - self.start]
        return Block(self.eigenvalues, kept, start)

    def orthonormal(self) -> Block:
        """The same with eigenvectors made orthonormal again in float64 after rounding.

        By the polar factor U (UᵀU)^(-1/2), the orthonormal set nearest to the rounded one, through
        Newton and Schulz's U ← U (3I − UᵀU)/2: an error e leaves ¾e². Where U is too far from
        orthonormal the result is not, or is nan.
        """
        U = self.eigenvectors.double()
        for _ in range(NEWTON_STEPS if U.shape[1] else 0):
            error = -U.mT @ U
            error.diagonal().add_(1.0)  # I − UᵀU
            U = U + U @ error / 2
            if float(error.abs().max()) < torch.finfo(U.dtype).eps ** 0.5:
                break
        return replace(self, eigenvectors=U)


@dataclass(frozen=True)
class Spectrum:
    """The blocks of a layer's C, read as one: eigenvalues of all of them, ascending.

    So a null-space rule sets one threshold for a layer, and a filter is a function of them all.
    """

    blocks: dict[int, Block]
    """By number, ascending: of a dense layer the block 0, of a mixture those of open experts."""
    width: int
    """Of the keys of one block."""
    tokens: tuple[int, ...] = ()
    """Tokens that were routed to each expert; empty for a dense layer."""

    def __post_init__(self) -> None:
        opened = [i for i, number in enumerate(self.tokens or [self.width]) if number >= self.width]
        if not opened:
            raise StatisticsError(
                f"no expert was given as many tokens as its keys are wide ({self.width}); the "
                f"busiest of {len(self.tokens)} got {max(self.tokens)}: use a larger corpus"
            )
        wrong = [i for i, block in self.blocks.items() if block.width != self.width]
        if list(self.blocks) != opened or wrong:
            raise StatisticsError(
                f"expected spectra, {self.width} wide, of the experts {opened}, which got as many "
                f"tokens; found those of {list(self.blocks)}"
            )

    @classmethod
    def joined(cls, blocks: dict[int, Block], tokens: Iterable[int] = ()) -> Spectrum:
        """Of blocks that all have one width; without `tokens` of the one of a dense layer."""
        width = next(iter(blocks.values())).width if blocks else 0
        return cls(blocks, width, tuple(map(int, tokens)))

    @classmethod
    def of(cls, moment: Tensor) -> Spectrum:
        """Decompose the second moment C [d_in, d_in] of a dense layer."""
        return cls.joined({0: Block.of(moment)})

    def parts(self, name: str) -> dict[str, Block]:
        """Its blocks under the names that files keep them by."""
        return {f"{name}.{i}" if self.tokens else name: b for i, b in self.blocks.items()}

    @property
    def d_in(self) -> int:
        """Width of the keys, closed experts included."""
        return max(len(self.tokens), 1) * self.width

    @property
    def closed(self) -> int:
        """Experts that edits leave alone."""
        return max(len(self.tokens), 1) - len(self.blocks)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """s of all blocks, ascending, float64, squared activation units."""
        return self._joined[self._order]

    @cached_property
    def _joined(self) -> Tensor:
        return torch.cat([block.eigenvalues for block in self.blocks.values()])

    @cached_property
    def _order(self) -> Tensor:
        return self._joined.argsort(stable=True)

    def _split(self, gains: Tensor) -> dict[int, Tensor]:
        """Gains along each block's eigenvectors, of those along `eigenvalues`."""
        by_block = torch.empty_like(gains)
        by_block[self._order.to(gains.device)] = gains
        return dict(zip(self.blocks, by_block.split(self.width), strict=True))

    def protected(self, threshold: float) -> int:
        """Number of directions with eigenvalue >= `threshold`, which edits may not use, and of
        those of closed experts."""
        return int((self.eigenvalues >= threshold).sum()) + self.closed * self.width

    def leakage(self, threshold: float) -> float:
        """tr(PC)/tr(C): share of the preserved keys' energy that is left unprotected."""
        s = self.eigenvalues
        return float(s[s < threshold].sum() / s.sum())

    def preconditioner(self, gains: Tensor) -> SpectralPreconditioner:
        """The one with `gains` g(s) along the eigenvectors, in the order of `eigenvalues`.

        LookupError if it needs eigenvectors that a compact spectrum lacks.
        """
        parts = self._split(gains)
        filtered = {i: block.filtered(parts[i]) for i, block in self.blocks.items()}
        return SpectralPreconditioner(filtered, self.width, self.d_in)

    def whole(self) -> Block:
        """C as one block, for those who need it itself.

        LookupError unless every eigenvector is held; StatisticsError for a mixture of experts.
        """
        if self.tokens:
            raise StatisticsError(
                "this method reads the second moment itself, of which experts have diagonal blocks "
                "only: use another one, such as alphaedit, memit or soft"
            )
        block, held = self.blocks[0], self.blocks[0].eigenvectors.shape[1]
        if held < self.width:
            raise LookupError(f"needs all {self.width} eigenvectors; held are {held}")
        return block

    def reduced(self, *gains: Tensor) -> Spectrum:
        """Without the eigenvectors that no preconditioner of these `gains` needs."""
        parts = [self._split(g) for g in gains]
        kept = {i: block.reduced(*(p[i] for p in parts)) for i, block in self.blocks.items()}
        return replace(self, blocks=kept)

    def compact(self, threshold: float, *, dtype: torch.dtype = torch.float16) -> Spectrum:
        """Keep only the thinner side of each block's null space, rounded to `dtype`."""
        thin = self.reduced((self.eigenvalues < threshold).double()).blocks
        kept = {i: replace(b, eigenvectors=b.eigenvectors.to(dtype)) for i, b in thin.items()}
        return replace(self, blocks=kept)


def part_names(name: str, experts: int, held: Container[str]) -> dict[int, str]:
    """Number of each block -> the name that a file, which has the tensors `held`, keeps it by."""
    if not experts:
        return {0: name}
    names = {i: f"{name}.{i}" for i in range(experts)}
    return {i: part for i, part in names.items() if f"eigenvalues.{part}" in held}


def _odd_gains(gains: Tensor) -> tuple[Tensor, float]:
    """Indices whose gain is not that of the rest, and the rest's gain: that of the larger end."""
    low, high = gains[0], gains[-1]
    rest = low if (gains == low).sum() >= (gains == high).sum() else high
    return (gains != rest).nonzero().squeeze(1), float(rest)


def threshold_absolute(eigenvalues: Tensor, value: float) -> float:
    """AlphaEdit as published: τ itself, in squared activation units (2e-2 in the official code)."""
    del eigenvalues
    return value


def threshold_leakage(eigenvalues: Tensor, value: float) -> float:
    """The largest τ whose free directions hold at most the share `value` of all energy.

    Directions with over 20 % of all energy (massive activations) are set aside first: always
    protected, and not counted, or one of them would let everything else pass as harmless.
    """
    s = eigenvalues.double()
    counted = s[s <= MASSIVE_SHARE * s.sum()]
    shares = counted.cumsum(0) / counted.sum()
    free = int((shares <= value).sum())
    return (
        float(counted[free])
        if free < len(counted)
        else math.nextafter(float(counted[-1]), math.inf)
    )


def threshold_median(eigenvalues: Tensor, value: float) -> float:
    """τ as the multiple `value` of the median eigenvalue."""
    return value * float(eigenvalues.double().median())


RULES = {
    "absolute": threshold_absolute,
    "leakage": threshold_leakage,
    "median": threshold_median,
}
