"""From measures to the tables and figures that studies share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nulledit.data.facts import Fact
from nulledit.evaluation.measures import find
from nulledit.evaluation.stats import Rate, paired_bootstrap
from nulledit.report.document import Column, Example, FigureSpec, StudyTable, Value
from nulledit.report.points import Point
from nulledit.studies.context import Lab, Sources

Rows = Mapping[str, Mapping[str, Any]]


@dataclass
class Outcome:
    """What a study came to."""

    shows: str
    """What the numbers show, made from them."""
    tables: list[StudyTable] = field(default_factory=list)
    """Numbers."""
    figures: list[FigureSpec] = field(default_factory=list)
    """The same to look at."""
    examples: list[Example] = field(default_factory=list)
    """Generated text."""


@dataclass(frozen=True)
class Work:
    """What a study does, for an estimate: the streams' plans and what is asked of them."""

    plans: Sequence[Any]
    """Stream plans."""
    asked: int = 0
    """Facts asked about, over all checkpoints."""
    written: int = 0
    """Facts whose free answers or longer texts are generated."""
    perplexities: int = 0
    """Readings of the text: perplexity and KL."""
    capabilities: int = 0
    """Rounds of the six tasks."""
    drifts: int = 0
    """Drifts of hidden states."""
    other_tokens: int = 0
    """Tokens run for anything else."""


@dataclass(frozen=True)
class StudySpec:
    """A study: what it needs, what it does, and how its numbers are read."""

    name: str
    """On the command line."""
    title: str
    """Heading."""
    question: str
    """One sentence."""
    needs: tuple[str, ...]
    """Sources without which it can't run."""
    cannot_show: str
    """What its numbers can't say."""
    work: Callable[[Lab], Work]
    """What it does."""
    run: Callable[[Lab], Outcome]
    """Does it."""

    def check(self, sources: Sources) -> None:
        """ConfigError if a source that it needs is missing."""
        for name in self.needs:
            sources.need(name)


def rate(rows: Rows, measure: str, ids: Iterable[str] | None = None) -> Rate | None:
    """A measure's mean over facts that have it; None if none has."""
    chosen = rows.values() if ids is None else [rows[i] for i in ids if i in rows]
    values = [float(row[measure]) for row in chosen if row.get(measure) is not None]
    return Rate.of(values) if values else None


def rate_cells(rows: Rows, measures: Sequence[str]) -> dict[str, Value | None]:
    """Cells in % by measure; fluency in hundredths of a bit, as published."""
    return {name: Value.percent(rate(rows, name)) for name in measures}


def rate_columns(measures: Sequence[str]) -> list[Column]:
    """Columns of `rate_cells`."""
    columns = []
    for name in measures:
        head = find(name).head(short=True, digits=1)
        columns.append(Column(**{**head, "unit": "%" if head["unit"] == "%" else ""}))
    return columns


def present(measures: Sequence[str], *all_rows: Rows) -> list[str]:
    """Those of `measures` that some fact has a value of."""
    return [m for m in measures if any(rate(rows, m) for rows in all_rows)]


def growth(now: Mapping[str, Any] | None, base: Mapping[str, Any] | None) -> float | None:
    """Perplexity's growth in %; None without a text or for a number without end."""
    if now is None or base is None or now["perplexity"]["value"] is None:
        return None
    return 100 * (now["perplexity"]["value"] / base["perplexity"]["value"] - 1)


def text_columns(digits: int = 1) -> list[Column]:
    """Columns of `text_cells`; growth of perplexity is told with `digits`."""
    shown = {"perplexity": 2, "growth": digits, "kl": 2, "kl_worst": 0}
    return [Column(**find(name).head(short=True, digits=n)) for name, n in shown.items()]


def text_cells(
    now: Mapping[str, Any] | None, base: Mapping[str, Any] | None
) -> dict[str, Value | float | None]:
    """Cells of what a model makes of a text, beside the unedited one; n counts tokens.

    `now` is `base`: the unedited model itself.
    """
    if now is None:
        return {}
    text, kl = now["perplexity"], now["kl"]
    cells: dict[str, Value | float | None] = {
        "perplexity": Value(text["value"], text["standard_error"], text["tokens"])
    }
    if now is base:
        return {**cells, "kl": Value(0.0, None, text["tokens"])}
    cells["growth"] = growth(now, base)
    if kl:
        cells["kl"] = Value(kl["value"], kl["standard_error"], kl["tokens"])
        cells["kl_worst"] = kl["worst_share"] and 100 * kl["worst_share"]
    return cells


def difference(before: Rows, after: Rows, measure: str) -> tuple[float, float, float, int] | None:
    """Mean of after − before over facts that both have, in %, its 95 % interval, and n."""
    shared = [
        i
        for i in before
        if i in after and before[i].get(measure) is not None and after[i].get(measure) is not None
    ]
    if not shared:
        return None
    pair = [[float(side[i][measure]) for i in shared] for side in (before, after)]
    mean, low, high = paired_bootstrap(*pair)
    return 100 * mean, 100 * low, 100 * high, len(shared)


def intervals(
    name: str,
    caption: str,
    pairs: Sequence[tuple[str, Rows, Rows]],
    measures: Sequence[str],
    *,
    what: str = "difference (points of %)",
) -> FigureSpec:
    """Paired differences, one panel a measure, one interval a (label, before, after)."""
    points = []
    for label, before, after in pairs:
        for measure in measures:
            found = difference(before, after, measure)
            if found:
                mean, low, high, n = found
                points.append(
                    Point(
                        label,
                        mean,
                        n=n,
                        series=label,
                        panel=find(measure).short,
                        low=low,
                        high=high,
                    )
                )
    return FigureSpec(
        name, caption, "intervals", "arm", what, panel="measure", points=tuple(points)
    )


def curve(
    label: str, checkpoints: Sequence[int], values: Sequence[Rate | float | None], panel: str = ""
) -> list[Point]:
    """Points of one line; rates are shown in %."""
    points = []
    for at, value in zip(checkpoints, values, strict=True):
        if isinstance(value, Rate):
            error = None if math.isnan(value.standard_error) else 100 * value.standard_error
            points.append(Point(at, 100 * value.mean, error, value.n, label, panel))
        else:
            points.append(Point(at, value, series=label, panel=panel))
    return points


def examples(arm: str, facts: Sequence[Fact], before: Rows, after: Rows) -> list[Example]:
    """What the model says by itself before and after, of facts that were asked for it."""
    found = []
    for fact in facts:
        row = after.get(fact.id, {})
        if row.get("answer") is None:
            continue
        was = before.get(fact.id, {}).get("answer")
        holds = bool(row.get("generation"))
        prompt = fact.render(fact.prompt)
        found.append(Example(arm, prompt, fact.target, was, row["answer"], holds))
    return found


def extremes(named: Mapping[str, float]) -> str:
    """`94.0 % (a) down to 82.0 % (b, c)`: the ends with everyone who is there, as rounded."""
    shown = {name: f"{value:.1f} %" for name, value in named.items()}
    high, low = (shown[pick(named, key=lambda name: named[name])] for pick in (max, min))
    ends = {end: ", ".join(n for n, text in shown.items() if text == end) for end in (high, low)}
    if high == low:
        return f"{high} with {ends[high]}"
    return f"from {high} ({ends[high]}) down to {low} ({ends[low]})"
