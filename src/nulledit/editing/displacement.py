"""How far a batch moves what a layer gives at the keys of facts before it.

A solve holds old keys only as fast as its ridge and its history do. What a batch shifts there
foretells which facts are lost, better than the norms of updates do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nulledit.editing.weights import EditedWeights
from nulledit.ledger.epoch_solver import LayerState
from nulledit.ledger.records import Column
from nulledit.models.layer_edit import LayerEdit

MOST = 256  # old keys that are looked at, spread evenly over the stream


@dataclass(frozen=True)
class Displacement:
    """What one batch did to the outputs at old keys."""

    batch: int
    """Its number in the ledger."""
    layers: Mapping[int, float]
    """‖Δ K_old‖/‖W K_old‖ by block, W before the batch; for gated edits, of what neurons give."""

    @property
    def largest(self) -> float:
        """The largest share; nan if one is."""
        return max(self.layers.values(), key=lambda x: math.inf if math.isnan(x) else x)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        shares = {str(layer): share for layer, share in self.layers.items()}
        return {"batch": self.batch, "layers": shares}


def displaced(before: LayerEdit, after: LayerEdit, keys: Tensor) -> float:
    """‖Δ K‖/‖W K‖ at `keys` K [d_in, n], from `before` to `after`; 0 where nothing was given."""
    was = before.answer(keys)
    moved, norm = float((after.answer(keys) - was).norm()), float(was.norm())
    return moved / norm if norm else 0.0


def of_batch(
    weights: EditedWeights, before: Mapping[int, LayerState], old: Sequence[Column], batch: int
) -> Displacement:
    """What `batch` did at the keys of `old` columns since the layers' states were `before`."""
    found = {}
    for layer in weights.layers:
        if held := weights.history.at_layer(layer, old):
            keys, _ = weights.recorded(_some(held), layer)
            found[layer] = displaced(before[layer].edit, weights.edit(layer), keys)
    return Displacement(batch, found)


def of_history(weights: EditedWeights) -> list[Displacement]:
    """The same of every batch in the model but the first, as its ledger folds them."""
    found: dict[int, dict[int, float]] = {}
    for layer in weights.layers:
        old: list[Column] = []
        for batch, before, after in weights.batches(layer):
            if old:
                keys, _ = weights.recorded(_some(old), layer)
                shares = found.setdefault(batch[0].batch, {})
                shares[layer] = displaced(before.edit, after.edit, keys)
            old += batch
    return [Displacement(number, shares) for number, shares in sorted(found.items())]


def _some(columns: Sequence[Column]) -> Sequence[Column]:
    return columns[:: -(-len(columns) // MOST)]
