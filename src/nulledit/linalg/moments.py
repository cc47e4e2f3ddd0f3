"""The uncentred second moment of a stream of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nulledit.linalg.spectrum import Block, Spectrum


class SecondMoment:
    """Uncentred second moment C = E[k kᵀ] of a stream of keys; of a mixture's, the diagonal blocks.

    Uncentred on purpose: the preservation term ‖ΔK₀‖²_F = n·tr(Δ C Δᵀ) of MEMIT (arXiv:2210.07229)
    and the null space of AlphaEdit (arXiv:2410.02355) are about k kᵀ, not deviations from a mean.
    Sums are kept in float64: the null space lives in the small eigenvalues, which float32 sums
    lose first. The products of one chunk may be float32 (half the time; see `chunk`).
    """

    def __init__(
        self,
        width: int,
        experts: int = 0,
        *,
        device: torch.device | str | None = None,
        chunk: int = 256,
    ):
        """Sum over keys of `width`, or [k_1; …; k_E] of so many `experts`, each of that width.

        `chunk` keys at most enter one float32 product.
        """
        shape = (experts, width, width) if experts else (width, width)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)  # Σ k kᵀ
        self.width, self.count, self.chunk = width, 0, chunk
        self.tokens = [0] * experts  # routed to each expert

    @property
    def _blocks(self) -> Tensor:
        return self.sum.view(-1, self.width, self.width)

    @torch.no_grad()
    def update(self, keys: Tensor) -> SecondMoment:
        """Add `keys` [..., d_in]; leave padding out before the call."""
        blocks = self._blocks
        d_in = len(blocks) * self.width
        if keys.shape[-1] != d_in:
            raise ValueError(f"expected keys of width {d_in}, found shape {tuple(keys.shape)}")
        rows = keys.reshape(-1, len(blocks), self.width)
        for i, block in enumerate(blocks):
            mine = rows[:, i]
            if self.tokens:  # a token that is not routed to an expert has zeros there
                mine = mine[(mine != 0).any(1)]
                self.tokens[i] += len(mine)
            mine = mine.to(self.sum.device)
            if mine.dtype in (torch.float16, torch.bfloat16):
                mine = mine.float()
            for part in mine.split(self.chunk):
                block += part.mT @ part
        self.count += len(rows)
        return self

    @property
    def value(self) -> Tensor:
        """C [d_in, d_in], or its blocks [experts, width, width]; float64, squared activations."""
        if self.count == 0:
            raise ValueError("no keys were added")
        return self.sum / self.count

    @property
    def sampled(self) -> int:
        """Keys that were added, to the expert with most of them where there are some."""
        return max(self.tokens, default=self.count)

    @property
    def counts(self) -> list[int]:
        """All that is counted, as `restore` takes it; like sums, counts of parts add up."""
        return [self.count, *self.tokens]

    def restore(self, total: Tensor, counts: Sequence[int]) -> None:
        """Go on from a `sum` and its `counts`."""
        self.sum.copy_(total)
        self.count, *self.tokens = counts

    def spectrum(self) -> Spectrum:
        """C decomposed, on the CPU; StatisticsError if no expert got as many keys as are wide."""
        tokens = self.tokens or [self.width]
        blocks = {
            i: Block.of(total.cpu() / self.count)
            for i, total in enumerate(self._blocks)
            if tokens[i] >= self.width
        }
        return Spectrum(blocks, self.width, tuple(self.tokens))
