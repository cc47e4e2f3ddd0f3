"""Signs that come before a collapse, as lines for a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nulledit.editing.weights import LayerReport
from nulledit.evaluation.stats import Rate

# From the study `collapse` (docs/limits.md): what one stream showed when it was last well, judged
# on streams of other facts. ‖h‖ at the edited subjects is left out: it is as large as values are
# made from the first batch on, and told of one collapse only when that had come.
ROOM_LOW = 0.7  # share of the usable directions
NORM_HIGH = 0.9  # ‖Δ‖/‖W₀‖
TEXT_HIGH = 0.01  # growth of ‖h‖ on text that no edit touches


def warnings_of(
    layers: Sequence[LayerReport], hidden_growth_text: Rate | float | None = None
) -> list[str]:
    """A line for each sign that warns of a collapse; none where all is well.

    `layers`: the state of the edited layers (`EditReport.layers`). `hidden_growth_text`: growth of
    ‖h‖ on other text as a share, from `hidden_growth` with `text_rows`; None: not measured.
    """
    return [*_room(layers), *_norm(layers), *_hidden(hidden_growth_text)]


def _room(layers: Sequence[LayerReport]) -> list[str]:
    rooms = {report.layer: report.room for report in layers if not math.isnan(report.room)}
    low = {layer: room for layer, room in rooms.items() if room < ROOM_LOW}
    if not low:
        return []
    layer = min(low, key=lambda layer: low[layer])
    return [
        f"room left is {100 * low[layer]:.0f} % at layer {layer} (a stream that fell below "
        f"{100 * ROOM_LOW:.0f} % collapsed later): undo what is not needed, or protect less "
        "(null_space.value)"
    ]


def _norm(layers: Sequence[LayerReport]) -> list[str]:
    high = [r for r in layers if not r.update_share <= NORM_HIGH]  # nan is high
    if not high:
        return []
    worst = max(high, key=lambda r: math.inf if math.isnan(r.update_share) else r.update_share)
    return [
        f"‖Δ‖/‖W₀‖ is {worst.update_share:.2f} at layer {worst.layer} (a stream that passed "
        f"{NORM_HIGH:g} collapsed later): undo what is not needed, or stop values earlier "
        "(values.stop_loss)"
    ]


def _hidden(growth: Rate | float | None) -> list[str]:
    if growth is None:
        return []
    value = growth.mean if isinstance(growth, Rate) else growth
    if value <= TEXT_HIGH:
        return []
    return [
        f"hidden states of other text have grown by {100 * value:.1f} % (a stream that passed "
        f"{100 * TEXT_HIGH:.0f} % collapsed later): edits reach what they should leave alone"
    ]
