"""Eigenbasis of a second moment, null-space rules, and the metric that a filter makes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MASSIVE_SHARE = (
    0.2  # a direction with more of all energy than this is always protected by `leakage`
)

NEWTON_STEPS = 8
"""At most; eigenvectors in float32 take 1, in float16 some 3."""


@dataclass(frozen=True)
class Metric:
    """G = r·(I − U Uᵀ) + U diag(g) Uᵀ: how freely an update may move along each direction.

    A gain of 0 protects a direction. Only the thinner side of a hard null space needs to be held.
    """

    vectors: Tensor
    """U [d_in, m], orthonormal columns."""
    gains: Tensor
    """g [m], >= 0, the gain along each column of U."""
    rest: float
    """r >= 0, the gain along every direction orthogonal to U."""

    def apply(self, keys: Tensor) -> Tensor:
        """G K for `keys` K [d_in, n], in float64."""
        K, U = keys.double(), self.vectors.double()
        return self.rest * K + U @ ((self.gains.double() - self.rest)[:, None] * (U.mT @ K))

    def free_energy(self, keys: Tensor) -> Tensor:
        """‖P k‖² [n] of `keys` [d_in, n], P on the directions whose gain is not 0; float64."""
        K, U = keys.double(), self.vectors.double()
        inside = (U.mT @ K).square()  # [m, n]
        free = inside[self.gains > 0].sum(0)
        if self.rest > 0:
            free = free + (K.square().sum(0) - inside.sum(0)).clamp_min(0)
        return free

    def free_share(self, keys: Tensor) -> Tensor:
        """‖P k‖²/‖k‖² [n]: the share of each key that lies where the gain is not 0."""
        return self.free_energy(keys) / keys.double().square().sum(0)

    def inverse_trace(self, columns: Tensor) -> float:
        """tr(Zᵀ G⁺ Z) for `columns` Z [d_in, n] in the range of G."""
        inside = (self.vectors.double().mT @ columns).square().sum(1)  # [m]
        free = self.gains > 0
        total = (inside[free] / self.gains[free].double()).sum()
        if self.rest > 0:
            total = total + (columns.square().sum() - inside.sum()) / self.rest
        return float(total)

    @property
    def rank(self) -> int:
        """Number of directions with a gain: how many independent keys can still be written."""
        d, m = self.vectors.shape
        return int((self.gains > 0).sum()) + (d - m if self.rest > 0 else 0)

    @property
    def device(self) -> torch.device:
        """Where it is applied."""
        return self.vectors.device


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues s of C = Q diag(s) Qᵀ, all of them, and the eigenvectors that are at hand.

    A full spectrum holds every eigenvector. A compact one holds those `start <= i < stop` only
    (the thinner side of a null space) and serves exactly the filters that are constant elsewhere.
    """

    eigenvalues: Tensor
    """s [d_in], ascending, float64, squared activation units."""
    eigenvectors: Tensor
    """Q[:, start:stop] [d_in, stop - start]."""
    start: int = 0
    """Index of the first eigenvector held."""

    @classmethod
    def of(cls, moment: Tensor) -> Spectrum:
        """Decompose a second moment C [d_in, d_in] (float64, `eigh`)."""
        C = moment.double()
        if not torch.isfinite(C).all():
            raise ValueError("the second moment has entries that are not finite")
        values, vectors = torch.linalg.eigh((C + C.mT) / 2)
        return cls(values.clamp_min(0), vectors)

    @property
    def d_in(self) -> int:
        """Width of the keys."""
        return len(self.eigenvalues)

    @property
    def stop(self) -> int:
        """One past the index of the last eigenvector held."""
        return self.start + self.eigenvectors.shape[1]

    def protected(self, threshold: float) -> int:
        """Number of directions with eigenvalue >= `threshold`, which edits may not use."""
        return int((self.eigenvalues >= threshold).sum())

    def leakage(self, threshold: float) -> float:
        """tr(PC)/tr(C): share of the preserved keys' energy that is left unprotected."""
        s = self.eigenvalues
        return float(s[s < threshold].sum() / s.sum())

    def metric(self, gains: Tensor) -> Metric:
        """The metric with `gains` g(s) [d_in] along the eigenvectors.

        Raises LookupError if it needs eigenvectors that a compact spectrum lacks.
        """
        odd, rest = _odd_gains(gains)
        if len(odd) and (int(odd[0]) < self.start or int(odd[-1]) >= self.stop):
            raise LookupError(
                f"needs eigenvectors {int(odd[0])} to {int(odd[-1])} of {self.d_in}; "
                f"held are {self.start} to {self.stop - 1}"
            )
        return Metric(self.eigenvectors[:, odd - self.start], gains[odd], rest)

    def whole(self) -> Spectrum:
        """Itself, for those who need C; LookupError unless every eigenvector is held."""
        if self.eigenvectors.shape[1] < self.d_in:
            raise LookupError(
                f"needs all {self.d_in} eigenvectors; held are {self.eigenvectors.shape[1]}"
            )
        return self

    def reduced(self, *gains: Tensor) -> Spectrum:
        """Without the eigenvectors that no metric of these `gains` needs."""
        odd = torch.cat([_odd_gains(g)[0] for g in gains])
        start, stop = (int(odd.min()), int(odd.max()) + 1) if len(odd) else (self.start, self.start)
        kept = self.eigenvectors[:, start - self.start : stop - self.start]
        return Spectrum(self.eigenvalues, kept, start)

    def compact(self, threshold: float, *, dtype: torch.dtype = torch.float16) -> Spectrum:
        """Keep only the thinner side of the null space at `threshold`, rounded to `dtype`."""
        cut = self.d_in - self.protected(threshold)
        start, stop = (cut, self.d_in) if self.d_in - cut <= cut else (0, cut)
        kept = self.eigenvectors[:, start - self.start : stop - self.start]
        return Spectrum(self.eigenvalues, kept.to(dtype), start)

    def orthonormal(self) -> Spectrum:
        """The same spectrum with eigenvectors made orthonormal again in float64 after rounding.

        By the polar factor U (UᵀU)^(-1/2), the orthonormal set nearest to the rounded one, through
        Newton and Schulz's U ← U (3I − UᵀU)/2: an error e leaves ¾e². Where U is too far from
        orthonormal the result is not, or is nan.
        """
        U = self.eigenvectors.double()
        if U.shape[1] == 0:
            return Spectrum(self.eigenvalues, U, self.start)
        for _ in range(NEWTON_STEPS):
            error = -U.mT @ U
            error.diagonal().add_(1.0)  # I − UᵀU
            U = U + U @ error / 2
            if float(error.abs().max()) < torch.finfo(U.dtype).eps ** 0.5:
                break
        return Spectrum(self.eigenvalues, U, self.start)


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
