"""Two states of one base model: which facts, how far apart, and what each says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.editing.undo import facts_of
from nulledit.editing.weights import EditedWeights
from nulledit.errors import ConfigError, LedgerError
from nulledit.evaluation.queries import Query
from nulledit.evaluation.scores import probabilities
from nulledit.io.notebook import html_table
from nulledit.io.text import count
from nulledit.ledger.journal import Journal
from nulledit.ledger.records import Column, History
from nulledit.report.document import Part, StudyTable

MOST_DIGITS = 18  # of an event's number
SHOWN = 50  # facts in the table


@dataclass(frozen=True)
class FactDifference:
    """One question that the two answer differently, or only one was taught."""

    first: Fact | None
    """As the first has it; None if it was not edited there."""
    second: Fact | None
    probabilities: dict[str, tuple[float, float]]
    """Answer -> its probability per token (geometric mean) in the first and in the second."""


@dataclass(frozen=True)
class LayerDifference:
    """How far apart two weights of one layer are; of gated edits W is what neurons write at their
    directions."""

    layer: int
    """Block number."""
    first: float
    """‖W₁ − W₀‖/‖W₀‖."""
    second: float
    """‖W₂ − W₀‖/‖W₀‖."""
    apart: float
    """‖W₂ − W₁‖/‖W₀‖."""
    neurons: bool
    """Whether the norms are of what neurons of gated edits write at their directions."""


@dataclass(frozen=True, repr=False)
class Difference:
    """What differs between two states."""

    facts: tuple[FactDifference, ...]
    """In the first's order, then the second's."""
    common: int
    """Facts that both have."""
    layers: tuple[LayerDifference, ...]
    """Layers that either edits."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "common": self.common,
            "facts": [
                {
                    "first": x.first.to_dict() if x.first else None,
                    "second": x.second.to_dict() if x.second else None,
                    "probabilities": [
                        {"answer": answer, "first": p, "second": q}
                        for answer, (p, q) in x.probabilities.items()
                    ],
                }
                for x in self.facts
            ],
            "layers": [vars(x) for x in self.layers],
        }

    def __repr__(self) -> str:
        return f"<Difference: {count(len(self.facts), 'fact')} differ, {self.common} in both>"

    def _repr_html_(self) -> str:
        rows = [
            (_question(item, answer), answer, f"{p:.3f}", f"{q:.3f}")
            for item in self.facts
            for answer, (p, q) in item.probabilities.items()
        ]
        return html_table(repr(self)[1:-1], ("prompt", "answer", "p, first", "p, second"), rows)


def _question(item: FactDifference, answer: str) -> str:
    """What `answer` was asked after: where both have it, the first one's prompt."""
    fact = next(f for f in (item.first, item.second) if f and f.target == answer)
    return fact.render(fact.prompt)


def read_state(text: str) -> tuple[Path, int | None]:
    """`run@3` as folder and event; a folder of that very name comes first.

    ConfigError where what follows the @ is no event's number.
    """
    folder, at, event = text.rpartition("@")
    if not at or Path(text).is_dir():
        return Path(text), None
    if not event.isdecimal() or len(event) > MOST_DIGITS:
        raise ConfigError(f"{text}: expected RUN or RUN@N, N the number of an event")
    return Path(folder), int(event)


def columns_at(history: History, event: int | None, name: str) -> list[Column]:
    """Those in the model after `event`, or now; ConfigError for one that never was."""
    if event is None:
        return history.active
    if not 0 <= event <= len(history.events):
        raise ConfigError(f"{name}: the ledger has {len(history.events)} events")
    return history.active_as_of(event)


def difference(
    editor: EditEngine,
    other: History,
    *,
    first: Sequence[Column] | None = None,
    second: Sequence[Column] | None = None,
) -> Difference:
    """Compare the editor's model with the one of another ledger on the same base.

    `first`, `second`: the columns that are in each, by default the active ones. The editor is as
    before afterwards. LedgerError for another base.
    """
    if other.base.hash != editor.history.base.hash:
        raise LedgerError(
            f"the bases differ: {editor.history.base.hash[:12]} and {other.base.hash[:12]}; "
            "only states of one model can be compared"
        )
    if other.base.recipe.layout != editor.history.base.recipe.layout:
        raise LedgerError("the two edit other matrices (their recipes' layouts differ)")
    mine = editor.history.active if first is None else list(first)
    theirs = other.active if second is None else list(second)
    a, b = ({f.key: f for f in facts_of(columns)} for columns in (mine, theirs))
    keys = [k for k in dict.fromkeys([*a, *b]) if _demand(a.get(k)) != _demand(b.get(k))]
    questions = [(a.get(key), b.get(key)) for key in keys]
    # Of one answer to both, the first's prompt is asked, as it is the one that is shown.
    queries = [
        Query(f"{i}", "efficacy", fact.render(fact.prompt), fact.target, None)
        for i, pair in enumerate(questions)
        for fact in {f.target: f for f in reversed(pair) if f}.values()
    ]
    layers = sorted({*editor.history.layers, *other.layers})
    with editor.weights.holding(mine):
        changes = {i: editor.weights.edit(i).change for i in editor.weights.layers}
        said = probabilities(editor.editable, queries)
    with editor.weights.holding([]):  # the base, which the other's edits stand on
        beside = EditedWeights(editor.editable, Journal(other))
        try:
            beside.refresh(theirs)
            grown = editor.weights.grown or beside.grown
            others = {i: beside.edit(i).change for i in beside.layers}
            base = {i: beside.base(i) for i in beside.layers} | {
                i: editor.weights.base(i) for i in editor.weights.layers
            }
            says = probabilities(editor.editable, queries)
        finally:
            beside.return_to({})
    found: list[dict[str, tuple[float, float]]] = [{} for _ in questions]
    for query, x, y in zip(queries, said, says, strict=True):
        found[int(query.fact_id)][query.answer] = (x, y)
    return Difference(
        facts=tuple(FactDifference(*pair, p) for pair, p in zip(questions, found, strict=True)),
        common=len(set(a) | set(b)) - len(keys),
        layers=tuple(
            _layer(i, base[i], changes.get(i), others.get(i), neurons=grown) for i in layers
        ),
    )


def _layer(
    layer: int, base: Tensor, first: Tensor | None, second: Tensor | None, *, neurons: bool
) -> LayerDifference:
    scale = float(torch.linalg.norm(base)) or math.nan
    a, b = (0.0 if x is None else float(torch.linalg.norm(x)) / scale for x in (first, second))
    if first is not None and second is not None and first.shape == second.shape:
        apart = float(torch.linalg.norm(second - first)) / scale
    else:  # neurons and an update of W have nothing in common
        apart = math.hypot(a, b)
    return LayerDifference(layer, a, b, apart, neurons)


def _demand(fact: Fact | None) -> tuple[str, bool] | None:
    return None if fact is None else fact.demand


def difference_page(found: Difference, first: str, second: str) -> list[str | Part]:
    """A difference as parts of a document; `first` and `second` are the states' names."""
    parts: list[str | Part] = []
    if found.facts:
        parts.append(_facts_table(found, first, second))
        if len(found.facts) > SHOWN:
            parts.append(f"and {len(found.facts) - SHOWN} more, with --json")
    differ = "differs" if len(found.facts) == 1 else "differ"
    parts.append(f"{count(len(found.facts), 'fact')} {differ}, {found.common} are in both.")
    if found.layers:
        rows: list[Sequence[str]] = [
            [str(x.layer), f"{x.first:.4f}", f"{x.second:.4f}", f"{x.apart:.4f}"]
            for x in found.layers
        ]
        head = ["layer", f"‖Δ‖/‖W₀‖, {first}", second, "apart"]
        parts.append(StudyTable.of("norms", "", head, rows))
        if any(x.neurons for x in found.layers):
            parts.append("Of gated edits Δ is what neurons write at their directions: W stays.")
    return parts


def _facts_table(found: Difference, first: str, second: str) -> StudyTable:
    rows: list[Sequence[str]] = []
    for item in found.facts[:SHOWN]:
        last = ""
        for answer, (p, q) in item.probabilities.items():
            prompt = _question(item, answer)
            last, shown = prompt, "" if prompt == last else prompt
            rows.append(
                [
                    shown,
                    answer,
                    _taught(item, answer, first, second),
                    f"{p:.3f}",
                    f"{q:.3f}",
                ]
            )
    head = ["prompt", "answer", "taught in", f"p, {first}", f"p, {second}"]
    return StudyTable.of("facts", "", head, rows)


def _taught(item: FactDifference, answer: str, first: str, second: str) -> str:
    names = [
        f"{name}{' (to forget)' if fact.forget else ''}"
        for name, fact in ((first, item.first), (second, item.second))
        if fact and fact.target == answer
    ]
    return ", ".join(names)
