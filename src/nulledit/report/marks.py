"""What stands in one panel: lines, bars, clouds of points, intervals."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nulledit.io.text import plain
from nulledit.report.colours import GREY, Style, is_unedited, plain_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nulledit.report.points import Point

Look = Mapping[str, Style]
FEW = 14  # bars that have room for their number
NORMAL = 1.959964  # 97.5 % point


def lines(axes: Axes, rows: Sequence[Point], look: Look) -> None:
    """A line with error bars per series; the unedited model as a grey line with a band."""
    places, names = positions(rows)
    span = max(places.values(), default=0) - min(places.values(), default=0)
    shown = [name for name in look if not _reference(name)]
    step = 0.006 * span if _evenly(rows) else 0.0  # side by side, so that error bars are seen
    for i, (name, style) in enumerate(look.items()):
        mine = [row for row in rows if row.series == name]
        if not mine:
            continue
        if _reference(name):
            _band(axes, mine, places, literal(name))
            continue
        shift = (shown.index(name) - (len(shown) - 1) / 2) * step
        axes.errorbar(
            [places[row.x] + shift for row in mine],
            [_number(row.y) for row in mine],
            [row.error or 0 for row in mine] if any(row.error for row in mine) else None,
            color=style.colour,
            marker=style.marker,
            elinewidth=0.9,
            label=literal(name),
            zorder=3 + i / 100,
        )
    _ticks(axes, places, names)


def bars(axes: Axes, rows: Sequence[Point], look: Look) -> None:
    """Grouped bars; the unedited model as a grey line through each group."""
    categories = list(dict.fromkeys(row.x for row in rows))
    shown = [name for name in look if not _reference(name)]
    thick = 0.8 / max(1, len(shown))
    many = len(categories) * len(shown) > FEW
    for name, style in look.items():
        mine = [row for row in rows if row.series == name and row.y is not None]
        middle = np.array([categories.index(row.x) for row in mine])
        heights = np.array([_number(row.y) for row in mine])
        errors = np.array([row.error or 0.0 for row in mine])
        if _reference(name):
            ends, label = (middle - 0.45, middle + 0.45), literal(name)
            axes.hlines(heights, *ends, color="#6e6e6e", linewidth=1.6, label=label, zorder=4)
            band: dict[str, Any] = {"color": GREY, "alpha": 0.3, "linewidth": 0, "zorder": 0}
            axes.bar(middle, 2 * errors, 0.9, heights - errors, **band)
            continue
        drawn = axes.bar(
            middle + (shown.index(name) - (len(shown) - 1) / 2) * thick,
            *(heights, 0.92 * thick),
            yerr=errors if errors.any() else None,
            color=style.colour,
            label=literal(name),
            error_kw={"elinewidth": 0.8, "capsize": 1.5 if many else 2.5},
        )
        if not many:
            axes.margins(y=0.12)  # room for the numbers
            axes.bar_label(drawn, fmt=_short, padding=3, fontsize=8)
    axes.set_xticks(range(len(categories)), [category(name) for name in categories])
    axes.set_xlim(-0.6, len(categories) - 0.4)
    axes.tick_params(axis="x", length=0)
    if any((row.y or 0) < 0 for row in rows):
        axes.axhline(0, color="#555555", linewidth=0.8)


def scatter(axes: Axes, rows: Sequence[Point], look: Look) -> None:
    """A cloud of points per series, the first series lowest."""
    size = 22 if len(rows) < 200 else 10
    for name, style in look.items():
        mine = [row for row in rows if row.series == name]
        axes.scatter(
            [_number(row.x) for row in mine],
            [_number(row.y) for row in mine],
            s=size,
            alpha=0.65,
            color=style.colour,
            marker=style.marker,
            linewidths=0,
            label=literal(name),
        )


def intervals(axes: Axes, rows: Sequence[Point], look: Look) -> None:
    """Differences with 95 % intervals and a line at zero; hollow where the interval reaches it.

    An interval is as given, else normal from the standard error, else the point alone.
    """
    names = list(dict.fromkeys(row.x for row in rows))
    beside = {x: [s for s in look if any(r.x == x and r.series == s for r in rows)] for x in names}
    axes.axvline(0, color="#555555", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for name, style in look.items():
        for j, row in enumerate(row for row in rows if row.series == name and row.y is not None):
            there = beside[row.x]  # only those of one row of the axis make way for each other
            shift = 0.7 * ((there.index(name) + 0.5) / len(there) - 0.5)
            y, half = _number(row.y), NORMAL * (row.error or 0.0)
            low = y - half if row.low is None else row.low
            high = y + half if row.high is None else row.high
            axes.errorbar(
                *(y, names.index(row.x) + shift),
                xerr=[[max(0.0, y - low)], [max(0.0, high - y)]],
                color=style.colour,
                marker=style.marker,
                markersize=5.5,
                markerfacecolor="white" if low <= 0 <= high else style.colour,
                label=None if j else literal(name),
                zorder=3,
            )
    axes.set_yticks(range(len(names)), [category(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first on top
    axes.tick_params(axis="y", length=0)


DRAW: dict[str, Callable[[Axes, Sequence[Point], Look], None]] = {
    "lines": lines,
    "bars": bars,
    "scatter": scatter,
    "intervals": intervals,
}


def positions(rows: Sequence[Point]) -> tuple[dict[float | str, float], list[str] | None]:
    """x to its place on the axis; and the names to write there where x is text."""
    values = list(dict.fromkeys(row.x for row in rows))
    if all(isinstance(x, int | float) for x in values):
        return {x: float(x) for x in values}, None
    return {x: float(i) for i, x in enumerate(values)}, [category(x) for x in values]


def category(x: float | str) -> str:
    """A name below the axis, in short lines."""
    text = f"{x:g}" if isinstance(x, int | float) else x
    return "\n".join(textwrap.wrap(literal(text), 22))


def literal(text: str) -> str:
    """`text` in which matplotlib sees no formula, and XML no forbidden character.

    A first underscore would hide a name from the legend.
    """
    text = plain(text)
    return (f"\u2009{text}" if text.startswith("_") else text).replace("$", r"\$")


def _reference(name: str) -> bool:
    """Drawn as a grey line. `before` stands beside `after` as bars or points of its own."""
    return is_unedited(name) and plain_name(name) != "before"


def far_references(rows: Sequence[Point]) -> list[Point]:
    """The unedited model's points where they would flatten the others' lines to a third."""
    told = [row for row in rows if math.isfinite(_number(row.y))]
    mine = [row for row in told if _reference(row.series)]
    others = [_number(row.y) for row in told if not _reference(row.series)]
    if not mine or len(others) < 2:
        return []
    everything = [*others, *(_number(row.y) for row in mine)]
    apart = max(everything) - min(everything) > 3 * (max(others) - min(others))
    return mine if apart else []


def beyond(axes: Axes, far: Sequence[Point], rows: Sequence[Point]) -> None:
    """Say where the unedited model lies that has no place in the panel."""
    values = [_number(row.y) for row in far]
    below = max(values) < min(y for row in rows if math.isfinite(y := _number(row.y)))
    ends = list(dict.fromkeys(map(_short, (min(values), max(values)))))
    axes.text(
        *(0.03, 0.03 if below else 0.97),
        f"{literal(far[0].series)}: {' to '.join(ends)} {'↓' if below else '↑'}",
        transform=axes.transAxes,
        va="bottom" if below else "top",
        color="#5f5f5f",
        fontsize=8,
    )


def ends(row: Point) -> list[float]:
    """Of what is drawn of a point: its value and its error bar's, those that are finite."""
    y, error = _number(row.y), row.error or 0.0
    low = y - error if row.low is None else row.low
    high = y + error if row.high is None else row.high
    return [end for end in (y, low, high) if math.isfinite(end)]


def _evenly(rows: Sequence[Point]) -> bool:
    """Whether there are error bars, at places that lie apart on a plain axis."""
    at = sorted({row.x for row in rows if isinstance(row.x, int | float)})
    if len(at) < 2 or not any(row.error for row in rows):
        return False
    return min(b - a for a, b in itertools.pairwise(at)) > 0.05 * (at[-1] - at[0])


def _band(
    axes: Axes, rows: Sequence[Point], places: Mapping[float | str, float], name: str
) -> None:
    y = np.array([_number(row.y) for row in rows])
    errors = np.array([row.error or 0.0 for row in rows])
    line: dict[str, Any] = {"color": GREY, "label": name, "zorder": 1}
    band: dict[str, Any] = {"color": GREY, "alpha": 0.25, "linewidth": 0, "zorder": 0}
    if len(rows) == 1:
        axes.axhline(y[0], **line)
        axes.axhspan(y[0] - errors[0], y[0] + errors[0], **band)
        return
    x = [places[row.x] for row in rows]
    axes.plot(x, y, **line)
    axes.fill_between(x, y - errors, y + errors, **band)


def _ticks(axes: Axes, places: Mapping[float | str, float], names: list[str] | None) -> None:
    """Ticks at the measured x, where these are few and lie apart."""
    at = sorted(places.values())
    if names is not None:
        axes.set_xticks(list(places.values()), names)
    elif 1 < len(at) <= 8:
        gaps = [b - a for a, b in itertools.pairwise(at)]
        if min(gaps) > 0.1 * (at[-1] - at[0]):
            axes.set_xticks(at, [f"{x:,.10g}".replace(",", "\u2009") for x in at])


def _short(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _number(value: float | str | None) -> float:
    return value if isinstance(value, int | float) else math.nan
