"""Figures: each takes tidy rows, returns a Figure and saves nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nulledit.report.tables import METRICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Grey for the unedited model everywhere; blue is told from it by lightness, too.
COLOURS = {"before": "#b4b4b4", "after": "#0b5fa5"}
PANELS = {"preference": "by preference", "strict": "strict: every token is the likeliest"}


def rate_rows(sides: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per metric, score and side (`before`, `after`) that the data has."""
    rows = []
    for metric in METRICS:
        for score, key in (("preference", metric), ("strict", f"{metric}_strict")):
            for side, evaluation in sides.items():
                if rate := evaluation["rates"].get(key):
                    rows.append({"metric": metric, "score": score, "side": side, **rate})
    return rows


def rates_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Bars of efficacy, generalization and specificity before and after, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (score, title) in zip(panels, PANELS.items(), strict=True):
        _panel(axes, [row for row in rows if row["score"] == score])
        axes.set_xlabel(title)
    panels[0].set_ylabel("mean over facts (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    found = {(row["metric"], row["side"]): row for row in rows}
    for i, (side, colour) in enumerate(COLOURS.items()):
        for place, metric in enumerate(METRICS):
            at = place + (i - 0.5) * 0.38
            row = found.get((metric, side))
            if row is None:
                continue
            height = 100 * row["mean"]
            axes.bar(at, height, 0.36, color=colour, label=side if place == 0 else None)
            error = 100 * (row["standard_error"] or 0)
            if error:
                axes.errorbar(at, height, error, color="black", capsize=3, linewidth=1)
            axes.text(at, height + error + 1.5, f"{height:.0f}", ha="center", fontsize=8)
    names = []
    for metric in METRICS:
        counts = dict.fromkeys(str(r["n"]) for (m, _), r in found.items() if m == metric)
        names.append(f"{metric}\n" + (f"n = {'/'.join(counts)}" if counts else "absent"))
    axes.set_xticks(range(len(METRICS)), names, fontsize=9)
    axes.set_xlim(-0.6, len(METRICS) - 0.4)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.yaxis.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
