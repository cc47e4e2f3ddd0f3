"""What changes of a model report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nulledit.editing.weights import LayerReport
from nulledit.ledger.records import Column


@dataclass(frozen=True)
class EditReport:
    """What `Editor.edit` did."""

    columns: tuple[Column, ...]
    """Those of the facts asked for, as they are now; `column.outcome` says how z was reached."""
    layers: tuple[LayerReport, ...]
    """The state after the last batch."""
    notices: tuple[str, ...]
    """Facts known, replaced, repeated, or joined with others on one key."""
    seconds: dict[str, float]
    """Wall time by stage: values, keys, solve."""
    optimised: int = 0
    """Values that were optimised in this call, not taken from a cache."""


@dataclass(frozen=True)
class ChangeReport:
    """What `undo`, `redo`, `restore`, `rebuild` or `merge` did."""

    removed: tuple[str, ...]
    """Ids of the facts taken out."""
    restored: tuple[str, ...]
    """Ids of facts whose older columns came back."""
    rebuilt: tuple[str, ...]
    """Ids of facts that were written anew."""
    near: tuple[tuple[str, float], ...]
    """Edits on nearly the same key as those removed: (id, cosine), nearest first."""
    moved: tuple[tuple[str, float], ...]
    """How the others moved: (id, ‖change at its key‖/‖what was written there‖), largest first."""
    notices: tuple[str, ...] = ()
    """What else is worth knowing."""


def by_fact(found: Iterable[tuple[Column, float]]) -> tuple[tuple[str, float], ...]:
    """(id, number) with the first number of each fact."""
    first: dict[str, float] = {}
    for column, number in found:
        first.setdefault(column.fact.id, number)
    return tuple(first.items())
