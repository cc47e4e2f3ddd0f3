"""Signs that come before a collapse, as lines for a report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nulledit.evaluation.metrics import Rate
from nulledit.ledger.weights import LayerReport

# Set on one stream and judged on others by the study `collapse` (docs/gates.md).
ROOM_LOW = 0.75  # share of the usable directions
NORM_HIGH = 1.0  # ‖Δ‖/‖W₀‖: the edits weigh as much as what they edit
HIDDEN_HIGH = 1.0  # growth of ‖h‖ at the edited subjects: twice as long


def warnings_of(
    layers: Sequence[LayerReport], hidden_growth: Rate | float | None = None
) -> list[str]:
    """A line for each sign that warns of a collapse; none where all is well.

    `layers`: the state of the edited layers (`EditReport.layers`). `hidden_growth`: the growth of
    ‖h‖ at the edited subjects as a share (`gates.hidden.hidden_growth`); None: not measured.
    """
    return [*_room(layers), *_norm(layers), *_hidden(hidden_growth)]


def _room(layers: Sequence[LayerReport]) -> list[str]:
    rooms = {report.layer: report.room for report in layers if not math.isnan(report.room)}
    low = {layer: room for layer, room in rooms.items() if room < ROOM_LOW}
    if not low:
        return []
    layer = min(low, key=lambda layer: low[layer])
    return [
        f"room left is {100 * low[layer]:.0f} % at layer {layer} (below {100 * ROOM_LOW:.0f} % "
        "streams have collapsed): protect less (null_space.value), or edit more layers"
    ]


def _norm(layers: Sequence[LayerReport]) -> list[str]:
    high = [r for r in layers if not r.update_share <= NORM_HIGH]  # nan is high
    if not high:
        return []
    worst = max(high, key=lambda r: math.inf if math.isnan(r.update_share) else r.update_share)
    return [
        f"‖Δ‖/‖W₀‖ is {worst.update_share:.2f} at layer {worst.layer} (above {NORM_HIGH:g} streams "
        "have collapsed): stop values earlier (values.stop_loss), or undo what is not needed"
    ]


def _hidden(growth: Rate | float | None) -> list[str]:
    if growth is None:
        return []
    value = growth.mean if isinstance(growth, Rate) else growth
    if value <= HIDDEN_HIGH:
        return []
    return [
        f"hidden states at the edited subjects have grown by {100 * value:.0f} % (above "
        f"{100 * HIDDEN_HIGH:.0f} % streams have collapsed): a smaller values.clamp writes less"
    ]
