"""A run's rates before and after as tidy rows and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nulledit.evaluation.measures import PREFERENCE
from nulledit.report.document import FigureSpec
from nulledit.report.points import Point

PANELS = {"preference": "by preference", "strict": "strict: every token is the likeliest"}


def rate_rows(sides: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per metric, score and side (`before`, `after`) that the data has."""
    rows = []
    for metric in PREFERENCE:
        for score, key in (("preference", metric), ("strict", f"{metric}_strict")):
            for side, evaluation in sides.items():
                if rate := evaluation["rates"].get(key):
                    rows.append({"metric": metric, "score": score, "side": side, **rate})
    return rows


def rates_spec(sides: Mapping[str, Mapping[str, Any]]) -> FigureSpec:
    """Bars of efficacy, generalization and specificity, before and after."""
    points = tuple(
        Point(
            x=row["metric"],
            y=None if row["mean"] is None else 100 * row["mean"],
            error=row["standard_error"] and 100 * row["standard_error"],
            n=row["n"],
            series=row["side"],
            panel=PANELS[row["score"]],
        )
        for row in sorted(rate_rows(sides), key=lambda row: list(PANELS).index(row["score"]))
    )
    return FigureSpec(
        name="rates",
        caption="Efficacy, generalization and specificity. Bars: mean over facts ± standard error.",
        kind="bars",
        x="metric",
        y="mean over facts",
        series="model",
        panel="score",
        labels={"x": "", "y": "mean over facts (%)"},
        points=points,
    )
