"""What changes of a model report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nulledit.editing.displacement import Displacement
from nulledit.editing.weights import LayerReport
from nulledit.io.notebook import frame, html_table
from nulledit.io.text import count, percent
from nulledit.ledger.records import Column

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
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
    displaced: tuple[Displacement, ...] = ()
    """Of each batch that came after others: how far it moved what layers give at old keys."""

    def rows(self) -> dict[str, dict[str, Any]]:
        """Fact id -> its batch, prompt, target, and how its value was reached."""
        return {
            c.fact.id: {
                "batch": c.batch,
                "prompt": c.fact.render(c.fact.prompt),
                "target": c.fact.target,
                **c.outcome.to_dict(),
            }
            for c in self.columns
        }

    def to_frame(self) -> pd.DataFrame:
        """`rows` as a pandas frame; ConfigError where pandas is missing."""
        return frame(self.rows(), "fact")

    def __repr__(self) -> str:
        facts = count(len(self.columns), "fact")
        layers = ", ".join(str(report.layer) for report in self.layers)
        return f"<EditReport of {facts} in layers {layers}: {_notices(self.notices)}>"

    def _repr_html_(self) -> str:
        head = ("fact", "batch", "prompt", "target", "loss", "steps", "ended")
        rows = [
            [id_, *(row.get(name, "") for name in head[1:])] for id_, row in self.rows().items()
        ]
        return html_table(repr(self)[1:-1], head, rows)


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        done = {name: getattr(self, name) for name in ("removed", "restored", "rebuilt")}
        said = ", ".join(f"{len(ids)} {name}" for name, ids in done.items() if ids)
        return f"<ChangeReport: {said or 'nothing changed'}; {_notices(self.notices)}>"

    def _repr_html_(self) -> str:
        moved = dict(self.moved)
        rows = [
            (id_, name, "")
            for name in ("removed", "restored", "rebuilt")
            for id_ in getattr(self, name)
        ]
        rows += [(id_, "stays", percent(share)) for id_, share in moved.items()]
        return html_table(repr(self)[1:-1], ("fact", "", "moved by"), rows)


def _notices(notices: Sequence[str]) -> str:
    return count(len(notices), "notice") if notices else "no notices"


def by_fact(found: Iterable[tuple[Column, float]]) -> tuple[tuple[str, float], ...]:
    """(id, number) with the first number of each fact."""
    first: dict[str, float] = {}
    for column, number in found:
        first.setdefault(column.fact.id, number)
    return tuple(first.items())
