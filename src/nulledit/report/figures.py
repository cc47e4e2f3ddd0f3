"""Figures: each takes tidy rows, returns a Figure and saves nothing."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nulledit.report import marks
from nulledit.report.colours import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nulledit.report.document import FigureSpec
    from nulledit.report.points import Point

WIDTH = 8.6  # inches
NOTHING = 1e-9  # what rounding leaves of zeros
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


def figure_of(spec: FigureSpec, rows: Sequence[Point]) -> Figure:
    """The figure of a spec: `lines`, `bars`, `scatter` or `intervals`, panels beside each other.

    Error bars are standard errors, intervals 95 %. The unedited model is grey.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(row.panel for row in rows)) or [""]
    look = styles(row.series for row in rows)
    columns = {1: 1, 2: 2, 4: 2}.get(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    with rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.2 + lines * _height(spec, rows)), layout="constrained")
        grid = figure.subplots(
            *(lines, columns),
            squeeze=False,
            sharey=(shared := _shares_y(spec, rows)),
            sharex=spec.kind == "scatter",
        )
        for i, axes in enumerate(grid.flat):
            if i >= len(panels):
                axes.set_visible(False)
                continue
            _panel(axes, spec, [row for row in rows if row.panel == panels[i]], look)
            axes.set_title(marks.literal(panels[i]))
            _labels(axes, spec, first=i % columns == 0)
        for axes, panel in zip(grid.flat, panels, strict=False):  # once every panel is drawn
            joined = shared and spec.kind != "intervals"  # whose quantity runs along x
            _scale(axes, spec, [row for row in rows if joined or row.panel == panel])
        _legend(figure, grid, look)
    return figure


def _far(spec: FigureSpec, rows: Sequence[Point]) -> list[Point]:
    """Of one panel, what has no place in it."""
    return marks.far_references(rows) if spec.kind == "lines" and "y" not in spec.log else []


def _panel(axes: Axes, spec: FigureSpec, rows: Sequence[Point], look: Mapping[str, Style]) -> None:
    if not any(row.y is not None for row in rows):
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
        return
    far = _far(spec, rows)
    near = [row for row in rows if row not in far]
    marks.DRAW[spec.kind](axes, near, look)
    if far:
        marks.beyond(axes, far, near)


def _scale(axes: Axes, spec: FigureSpec, rows: Sequence[Point]) -> None:
    """Bars begin at zero, and numbers that are all zero do not make an axis of hundredths."""
    far = _far(spec, rows)
    near = [row for row in rows if row.y is not None and row not in far]
    nothing = all(abs(end) < NOTHING for row in near for end in marks.ends(row))
    if spec.kind == "intervals":
        if nothing:
            axes.set_xlim(-1.0, 1.0)
    elif "y" in spec.log:
        return
    elif nothing:
        most = 100.0 if "%" in spec.label("y") else 1.0
        axes.set_ylim(0.0 if spec.kind == "bars" else -0.04 * most, most)
    elif spec.kind == "bars" and all((row.y or 0.0) >= 0 for row in near):
        axes.set_ylim(bottom=0.0)


def _labels(axes: Axes, spec: FigureSpec, *, first: bool) -> None:
    across = spec.kind == "intervals"  # the quantity runs along x, and the names say what they are
    x, y = (_lines(spec.label(axis), 60) for axis in ("x", "y"))
    axes.set_xlabel(y if across else x)
    if first and not across:
        axes.set_ylabel(y)
    for axis in spec.log:
        along_x = (axis == "x") != across
        (axes.set_xscale if along_x else axes.set_yscale)("log", nonpositive="clip")
    grid: Any = "both" if spec.kind == "scatter" else "x" if across else "y"
    axes.grid(True, axis=grid, color="#e6e6e6", linewidth=0.8)


def _lines(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(marks.literal(text), width))


def _legend(figure: Figure, grid: Any, look: Mapping[str, Style]) -> None:
    """One for all panels, in the order of the series: above, or beside where there are many."""
    found: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    shown = [name for name in look if name and marks.literal(name) in found]
    if shown:
        beside = len(shown) > INSIDE
        figure.legend(
            [found[marks.literal(name)] for name in shown],
            [_lines(name, 26) for name in shown],
            loc="outside right upper" if beside else "outside upper left",
            ncols=1 if beside else len(shown),
            frameon=False,
        )


def _height(spec: FigureSpec, rows: Sequence[Point]) -> float:
    """Inches for one row of panels."""
    if spec.kind != "intervals":
        return 3.0
    names = {row.x for row in rows}
    marks_of = len({(row.x, row.series) for row in rows})
    return 0.8 + 0.18 * len(names) + 0.16 * marks_of


def _shares_y(spec: FigureSpec, rows: Sequence[Point]) -> bool:
    """Panels of one scale are compared by height, unless this flattens one of them."""
    if spec.kind in ("scatter", "intervals"):
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
