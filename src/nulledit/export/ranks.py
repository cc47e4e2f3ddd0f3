"""Ranks that servers of adapters accept."""

from __future__ import annotations

import torch
from torch import Tensor

SERVED = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's list for --max-lora-rank; an adapter's rank may be any number up to that."""


def served_rank(rank: int) -> int:
    """The least served rank that holds `rank` dimensions; beyond the largest, `rank` itself."""
    return next((served for served in SERVED if rank <= served), rank)


def padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [..., d_out, r] and A [..., r, d_in] with zeros after them, to `rank` dimensions."""
    more = rank - left.shape[-1]
    return (
        torch.nn.functional.pad(left, (0, more)),
        torch.nn.functional.pad(right, (0, 0, 0, more)),
    )
