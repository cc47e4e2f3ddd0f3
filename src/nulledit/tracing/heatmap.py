"""The heat map of a causal trace: takes what was found, returns a Figure and saves nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nulledit.report.colours import INK
from nulledit.report.figures import LOOK
from nulledit.tracing.location import Effect, Location
from nulledit.tracing.trace import KINDS, LAST, PLACES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "PuOr"  # told apart with any of the common colour deficiencies; white is no effect


def heat_map(found: Location) -> Figure:
    """Two panels, restored states and restored MLP windows, each on a scale of its own.

    Zero is white. The peak that a suggestion ends at is framed. Windows with the first block stand
    left of a dotted line; where they are above the others, the scale is the others' and its arrow
    says so.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    effects = found.effects()
    places = [p for p in PLACES if any(e.place == p for e in effects)]
    lowest = {"state": 0, "mlp": found.suggestion.lowest}
    first = max(e.rate.mean for e in effects if e.kind == "mlp" and e.layer < lowest["mlp"])
    written = "MLP output" if found.window == 1 else f"outputs of {found.window} MLPs"
    titles = {
        "state": "one hidden state put back",
        "mlp": f"{written} put back; left of the dots with layer 0 (up to {first:.2g})",
    }
    labels = {"state": "layer of the state", "mlp": "middle of the window of layers"}
    with rc_context(LOOK):
        figure = Figure(figsize=(8.6, 2 * (0.9 + 0.26 * len(places))), layout="constrained")
        panels = figure.subplots(2, 1, squeeze=False)[:, 0]
        for axes, kind in zip(panels, KINDS, strict=True):
            mine = [e for e in effects if e.kind == kind]
            _panel(axes, mine, places, found.depth, lowest[kind])
            axes.set_title(titles[kind])
            axes.set_xlabel(labels[kind])
        if found.suggestion.layers:
            _frame(panels[1], found.suggestion.peak, places.index(LAST))
    return figure


def _panel(axes: Axes, effects: list[Effect], places: list[str], depth: int, lowest: int) -> None:
    values = {(e.place, e.layer): e.rate.mean for e in effects}
    table = [[values[place, layer] for layer in range(depth)] for place in places]
    everything = [v for row in table for v in row]
    most = max(abs(v) for row in table for v in row[lowest:]) or 1.0
    beyond = max(everything) > most
    image = axes.imshow(
        table, cmap=f"{COLOURS}_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest"
    )
    count = {e.place: e.rate.n for e in effects}
    axes.set_yticks(range(len(places)), [f"{place} (n = {count[place]})" for place in places])
    axes.set_xticks(range(0, depth, max(1, depth // 15)))
    axes.tick_params(length=2)
    if lowest:
        axes.axvline(lowest - 0.5, color=INK, linewidth=1, linestyle=":")
    assert axes.figure is not None
    extend = "max" if beyond else "neither"
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, aspect=12, extend=extend)
    bar.set_label("change of p(answer)")
    bar.ax.set_ylim(max(-most, min(0.0, *everything)), most)


def _frame(axes: Axes, layer: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    place = (layer - 0.5, row - 0.5)
    frame = Rectangle(place, 1, 1, fill=False, edgecolor=INK, linewidth=1.8)
    frame.set_clip_on(False)
    axes.add_patch(frame)
