"""Second moments, spectra and metrics that are block-diagonal: one block for each expert.

The virtual key of a mixture of experts has a block for each expert, zero where the token is not
routed (`models/experts.py`). Of its second moment C = E[k kᵀ] over all tokens only the blocks on
the diagonal are kept: with E experts that is 1/E of it. What is left out are the products of
two experts' keys at one token. With m experts a token, ‖Σ_e Δ_e k_e‖² <= m Σ_e ‖Δ_e k_e‖², so what
an update does to preserved keys is at most m times what the blocks say.

An expert that was given fewer tokens than its keys are wide is closed: what was not sampled would
pass for null space. It has no spectrum, edits leave it alone, and where a token is routed to other
experts too, those take its share.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nulledit.errors import StatisticsError
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.spectrum import Metric, Spectrum


class BlockMoment:
    """The diagonal blocks of C = E[k kᵀ] over a stream of keys [k_1; …; k_E]."""

    def __init__(
        self,
        count: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        chunk: int = 256,
    ):
        """`count` blocks of `width`; `chunk` as of `SecondMoment`."""
        self.width, self.count = width, 0
        self.sum = torch.zeros(count, width, width, dtype=torch.float64, device=device)
        self._blocks = [SecondMoment(width, device=device, chunk=chunk) for _ in range(count)]
        for block, total in zip(self._blocks, self.sum, strict=True):
            block.sum = total  # a view: all sums are one tensor

    @torch.no_grad()
    def update(self, keys: Tensor) -> BlockMoment:
        """Add `keys` [..., E·d]; leave padding out before the call."""
        rows = keys.reshape(-1, len(self._blocks), self.width)
        routed = (rows != 0).any(2)
        for i, block in enumerate(self._blocks):
            block.update(rows[routed[:, i], i])
        self.count += len(rows)
        return self

    @property
    def tokens(self) -> Tensor:
        """Tokens that were routed to each block [E], float64."""
        return torch.tensor([block.count for block in self._blocks], dtype=torch.float64)

    @property
    def sampled(self) -> int:
        """Tokens that the block with most of them was given."""
        return int(self.tokens.max())

    @property
    def counts(self) -> list[int]:
        """Keys in all, then those routed to each block; see `SecondMoment.counts`."""
        return [self.count, *(block.count for block in self._blocks)]

    def restore(self, total: Tensor, counts: Sequence[int]) -> None:
        """Go on from a `sum` and its `counts`."""
        self.sum.copy_(total)
        self.count, *tokens = counts
        for block, number in zip(self._blocks, tokens, strict=True):
            block.count = number

    def spectrum(self) -> BlockSpectrum:
        """Of the open blocks, on the CPU; StatisticsError if there is none."""
        if not self.count:
            raise ValueError("no keys were added")
        tokens = tuple(block.count for block in self._blocks)
        blocks = {
            i: Spectrum.of(total.cpu() / self.count)
            for i, total in enumerate(self.sum)
            if tokens[i] >= self.width
        }
        return BlockSpectrum(blocks, tokens, self.width)


@dataclass(frozen=True)
class BlockMetric:
    """G with a block for each open expert, and zero for the others."""

    blocks: dict[int, Metric]
    """By number of the expert."""
    count: int
    """Experts, closed ones included."""
    width: int
    """Of one expert's keys."""

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [E·d, n], in float64."""
        K = keys.double()
        found = torch.zeros_like(K)
        for rows, block in self._rows():
            if K[rows].any():  # a fact is routed to few of many
                found[rows] = block.apply(K[rows])
        return found

    def free_energy(self, keys: Tensor) -> Tensor:
        """‖P k‖² [n] of `keys` [E·d, n], P on the directions whose gain is not 0; float64."""
        K = keys.double()
        total = K.new_zeros(K.shape[1])
        for rows, block in self._rows():
            total += block.free_energy(K[rows])
        return total

    def free_share(self, keys: Tensor) -> Tensor:
        """‖P k‖²/‖k‖² [n]: the share of each key that lies where the gain is not 0."""
        return self.free_energy(keys) / keys.double().square().sum(0)

    def inverse_trace(self, columns: Tensor) -> float:
        """tr(Zᵀ G⁺ Z) for `columns` Z [E·d, n] in the range of G."""
        return sum(block.inverse_trace(columns[rows]) for rows, block in self._rows())

    @property
    def rank(self) -> int:
        """Number of directions with a gain."""
        return sum(block.rank for block in self.blocks.values())

    @property
    def device(self) -> torch.device:
        """Where it is applied."""
        return next(iter(self.blocks.values())).device

    def _rows(self) -> Iterator[tuple[slice, Metric]]:
        for i, block in self.blocks.items():
            yield slice(i * self.width, (i + 1) * self.width), block


@dataclass(frozen=True)
class BlockSpectrum:
    """The spectra of C's diagonal blocks, read as one: eigenvalues of all open experts, ascending.

    So a null-space rule sets one threshold for a layer, and a filter is a function of them all.
    """

    blocks: dict[int, Spectrum]
    """Of the open experts, by their number, ascending; at least one."""
    tokens: tuple[int, ...]
    """Tokens that were routed to each expert."""
    width: int
    """Of one expert's keys."""

    def __post_init__(self) -> None:
        opened = [i for i, number in enumerate(self.tokens) if number >= self.width]
        if not opened:
            raise StatisticsError(
                f"no expert was given as many tokens as its keys are wide ({self.width}); the "
                f"busiest of {len(self.tokens)} got {max(self.tokens)}: use a larger corpus"
            )
        wrong = [i for i, s in self.blocks.items() if s.d_in != self.width]
        if list(self.blocks) != opened or wrong:
            raise StatisticsError(
                f"expected spectra, {self.width} wide, of the experts {opened}, which got as many "
                f"tokens; found those of {list(self.blocks)}"
            )

    @property
    def d_in(self) -> int:
        """Width of the virtual keys, closed experts included."""
        return len(self.tokens) * self.width

    @property
    def closed(self) -> int:
        """Experts that edits leave alone."""
        return len(self.tokens) - len(self.blocks)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """s [open·d], ascending, float64, squared activation units."""
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
        """Number of directions that edits may not use, those of closed experts among them."""
        return int((self.eigenvalues >= threshold).sum()) + self.closed * self.width

    def leakage(self, threshold: float) -> float:
        """Share of the open experts' energy that is left unprotected."""
        s = self.eigenvalues
        return float(s[s < threshold].sum() / s.sum())

    def metric(self, gains: Tensor) -> BlockMetric:
        """The metric with `gains` g(s) along the eigenvectors; LookupError as of `Spectrum`."""
        parts = self._split(gains)
        metrics = {i: block.metric(parts[i]) for i, block in self.blocks.items()}
        return BlockMetric(metrics, len(self.tokens), self.width)

    def whole(self) -> BlockSpectrum:
        """StatisticsError always: who needs C itself would need what is left out of it."""
        raise StatisticsError(
            "this method reads the second moment itself, of which experts have diagonal blocks "
            "only: use another one, such as alphaedit, memit or soft"
        )

    def reduced(self, *gains: Tensor) -> BlockSpectrum:
        """Without the eigenvectors that no metric of these `gains` needs."""
        parts = [self._split(g) for g in gains]
        kept = {i: block.reduced(*(p[i] for p in parts)) for i, block in self.blocks.items()}
        return BlockSpectrum(kept, self.tokens, self.width)

    def compact(self, threshold: float, *, dtype: torch.dtype = torch.float16) -> BlockSpectrum:
        """Keep only the thinner side of each block's null space, rounded to `dtype`."""
        kept = {i: block.compact(threshold, dtype=dtype) for i, block in self.blocks.items()}
        return BlockSpectrum(kept, self.tokens, self.width)


AnyMetric = Metric | BlockMetric
AnySpectrum = Spectrum | BlockSpectrum
AnyMoment = SecondMoment | BlockMoment


def parts_of(spectrum: AnySpectrum, name: str) -> dict[str, Spectrum]:
    """The spectra that one is made of, under the names that files keep them by."""
    if isinstance(spectrum, Spectrum):
        return {name: spectrum}
    return {f"{name}.{i}": block for i, block in spectrum.blocks.items()}


def part_names(name: str, count: int, held: Container[str]) -> dict[int, str]:
    """Number of each open expert of `count` -> the name that a file, which has the tensors `held`,
    keeps its spectrum by."""
    names = {i: f"{name}.{i}" for i in range(count)}
    return {i: part for i, part in names.items() if f"eigenvalues.{part}" in held}
