"""Two ledgers on one base: where they contradict each other, and who decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nulledit.data.facts import Fact, quote
from nulledit.editing.undo import facts_of
from nulledit.errors import ConfigError, LedgerError
from nulledit.ledger.records import History

CHOICES = ("first", "second", "neither")


@dataclass(frozen=True)
class Conflict:
    """One question with two answers."""

    first: Fact
    """As the first ledger has it."""
    second: Fact
    """As the second has it."""

    def __str__(self) -> str:
        return (
            f"{self.first.subject}: {_answer(self.first)} ({self.first.id}) or "
            f"{_answer(self.second)} ({self.second.id})"
        )


Decide = Mapping[str, str] | Callable[[Conflict], str]
"""`first`, `second` or `neither` for each conflict; a mapping by either fact's id."""


def conflicts(first: History, second: History) -> list[Conflict]:
    """Questions that both answer, differently, in the first's order; LedgerError for two bases."""
    if first.base.hash != second.base.hash:
        raise LedgerError(
            f"the ledgers have different bases: {first.base.hash[:12]} and "
            f"{second.base.hash[:12]}; only edits of one model can be merged"
        )
    if first.base.recipe.layout != second.base.recipe.layout:
        raise LedgerError("the ledgers' recipes give different layouts: they edit other matrices")
    theirs = {fact.key: fact for fact in facts_of(second.active)}
    both = [(f, theirs[f.key]) for f in facts_of(first.active) if f.key in theirs]
    return [Conflict(a, b) for a, b in both if a.demand != b.demand]


def decided(found: Sequence[Conflict], decide: Decide | None) -> dict[tuple[str, str], str]:
    """The choice for each question; LedgerError while one is open, ConfigError for a bad word."""
    choice: dict[tuple[str, str], str] = {}
    for conflict in found:
        said = decide(conflict) if callable(decide) else _looked_up(conflict, decide or {})
        if said and said not in CHOICES:
            raise ConfigError(
                f"{conflict}: decided as {quote(said)}; expected {', '.join(CHOICES)}"
            )
        if said:
            choice[conflict.first.key] = said
    still = [c for c in found if c.first.key not in choice]
    if still:
        more = f"; and {len(still) - 3} more" if len(still) > 3 else ""
        raise LedgerError(
            f"{len(still)} conflicts are not decided: {'; '.join(map(str, still[:3]))}{more}"
        )
    return choice


def newest(first: History, second: History) -> Callable[[Conflict], str]:
    """A rule: the answer that came into its model later; the first's where both did at once."""

    def rule(conflict: Conflict) -> str:
        mine, theirs = _since(first, conflict.first), _since(second, conflict.second)
        return "second" if theirs > mine else "first"

    return rule


def with_own_ids(history: History, facts: Iterable[Fact]) -> dict[Fact, Fact]:
    """Those of `facts` whose id names another question in `history`, with an id of their own."""
    owner = {c.fact.id: c.fact.key for c in history.columns}
    renamed = {}
    for fact in facts:
        if owner.setdefault(fact.id, fact.key) == fact.key:
            continue
        number = 2
        while f"{fact.id}-{number}" in owner:
            number += 1
        renamed[fact] = replace(fact, id=f"{fact.id}-{number}")
        owner[f"{fact.id}-{number}"] = fact.key
    return renamed


def _looked_up(conflict: Conflict, decide: Mapping[str, str]) -> str:
    return decide.get(conflict.first.id) or decide.get(conflict.second.id, "")


def _answer(fact: Fact) -> str:
    return f"not {fact.target!r}" if fact.forget else repr(fact.target)


def _since(history: History, fact: Fact) -> str:
    """When the fact's active columns became active, UTC."""
    mine = {c.id for c in history.active if c.fact == fact}
    return max((e.time for e in history.events if mine & set(e.activated)), default="")
