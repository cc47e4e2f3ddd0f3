"""Costs by block as a figure: takes what was found, returns a Figure and saves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nulledit.evaluation.stats import Rate
from nulledit.report.colours import BLUE, INK, ORANGE, VERMILLION
from nulledit.report.figures import LOOK
from nulledit.tracing.costs import UNIT, Costs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def cost_figure(found: Costs) -> Figure:
    """Costs above, what drives gates below, by block.

    Suggested blocks are marked: the span for W as a band, that of gated edits by a dotted line.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    told, gated = found.suggestion, any(block.gates for block in found.blocks)
    with rc_context(LOOK):
        figure = Figure(figsize=(8.6, 6.0 if gated else 3.2), layout="constrained")
        panels = figure.subplots(2 if gated else 1, 1, squeeze=False, sharex=True)[:, 0]
        _draw_costs(panels[0], found)
        if told.layers:
            panels[0].axvspan(told.layers[0] - 0.4, told.layers[-1] + 0.4, color=BLUE, alpha=0.1)
        if gated:
            _draw_drives(panels[1], found)
        for axes in panels:
            axes.grid(True, axis="y", color="#e6e6e6", linewidth=0.8)
            axes.legend(frameon=False)
            if told.gated is not None:
                axes.axvline(told.gated, color=ORANGE, linewidth=1, linestyle=":")
        panels[-1].set_xlabel("block")
        panels[-1].set_xticks(range(0, found.depth, max(1, found.depth // 15)))
    return figure


def _draw_costs(axes: Axes, found: Costs) -> None:
    past = [(b.layer, b.gates.past_gate if b.gates else None) for b in found.blocks]
    _curve(axes, "W writes it", BLUE, "o", [(b.layer, b.keys) for b in found.blocks])
    _curve(axes, "a neuron writes it", ORANGE, "s", [(b.layer, b.inputs) for b in found.blocks])
    _curve(axes, "where its gate is open", VERMILLION, "^", past)
    axes.set_yscale("log")
    axes.set_ylabel("1e-4 nats a token of text")
    axes.set_title("cost of a value")


def _curve(
    axes: Axes, name: str, colour: str, marker: str, points: Sequence[tuple[int, Rate | None]]
) -> None:
    known = [(layer, rate) for layer, rate in points if rate and rate.mean > 0]
    if known:
        axes.errorbar(
            [layer for layer, _ in known],
            [rate.mean / UNIT for _, rate in known],
            yerr=[rate.standard_error / UNIT for _, rate in known],
            color=colour,
            marker=marker,
            label=name,
        )


def _draw_drives(axes: Axes, found: Costs) -> None:
    drives = [(block.layer, block.gates) for block in found.blocks if block.gates]
    layers = [layer for layer, _ in drives]
    rare = [d.text_rare for _, d in drives]
    axes.plot(layers, rare, color=INK, marker="o", label="one token of text in 1000 exceeds")
    others = [(layer, d.rivals.mean, d.rival) for layer, d in drives if d.rivals and d.rival]
    if others:
        at, means, most = zip(*others, strict=True)
        axes.plot(at, means, color=ORANGE, marker="s", label="largest on another fact, mean")
        axes.plot(at, most, color=VERMILLION, marker="^", label="largest of all facts")
    axes.axhline(found.threshold, color=INK, linewidth=1, linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("share of its own subject's")
    axes.set_title("drive of a gate (dashed: above, it is open)")
