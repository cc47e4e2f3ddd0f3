"""The uncentred second moment of a stream of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nulledit.linalg.spectrum import Spectrum


class SecondMoment:
    """Uncentred second moment C = E[k kᵀ] of a stream of keys.

    Uncentred on purpose: the preservation term ‖ΔK₀‖²_F = n·tr(Δ C Δᵀ) of MEMIT (arXiv:2210.07229)
    and the null space of AlphaEdit (arXiv:2410.02355) are about k kᵀ, not deviations from a mean.
    Sums are kept in float64: the null space lives in the small eigenvalues, which float32 sums
    lose first. The products of one chunk may be float32 (half the time; see `chunk`).
    """

    def __init__(self, d: int, *, device: torch.device | str | None = None, chunk: int = 256):
        """Sum over keys of width `d`; `chunk` keys at most enter one float32 product."""
        self.sum = torch.zeros(d, d, dtype=torch.float64, device=device)  # Σ k kᵀ  [d, d]
        self.width, self.count = d, 0
        self.chunk = chunk

    @torch.no_grad()
    def update(self, keys: Tensor) -> SecondMoment:
        """Add `keys` [..., d]; leave padding out before the call."""
        d = self.width
        if keys.shape[-1] != d:
            raise ValueError(f"expected keys of width {d}, found shape {tuple(keys.shape)}")
        rows = keys.reshape(-1, d).to(self.sum.device)
        if rows.dtype in (torch.float16, torch.bfloat16):
            rows = rows.float()
        for part in rows.split(self.chunk):
            self.sum += part.mT @ part
        self.count += len(rows)
        return self

    @property
    def value(self) -> Tensor:
        """C [d, d], float64, squared activation units."""
        if self.count == 0:
            raise ValueError("no keys were added")
        return self.sum / self.count

    @property
    def sampled(self) -> int:
        """Keys that were added."""
        return self.count

    @property
    def counts(self) -> list[int]:
        """All that is counted, as `restore` takes it; like sums, counts of parts add up."""
        return [self.count]

    def restore(self, total: Tensor, counts: Sequence[int]) -> None:
        """Go on from a `sum` and its `counts`."""
        self.sum.copy_(total)
        (self.count,) = counts

    def spectrum(self) -> Spectrum:
        """C decomposed, on the CPU."""
        return Spectrum.of(self.value.cpu())
