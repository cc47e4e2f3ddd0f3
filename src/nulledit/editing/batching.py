"""Facts on their way in: wordings of one answer made one fact, and the queue cut in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

from nulledit.data.facts import Fact


def batches(queue: Sequence[Fact], size: int, *, seed: int | None) -> Iterator[list[Fact]]:
    """`queue` in batches, each in the queue's order.

    With a `seed` the facts are dealt out by a hash of their ids: the batches that are left after
    an interruption are those that would have come.
    """
    dealt = list(range(len(queue)))
    if seed is not None:
        dealt.sort(key=lambda i: sha256(f"{seed}/{queue[i].id}".encode()).digest())
    for start in range(0, len(queue), size):
        yield [queue[i] for i in sorted(dealt[start : start + size])]


def merged(fact: Fact, other: Fact) -> Fact:
    """One fact with the prompts, paraphrases, neighbours and accepted answers of both."""
    prompts = tuple(dict.fromkeys((*fact.prompts, *other.prompts)))
    return replace(
        fact,
        more_prompts=tuple(p for p in prompts if p != fact.prompt),
        paraphrases=tuple(dict.fromkeys((*fact.paraphrases, *other.paraphrases))),
        neighbours=tuple(dict.fromkeys((*fact.neighbours, *other.neighbours))),
        portability=tuple(dict.fromkeys((*fact.portability, *other.portability))),
        target_aliases=tuple(dict.fromkeys((*fact.target_aliases, *other.answers))),
    )
