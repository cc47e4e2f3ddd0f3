"""Means with their errors, differences of pairs, growth: the only statistics that are made here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LARGEST_EXPONENT = 700  # beyond, exp overflows


@dataclass(frozen=True)
class Rate:
    """A mean over facts."""

    mean: float
    """Share, 0 to 1; bits for fluency."""
    standard_error: float
    """s/√n with s the standard deviation over facts (n − 1); nan for one fact."""
    n: int
    """Number of facts."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Rate:
        """The rate of one value per fact; ValueError for no values."""
        if not values:
            raise ValueError("a rate needs at least one fact")
        n = len(values)
        error = statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan
        return cls(statistics.fmean(values), error, n)


class Interval(NamedTuple):
    """A mean difference of pairs, and where it may lie."""

    mean: float
    """Of the differences."""
    low: float
    """2.5 % point of the bootstrap."""
    high: float
    """97.5 % point."""


class Growth(NamedTuple):
    """By how much a perplexity grew, paired over windows."""

    percent: float
    """Of the perplexity before."""
    standard_error: float
    """Of `percent`; nan for one window."""
    n: int
    """Windows."""


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, samples: int = 10000, seed: int = 0
) -> Interval:
    """How far b lies above a, over pairs (before, after), with the 95 % interval of its bootstrap.

    Pairs are drawn with replacement, `samples` times. ValueError for lengths that differ, no pairs,
    or values that are not finite: leave a fact that lacks one of the two out of both.
    """
    before, after = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"expected pairs of numbers, found {before.shape} and {after.shape}")
    difference = after - before
    if not np.isfinite(difference).all():
        raise ValueError("expected finite numbers")
    n = len(difference)
    random = np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, 2**20 // n)  # draws held at once: about 8 MB
    for start in range(0, samples, step):
        size = min(step, samples - start)
        means[start : start + size] = difference[random.integers(n, size=(size, n))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(difference.mean()), float(low), float(high))


def paired_interval(a: Sequence[float], b: Sequence[float], whole: float = 1.0) -> Interval:
    """`paired_bootstrap` of shares of `whole`, over facts.

    Where all n facts differ alike no draw does otherwise, which would look like certainty, even of
    one fact. A part 1 − 0.025^(1/n) of others may then still differ as far as shares can.
    """
    apart = {after - before for before, after in zip(a, b, strict=True)}
    if len(apart) != 1 or not all(0 <= value <= whole for value in (*a, *b)):
        return paired_bootstrap(a, b)
    found, unseen = apart.pop(), 1 - 0.025 ** (1 / len(a))
    return Interval(found, found - unseen * (whole + found), found + unseen * (whole - found))


def perplexity_growth(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> Growth:
    """Growth of perplexity in % from each token's loss (nats), by window, in two models.

    exp of the mean difference per token, minus one: what the ratio of the perplexities is. The
    standard error is paired: of the differences over windows.
    """
    mean, error, _ = mean_of([b - a for a, b in zip(before, after, strict=True)])
    grown = math.expm1(mean) if mean < LARGEST_EXPONENT else exponential(mean)
    return Growth(100 * grown, 100 * (1 + grown) * error, len(before))


def growth_of(before: float, after: float) -> float:
    """Growth in % from one number to another, such as a perplexity."""
    return 100 * (after / before - 1)


def exponential(value: float) -> float:
    """exp; infinity where it overflows, nan of nan."""
    if value < LARGEST_EXPONENT:
        return math.exp(value)
    return math.inf if value >= LARGEST_EXPONENT else math.nan


def mean_of(values: Sequence[np.ndarray]) -> tuple[float, float, int]:
    """Mean over all tokens of `values` by window, its standard error over windows, and tokens."""
    n, tokens = len(values), np.array([len(part) for part in values])
    sums, total = np.array([part.sum() for part in values]), int(tokens.sum())
    mean = float(sums.sum()) / total
    if n == 1:
        return mean, math.nan, total
    spread = float(np.sqrt(n / (n - 1) * np.square(sums - mean * tokens).sum())) / total
    return mean, spread, total


def jackknife_variance(left_out: Sequence[float]) -> float:
    """(n − 1)/n of the sum of squares about the mean of values with one thing left out of each.

    0 where there are fewer than two, or one is not finite.
    """
    n = len(left_out)
    if n < 2 or not all(map(math.isfinite, left_out)):
        return 0.0
    mean = statistics.fmean(left_out)
    return (n - 1) / n * sum((value - mean) ** 2 for value in left_out)


class Correlation(NamedTuple):
    """How two rankings agree."""

    rho: float
    """Spearman's rank correlation, −1 to 1."""
    p: float
    """Share of random orders that agree or disagree as much, the found one among them."""


def rank_correlation(
    x: Sequence[float], y: Sequence[float], *, samples: int = 1999, seed: int = 0
) -> Correlation | None:
    """Spearman's rank correlation of pairs, ties with their mean rank, and a permutation test.

    None where all of `x` or all of `y` are equal: there is no order to compare.
    """
    a, b = _ranks(x), _ranks(y)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    rho = float(np.corrcoef(a, b)[0, 1])
    random = np.random.default_rng(seed)
    drawn = (float(np.corrcoef(a, random.permutation(b))[0, 1]) for _ in range(samples))
    extreme = sum(abs(value) >= abs(rho) - 1e-12 for value in drawn)
    return Correlation(rho, (1 + extreme) / (samples + 1))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1, ties with their mean."""
    _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = count.cumsum()
    ranks: np.ndarray = (last - (count - 1) / 2)[place]
    return ranks


def power_of(x: Sequence[float], y: Sequence[float]) -> float:
    """k of y ~ xᵏ, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
