"""Facts to two sides that share no subject: one to choose a recipe by, one to judge it on."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from nulledit.data.facts import Fact
from nulledit.errors import FactError

LEAST = 10  # facts on a side; with fewer, one fact is more than ten points


@dataclass(frozen=True)
class Split:
    """Facts by what they are for."""

    tuning: tuple[Fact, ...]
    """Candidates are compared on these."""
    report: tuple[Fact, ...]
    """The winner and the starting recipe are judged on these, and nothing is chosen by them."""
    left_out: int = 0
    """Facts of the file that are on neither side."""


def split_facts(
    facts: Sequence[Fact], *, count: int | None = None, seed: int = 0, least: int = LEAST
) -> Split:
    """Halve `facts`, or `count` of them, in the order of a hash of `seed` and subject.

    Facts on one subject stay together, so the halves may differ by a few. A second fact on one
    question is left out. FactError for facts to forget, or fewer than `least` on a side.
    """
    forgotten = sum(fact.forget for fact in facts)
    if forgotten:
        raise FactError(
            f"{forgotten} of {len(facts)} facts are to be forgotten: a recipe is tuned on facts "
            "to write; leave the others out"
        )
    subjects: dict[str, dict[tuple[str, str], Fact]] = {}
    for fact in facts:
        subjects.setdefault(_name(fact), {}).setdefault(fact.key, fact)
    groups: list[list[Fact]] = []
    taken = 0
    most = len(facts) if count is None else count
    for name in sorted(subjects, key=lambda name: _hash(name, seed)):
        group = list(subjects[name].values())
        if taken + len(group) <= most:
            groups.append(group)
            taken += len(group)
    at = min(range(len(groups) + 1), key=lambda i: abs(2 * sum(map(len, groups[:i])) - taken))
    tuning = tuple(fact for group in groups[:at] for fact in group)
    report = tuple(fact for group in groups[at:] for fact in group)
    if min(len(tuning), len(report)) < least:
        raise FactError(
            f"{len(tuning)} facts to tune on and {len(report)} to report on, of {len(facts)}, "
            f"apart by subject: expected {least} or more on each side; give more facts"
        )
    return Split(tuning, report, len(facts) - taken)


def _name(fact: Fact) -> str:
    """The subject without what spelling may vary."""
    return " ".join(unicodedata.normalize("NFKC", fact.subject).casefold().split())


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
