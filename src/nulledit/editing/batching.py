"""Facts on their way in: wordings of one answer made one fact, and the queue cut in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256

import torch
from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.errors import FactError
from nulledit.ledger.records import History
from nulledit.linalg.angles import unit_columns


def admitted(history: History | None, facts: Iterable[Fact]) -> tuple[list[Fact], list[str]]:
    """Facts that are not in the model yet, one per question, and what a reader must know of it.

    Several wordings of one question with one answer become one fact with several prompts, also
    together with an active fact. FactError for contradictions and for an id used twice. `history`:
    None where there is no model yet.
    """
    held = {c.fact.key: c.fact for c in (history.active if history else ())}
    owner = {c.fact.id: c.fact.key for c in (history.columns if history else ())}
    notices: list[str] = []
    queue: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        if owner.setdefault(fact.id, fact.key) != fact.key:
            raise FactError(
                f"id {fact.id!r} names two facts, the second about {fact.subject!r}; "
                "give another id"
            )
        other = queue.get(fact.key)
        if other is not None and other.demand != fact.demand:
            raise FactError(
                f"{other.id} and {fact.id} contradict each other on {fact.subject!r}: "
                f"{other.target!r} and {fact.target!r}; keep one of them"
            )
        known = other or held.get(fact.key)
        if known is None or known.demand != fact.demand:
            queue[fact.key] = fact
        elif set(fact.prompts) <= set(known.prompts):
            notices.append(f"{fact.id}: repeats {known.id}, left out")
        else:
            notices.append(f"{fact.id}: another wording of {known.id}, edited as one fact")
            queue[fact.key] = merged(known, fact)
    return list(queue.values()), notices


def merged(fact: Fact, other: Fact) -> Fact:
    """One fact with the prompts, paraphrases, neighbours and accepted answers of both."""
    prompts = tuple(dict.fromkeys((*fact.prompts, *other.prompts)))
    return replace(
        fact,
        more_prompts=tuple(p for p in prompts if p != fact.prompt),
        paraphrases=tuple(dict.fromkeys((*fact.paraphrases, *other.paraphrases))),
        neighbours=tuple(dict.fromkeys((*fact.neighbours, *other.neighbours))),
        other_relations=tuple(dict.fromkeys((*fact.other_relations, *other.other_relations))),
        portability=tuple(dict.fromkeys((*fact.portability, *other.portability))),
        target_aliases=tuple(dict.fromkeys((*fact.target_aliases, *other.answers))),
    )


def batches(
    queue: Sequence[Fact], size: int, *, seed: int | None, keys: Tensor | None = None
) -> Iterator[list[Fact]]:
    """`queue` in batches, each in the queue's order.

    With a `seed` the facts are dealt out by a hash of their ids. With `keys` [d_in, n] of the queue
    each batch is the next fact dealt and those left whose keys have the largest cosines with its
    own, so that like facts come together and batches in no order. Either way a batch depends only
    on what is left: those that are left after an interruption are those that would have come.
    """
    left = list(range(len(queue)))
    if seed is not None:
        left.sort(key=lambda i: sha256(f"{seed}/{queue[i].id}".encode()).digest())
    unit = None if keys is None else unit_columns(keys)
    while left:
        nearest = torch.arange(len(left))
        if unit is not None:
            cosines = (unit.mT @ unit[:, left[0]]).round(decimals=12)  # equal keys: as dealt
            nearest = cosines[left].argsort(descending=True, stable=True)
        batch = {left[i] for i in nearest[:size].tolist()}
        yield [queue[i] for i in sorted(batch)]
        left = [i for i in left if i not in batch]
