"""A model before and after its edits on the same facts, with intervals of what changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nulledit.evaluation.measures import entry, find, measured, shown
from nulledit.evaluation.preservation import Preservation
from nulledit.evaluation.queries import Kind, Query
from nulledit.evaluation.runner import SEEN_OF_TEXT, Evaluation
from nulledit.evaluation.stats import Interval, paired_interval
from nulledit.io.notebook import frame, html_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Comparison:
    """What the base and the edited model made of the same facts, and of the same text."""

    before: Evaluation | None
    """Of the base; None if it was not asked."""
    after: Evaluation
    """Of the edited model."""
    text: str = ""
    """What perplexity and KL are on; empty if on nothing."""
    preservation: tuple[Preservation, ...] = ()
    """What the edits do to keys of that text, by layer."""

    def summary(self) -> dict[str, Any]:
        """`Evaluation.summary` of each side, by its name."""
        return {name: side.summary() for name, side in self._sides().items()}

    def changes(self) -> dict[str, Interval]:
        """Measure -> mean of after − before over facts, with its 95 % interval.

        By a bootstrap of pairs, over facts that have the measure on both sides; in the measure's
        own unit, shares from 0 to 1. Empty without a base.
        """
        found: dict[str, Interval] = {}
        then = self.before.values() if self.before else {}
        for name, now in self.after.values().items():
            pairs = [
                (then[name][fact], value)
                for fact, value in now.items()
                if fact in then.get(name, {}) and math.isfinite(then[name][fact] + value)
            ]
            if pairs:
                found[name] = paired_interval([a for a, _ in pairs], [b for _, b in pairs])
        return found

    def moved(self, kind: Kind = "specificity") -> list[tuple[Query, bool]]:
        """Queries of a kind, neighbours by default, that are answered otherwise than before.

        With whether the answer is said now, every token the likeliest. Empty without a base.
        """
        then = {item.query: item.strict for item in self.before.scores} if self.before else {}
        return [
            (item.query, item.strict)
            for item in self.after.scores
            if item.query.kind == kind and then.get(item.query, item.strict) != item.strict
        ]

    def to_frame(self) -> pd.DataFrame:
        """One row per fact and side: its measures and the answer; ConfigError without pandas."""
        rows = {
            f"{fact} {name}": {"id": fact, "side": name, **row}
            for name, side in self._sides().items()
            for fact, row in side.rows().items()
        }
        return frame(rows, "fact").set_index(["id", "side"])

    def _sides(self) -> dict[str, Evaluation]:
        return ({"before": self.before} if self.before else {}) | {"after": self.after}

    def __repr__(self) -> str:
        said = [f"{row[0]} {row[1]} → {row[2]}" for row in self._table({})[:4]]
        return f"<Comparison of {len(self.after.rows())} facts: {'; '.join(said)}>"

    def _repr_html_(self) -> str:
        head = ("measure", "before", "after", "± standard error", "n", "change", "95 % interval")
        title = f"{len(self.after.rows())} facts"
        return html_table(title, head, self._table(self.changes()))

    def _table(self, changes: Mapping[str, Interval]) -> list[tuple[str, ...]]:
        sides, rows = self.summary(), list[tuple[str, ...]]()
        for name in [*measured(sides.values()), *SEEN_OF_TEXT]:
            now, measure = entry(sides["after"], name), find(name)
            if not now:
                continue
            then = shown(name, entry(sides.get("before"), name))[0]
            ends = [f"{measure.scale * x:+.{measure.digits}f}" for x in changes.get(name, ())]
            moved = (ends[0], f"{ends[1]} to {ends[2]}") if ends else ("", "")
            rows.append((measure.label, then, *shown(name, now), *moved))
        return rows
