"""A model before and after its edits on the same facts, with intervals of what changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nulledit.evaluation.measures import Measure, find, measured
from nulledit.evaluation.preservation import Preservation
from nulledit.evaluation.runner import Evaluation
from nulledit.evaluation.stats import Interval, paired_bootstrap
from nulledit.io.notebook import frame, html_table

if TYPE_CHECKING:
    import pandas as pd

HEAD = ("measure", "before", "after", "± standard error", "change", "95 % interval", "n")


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
                found[name] = paired_bootstrap(*zip(*pairs, strict=True))
        return found

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

    def _rates(self) -> dict[str, tuple[Measure, Mapping[str, Any], Mapping[str, Any]]]:
        """Measure -> what it is, before and after; empty where there is nothing."""
        sides = self.summary()
        names = [*measured(sides.values()), "perplexity", "kl"]
        found = {}
        for name in names:
            then, now = (
                (sides.get(side) or {}).get(name)
                or (sides.get(side) or {"rates": {}})["rates"].get(name)
                or {}
                for side in ("before", "after")
            )
            if now and not name.endswith("_tokens"):
                found[name] = find(name), then, now
        return found

    def __repr__(self) -> str:
        shown = [
            f"{measure.title} {_number(measure, then)} → {_number(measure, now)}"
            for measure, then, now in self._rates().values()
        ]
        return f"<Comparison of {len(self.after.rows())} facts: {'; '.join(shown[:4])}>"

    def _repr_html_(self) -> str:
        changes = self.changes()
        rows = []
        for name, (measure, then, now) in self._rates().items():
            moved = changes.get(name)
            ends = [f"{measure.scale * x:+.{measure.digits}f}" for x in moved or ()]
            rows.append(
                [
                    measure.label,
                    _number(measure, then),
                    _number(measure, now),
                    _number(measure, now, "standard_error"),
                    ends[0] if ends else "",
                    f"{ends[1]} to {ends[2]}" if ends else "",
                    now.get("n") or f"{now.get('tokens')} tokens",
                ]
            )
        return html_table(f"{len(self.after.rows())} facts", HEAD, rows)


def _number(measure: Measure, found: Mapping[str, Any], name: str = "") -> str:
    """A mean or value in the measure's unit; empty where there is none."""
    value = found.get(name) if name else found.get("mean", found.get("value"))
    return "" if value is None else f"{measure.scale * value:.{measure.digits}f}"
