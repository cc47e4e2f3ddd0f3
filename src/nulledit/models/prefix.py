"""What attention has seen before: keys and values of beginnings that several rows share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from nulledit.models.batches import Batch


class PrefixLayer(DynamicLayer):
    """Keys and values of a prefix; `update` shows them in front of the new ones.

    It stores nothing, but `recording`, where it keeps the new ones apart.
    """

    def __init__(self, keys: Tensor | None, values: Tensor | None, length: int, *, recording: bool):
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.length = keys, values, length
        self.recording = recording
        self.new: tuple[Tensor, Tensor] | None = None
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values to attend to: the prefix's, then the new ones."""
        if self.recording:
            self.new = key_states, value_states
        if self.keys is None or self.values is None or self.length == 0:
            return key_states, value_states
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns to attend to, and where they begin."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the prefix, however many came after it."""
        return self.length


class Prefix:
    """Attention keys and values of a batch of prefixes in the blocks of a span.

    Each row's tokens stand at its end and its padding in front, so that nothing stands between them
    and what is run after them: windows and biases of many families count columns.
    """

    def __init__(self, entries: Sequence[tuple[Tensor, Tensor] | None], mask: Tensor):
        """`entries`: per block, or None where not recorded; `mask` [rows, length]."""
        if padded_after(mask):
            order = mask.argsort(dim=1, stable=True)
            entries = [e and (_in_order(e[0], order), _in_order(e[1], order)) for e in entries]
            mask = mask.gather(1, order)
        self.entries = entries
        self.mask = mask

    def select(self, rows: Tensor) -> Prefix:
        """The prefixes of `rows` (indices) only."""
        kept = [
            e and (e[0][rows.to(e[0].device)], e[1][rows.to(e[1].device)]) for e in self.entries
        ]
        return Prefix(kept, self.mask[rows])

    def then(self, other: Prefix) -> Prefix:
        """The prefixes with `other` after them, in the blocks that `other` was recorded in."""
        if other.mask.shape[1] == 0:
            return self
        joined = [
            (torch.cat([a[0], b[0]], dim=-2), torch.cat([a[1], b[1]], dim=-2)) if a and b else b
            for a, b in zip(self.entries, other.entries, strict=True)
        ]
        return Prefix(joined, torch.cat([self.mask, other.mask], dim=1))

    def before(self, batch: Batch) -> Batch:
        """`batch` with the prefixes in its mask, for a run after them."""
        return replace(batch, mask=torch.cat([self.mask, batch.mask], dim=1))

    def cache(self, *, recording: bool = False) -> Cache:
        """A cache that shows the prefix to attention and never grows."""
        length = self.mask.shape[1]
        held = [e or (None, None) for e in self.entries]
        return Cache(layers=[PrefixLayer(k, v, length, recording=recording) for k, v in held])


def padded_after(mask: Tensor) -> bool:
    """Whether padding stands after a token in any row of `mask`."""
    return bool((mask.diff(dim=1) < 0).any())


def _in_order(held: Tensor, order: Tensor) -> Tensor:
    """Keys or values [rows, ..., length, d], each row's columns in `order` [rows, length]."""
    order = order.to(held.device)
    rows = torch.arange(len(held), device=held.device)[:, None]
    return held.movedim(-2, 1)[rows, order].movedim(1, -2)
