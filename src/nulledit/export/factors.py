"""An update Δ as a product of two thin factors, and what the product misses.

The experts of a mixture have factors each: where W = [W_1 … W_E], Δ = [B_1 A_1 … B_E A_E].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

EXACT = 1e-10
"""Largest ‖Δ − BA‖/‖Δ‖ that counts as exact."""
OVERSAMPLING = 8  # random directions beyond the rank that is looked for
ROWS = 256  # rows of Δ that are rebuilt at once


@dataclass(frozen=True)
class Factors:
    """B and A with Δ ≈ BA, float64, on the CPU; each carries the root of the singular values."""

    left: Tensor
    """B [d_out, r]; of experts [E, d_out, r], zeros after an expert's own dimensions."""
    right: Tensor
    """A [r, d_in]; of experts [E, r, d_in]."""
    of: int
    """Numerical rank of Δ, of experts the largest; its smaller side where that is full."""
    error: float
    """‖Δ − BA‖/‖Δ‖; 0 for an update that is zero."""

    @property
    def rank(self) -> int:
        """r: the numerical rank of Δ, or what it was cut to."""
        return self.left.shape[-1]

    @property
    def exact(self) -> bool:
        """Whether nothing beyond rounding is missing."""
        return self.error <= EXACT


@torch.no_grad()
def factorise(
    update: Tensor,
    *,
    columns: int,
    most: int | None = None,
    full_rank: int = 512,
    noise: float = 0.0,
    seed: int = 0,
) -> Factors:
    """Factors of `update` Δ [d_out, d_in] with at most `most` dimensions (None: all it has).

    A closed-form method's Δ has at most as many dimensions as there are `columns`: so many random
    directions, and a few more, reach all of it, and nothing larger than that is decomposed. If
    something is left over, Δ is of full rank: its leading `most`, or `full_rank`, dimensions come
    from an eigenproblem of its smaller side. Singular values below `noise`, or below float64's own,
    count as zero. Computed where Δ lies.
    """
    if not update.any():
        return Factors(update[:, :0].cpu(), update[:0].cpu(), 0, 0.0)
    span = min(columns + OVERSAMPLING, *update.shape)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(update.shape[1], span, generator=generator, dtype=update.dtype)
    basis = torch.linalg.qr(update @ directions.to(update.device)).Q  # [d_out, span]
    core = basis.mT @ update  # [span, d_in]
    closed = relative_error(update, basis, core) <= EXACT
    if not closed:
        basis = _leading(update, min(full_rank if most is None else most, *update.shape))
        core = basis.mT @ update
    turn, values, right = torch.linalg.svd(core, full_matrices=False)
    floor = noise + max(update.shape) * torch.finfo(update.dtype).eps * float(values[0])
    found = int((values > floor).sum())
    rank = found if most is None else min(found, most)
    root = values[:rank].sqrt()
    left, right = (basis @ turn[:, :rank]) * root, root[:, None] * right[:rank]
    of = found if closed else min(update.shape)
    return Factors(left.cpu(), right.cpu(), of, relative_error(update, left, right))


def factorise_each(update: Tensor, count: int, *, noise: Tensor, **options: Any) -> Factors:
    """Factors of each of `count` experts' part of `update` Δ [d_out, E·d_in].

    `noise` [E], and `options`, are as for `factorise`.
    """
    parts = update.chunk(count, dim=1)
    each = [
        factorise(part, noise=floor, **options)
        for part, floor in zip(parts, noise.tolist(), strict=True)
    ]
    rank = max(factors.rank for factors in each)
    left = torch.stack([pad(factors.left, (0, rank - factors.rank)) for factors in each])
    right = torch.stack([pad(factors.right, (0, 0, 0, rank - factors.rank)) for factors in each])
    of = max(factors.of for factors in each)
    return Factors(left, right, of, relative_error(update, left, right))


def applied(left: Tensor, right: Tensor, inputs: Tensor) -> Tensor:
    """B A X [d_out, n] of `inputs` X [d_in, n]; of experts [E·d_in, n]."""
    if left.ndim == 3:
        inputs = inputs.unflatten(0, (len(left), -1))
        return (left @ (right @ inputs)).sum(0)
    return left @ (right @ inputs)


@torch.no_grad()
def ordered_sum(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """W₀ [d_out, d_in] + B [d_out, r] A [r, d_in] in float64 on the CPU, the same bits anywhere.

    A matrix product adds up in an order that differs between machines; here the r terms are added
    one after the other, each product rounded by itself, and the base comes last.
    """
    if left.ndim == 3:
        each = zip(base.chunk(len(left), dim=1), left, right, strict=True)
        return torch.cat([ordered_sum(*one) for one in each], dim=1)
    left, right, base = left.double().cpu(), right.double().cpu(), base.double().cpu()
    total = torch.empty_like(base)
    rows = max(1, 2**17 // max(1, base.shape[1]))  # stays in a processor's cache
    term = torch.empty(rows, base.shape[1], dtype=base.dtype)
    for start in range(0, len(base), rows):
        block = total[start : start + rows].zero_()
        part = term[: len(block)]
        for k in range(right.shape[0]):
            torch.mul(left[start : start + rows, k, None], right[k], out=part)
            block.add_(part)
        block.add_(base[start : start + rows])
    return total


@torch.no_grad()
def relative_error(update: Tensor, left: Tensor, right: Tensor) -> float:
    """‖Δ − BA‖/‖Δ‖ for Δ [d_out, d_in], B [d_out, r] and A [r, d_in]; 0 where Δ is zero."""
    if left.ndim == 3:
        parts = update.chunk(len(left), dim=1)
        each = zip(parts, left, right, strict=True)
        missed = [relative_error(*one) * float(one[0].norm()) for one in each]
        total = float(update.norm())
        return math.hypot(*missed) / total if total else 0.0
    missing = total = 0.0
    thin = right.to(update)
    for start in range(0, len(update), ROWS):
        rows = update[start : start + ROWS]
        missing += float((rows - left[start : start + ROWS].to(update) @ thin).square().sum())
        total += float(rows.square().sum())
    return (missing / total) ** 0.5 if total else 0.0


def _leading(update: Tensor, count: int) -> Tensor:
    """Orthonormal columns [d_out, count] that span the largest part of Δ."""
    wide = update.shape[1] >= update.shape[0]
    gram = update @ update.mT if wide else update.mT @ update
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -count:]
    return vectors if wide else torch.linalg.qr(update @ vectors).Q
