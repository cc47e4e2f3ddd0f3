"""Rows of ids that run together: padded to one length, and cut where they have begun alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length."""

    ids: Tensor
    """[rows, length]."""
    mask: Tensor
    """[rows, length], 1 at tokens and 0 at padding."""
    positions: Tensor
    """[rows, length], position of each token in its own row."""


def collate(
    rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device, left: bool = False
) -> Batch:
    """Pad `rows` of ids on the right (or left) to the longest."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return Batch(ids.to(device), mask.to(device), positions.to(device))


@dataclass(frozen=True)
class Shared:
    """Rows cut in two: beginnings that several have in common, and the rests."""

    stems: Batch
    """The beginnings, one per label."""
    stem: Tensor
    """Index of each row's stem [rows]."""
    cuts: list[int]
    """Length of each row's stem."""
    rests: Batch
    """What comes after; its mask is the rests' own, its positions count the stem."""


def share_beginnings(
    rows: Sequence[Sequence[int]],
    labels: Sequence[int],
    limits: Sequence[int],
    *,
    columns: int,
    pad_id: int,
    device: torch.device,
) -> Shared:
    """Cut `rows` of ids after the longest beginning that all rows of a label have in common.

    `limits`: what a row's stem may hold at most; fewer tokens than the row has. `columns`: what the
    longest stem and the longest rest may have together (`PartialModel.columns`); nothing is cut off
    where they would have more.
    """
    names = list(dict.fromkeys(labels))
    stems: list[Sequence[int]] = []
    for name in names:
        mine = [i for i, label in enumerate(labels) if label == name]
        common = min(limits[i] for i in mine)
        first = rows[mine[0]]
        for i in mine[1:]:
            same = (a == b for a, b in zip(first[:common], rows[i], strict=False))
            common = next((k for k, equal in enumerate(same) if not equal), common)
        stems.append(first[:common])
    stem = [names.index(label) for label in labels]
    cuts = [len(stems[s]) for s in stem]
    rests = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    if max(cuts) + max(map(len, rests)) > columns:
        stems, cuts, rests = [() for _ in stems], [0] * len(rows), list(rows)
    after = collate(rests, pad_id=pad_id, device=device)
    return Shared(
        collate(stems, pad_id=pad_id, device=device),
        torch.tensor(stem, device=device),
        cuts,
        replace(after, positions=after.positions + torch.tensor(cuts, device=device)[:, None]),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill padding with; masked everywhere, so any valid one serves."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def chunks_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices sorted by length and cut so that rows × longest stays within `budget` tokens."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    chunks: list[list[int]] = []
    current: list[int] = []
    for index in order:
        if current and (len(current) + 1) * lengths[index] > budget:
            chunks.append(current)
            current = []
        current.append(index)
    if current:
        chunks.append(current)
    return chunks


def runs_by_length(lengths: Sequence[int], worth: int) -> list[list[int]]:
    """Indices cut into runs of nearly one length, each run padded to its longest.

    They are cut where that costs least: a token of padding counts 1, a further run `worth` tokens.
    Each run has its indices in their order.
    """
    steps = sorted(set(lengths))
    up_to = [sum(length <= step for length in lengths) for step in steps]
    best: list[tuple[int, int]] = [(0, 0)]  # cost of the shortest, and where their last run begins
    for end, longest in enumerate(steps, start=1):
        fewer = ((begin, up_to[begin - 1] if begin else 0) for begin in range(end))
        best.append(
            min(
                (best[begin][0] + (up_to[end - 1] - before) * longest + worth, begin)
                for begin, before in fewer
            )
        )
    runs: list[list[int]] = []
    end = len(steps)
    while end:
        begin = best[end][1]
        within = range(steps[begin], steps[end - 1] + 1)
        runs.append([i for i, length in enumerate(lengths) if length in within])
        end = begin
    return runs[::-1]
