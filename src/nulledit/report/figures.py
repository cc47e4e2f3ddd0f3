"""Figures: each takes tidy rows, returns a Figure and saves nothing."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nulledit.report import marks
from nulledit.report.colours import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nulledit.report.document import FigureSpec
    from nulledit.report.points import Point

WIDTHS = {"wide": 8.6, "narrow": 3.9}  # inches: for a page or a screen, and for a telephone
INSIDE = 4  # more series than these have their legend beside the panels
LOOK: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "axes.edgecolor": "#555555",
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "errorbar.capsize": 2.5,
}


def figure_of(spec: FigureSpec, rows: Sequence[Point], *, width: str = "wide") -> Figure:
    """The figure of a spec: `lines`, `bars`, `scatter` or `intervals`; `narrow` for small screens.

    Panels stand beside each other where it is wide, else below. Error bars are standard errors,
    intervals 95 %. The unedited model is grey.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row.panel for row in rows)) or [""]
    look = styles(row.series for row in rows)
    lying = spec.kind == "bars" and width == "narrow" and marks.crowded(rows)
    columns = _columns(len(panels), width)
    lines = math.ceil(len(panels) / columns)
    legend = _Legend.of([name for name in look if name], width)
    height = lines * _height(spec, rows, width, lying=lying) + legend.height
    shared = _shares_y(spec, rows, lying=lying)
    with rc_context(LOOK):
        figure = Figure(figsize=(WIDTHS[width], height), layout="constrained")
        grid = figure.subplots(
            lines, columns, squeeze=False, sharey=shared, sharex=spec.kind == "scatter"
        )
        for i, axes in enumerate(grid.flat):
            if i >= len(panels):
                axes.set_visible(False)
                continue
            mine = [row for row in rows if row.panel == panels[i]]
            _panel(axes, spec, mine, look, lying=lying)
            if panels[i]:
                axes.set_title(marks.literal(panels[i]))
            _labels(axes, spec, width, first=i % columns == 0, lying=lying)
        legend.draw(figure, grid)
    return figure


def _panel(
    axes: Axes, spec: FigureSpec, rows: Sequence[Point], look: Mapping[str, Style], *, lying: bool
) -> None:
    if not any(row.y is not None for row in rows):
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
        return
    far = marks.far_references(rows) if spec.kind == "lines" and "y" not in spec.log else []
    near = [row for row in rows if row not in far]
    marks.DRAW[spec.kind](axes, near, look, lying)
    if far:
        marks.beyond(axes, far, near)


def _labels(axes: Axes, spec: FigureSpec, width: str, *, first: bool, lying: bool) -> None:
    across = lying or spec.kind == "intervals"  # the quantity runs along x
    x, y = (_wrapped(spec.label(axis), width) for axis in ("x", "y"))
    if spec.kind == "intervals":
        x = ""  # the names say themselves what they are
    axes.set_xlabel(y if across else x)
    if first:
        axes.set_ylabel(x if across else y)
    for axis in spec.log:
        along_x = (axis == "x") != across
        (axes.set_xscale if along_x else axes.set_yscale)("log", nonpositive="clip")
    grid: Any = "both" if spec.kind == "scatter" else "x" if across else "y"
    axes.grid(True, axis=grid, color="#e6e6e6", linewidth=0.8)


def _wrapped(label: str, width: str) -> str:
    return "\n".join(textwrap.wrap(marks.literal(label), 36 if width == "narrow" else 60))


@dataclass(frozen=True)
class _Legend:
    """One for all panels: beside them (wide) or below (narrow) if there are many series."""

    labels: Mapping[str, str]
    """Series to its name in short lines; none, no legend."""
    columns: int
    """Names beside each other."""
    place: Any
    """Matplotlib's name of it."""
    height: float
    """Inches that it takes above or below the panels."""

    @classmethod
    def of(cls, series: Sequence[str], width: str) -> _Legend:
        labels = {name: "\n".join(textwrap.wrap(marks.literal(name), 26)) for name in series}
        text = [line for label in labels.values() for line in label.split("\n")]
        longest = max(map(len, text), default=1)
        fit = int(WIDTHS[width] * 14 // (longest + 5))  # characters of the legend's size, roughly
        columns = max(1, min(len(series), fit))
        if len(series) > INSIDE and width == "wide":
            return cls(labels, 1, "outside right upper", 0.0)
        place = "outside upper left" if len(series) <= INSIDE else "outside lower left"
        return cls(labels, columns, place, 0.19 * math.ceil(len(text) / columns))

    def draw(self, figure: Figure, grid: Any) -> None:
        """Put it there, in the order of the series."""
        found: dict[str, Any] = {}
        for axes in grid.flat:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                found.setdefault(label, handle)
        shown = [name for name in self.labels if marks.literal(name) in found]
        if shown:
            figure.legend(
                [found[marks.literal(name)] for name in shown],
                [self.labels[name] for name in shown],
                loc=self.place,
                ncols=self.columns,
                frameon=False,
            )


def _columns(panels: int, width: str) -> int:
    if width == "narrow":
        return 1
    return {1: 1, 2: 2, 3: 3, 4: 2}.get(panels, 3)


def _height(spec: FigureSpec, rows: Sequence[Point], width: str, *, lying: bool) -> float:
    """Inches for one row of panels."""
    names = len({row.x for row in rows})
    series = len({row.series for row in rows})
    if spec.kind == "intervals":
        return 0.8 + names * (0.18 + 0.16 * series)
    if lying:
        return 0.7 + names * (0.12 + 0.13 * series)
    return 3.0 if width == "wide" else 2.5


def _shares_y(spec: FigureSpec, rows: Sequence[Point], *, lying: bool) -> bool:
    """Panels of one scale are compared by height, unless this flattens one of them."""
    if spec.kind in ("scatter", "intervals") or lying:
        return True
    ranges = []
    for panel in {row.panel for row in rows}:
        mine = [row for row in rows if row.panel == panel]
        left_out = marks.far_references(mine) if spec.kind == "lines" else []
        values = [
            row.y
            for row in mine
            if row.y is not None and math.isfinite(row.y) and row not in left_out
        ]
        if values:
            # Bars stand on zero: what counts is how high they are.
            floor = [0.0] if spec.kind == "bars" else []
            ranges.append((min(values + floor), max(values + floor)))
    if not ranges or "y" in spec.log:
        return True
    whole = max(high for _, high in ranges) - min(low for low, _ in ranges)
    return all(high - low >= whole / 4 for low, high in ranges)
