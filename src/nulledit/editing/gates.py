"""What the gates of gated edits give at the facts' own inputs, from the closed form alone.

A gate that opens on another fact's input makes the two share what they write. The columns of all
facts together are to part them again; where two gates hardly differ, the ridge does not let them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.editing.weights import EditedWeights
from nulledit.ledger.journal import Journal
from nulledit.ledger.records import Column, History
from nulledit.ledger.solver import LayerSolver
from nulledit.ledger.tensors import recorded
from nulledit.linalg.neurons import Neurons
from nulledit.methods import find_method
from nulledit.methods.gates import full_openings, rivals
from nulledit.models.layer_edit import LayerEdit, NeuronUpdate

CROWDED = 0.5
"""Share of its target that a fact misses from which on it is named; facts that missed up to half of
it said it no less often (docs/methods/gated.md)."""
RIVAL = 0.3
"""Share of a gate's opening from which on another fact is to blame for that."""
SMALL = 0.1
"""Share of the median target's length that the least of targets is taken to have: what the model
says already lacks nothing, and a share of that would be no measure."""
SHOWN = 5  # crowded facts that a notice names


@dataclass(frozen=True)
class FactGate:
    """The gate of a fact beside those of the other facts."""

    fact_id: str
    """Whose it is."""
    rival: str | None
    """Id of the fact whose input opens this gate the most, or whose gate opens the most here; None
    without another fact. Facts that share a value are no rivals."""
    share: float
    """How far, as a share of what that gate gives on its own fact; 0 without another fact."""
    missed: float
    """‖what all neurons give at the fact's input − its target‖/‖target‖: what the columns, solved
    together, do not hold of it. The ridge alone makes λ/(1 + λ) of it."""

    @property
    def crowded(self) -> bool:
        """Whether its rivals take so much that the columns can not hold them all."""
        return self.missed > CROWDED and self.rival is not None and self.share > RIVAL


def fact_gates(weights: EditedWeights) -> list[FactGate]:
    """The gates in the model, a neuron each, in the order of its columns; none of other methods."""
    return [
        gate
        for layer in weights.layers
        for gate in _of_layer(weights.history, layer, weights.edit(layer))
    ]


def recorded_gates(history: History) -> list[FactGate]:
    """The same from a ledger without its model, whose neurons are solved once more."""
    if not history.epochs or not find_method(history.epoch.recipe.method.name).apart:
        return []
    ledger, cpu = Journal(history), torch.device("cpu")
    return [
        gate
        for layer in history.layers
        for gate in _of_layer(
            history, layer, LayerSolver(ledger, layer, cpu).fold(history.active).edit
        )
    ]


def own_openings(weights: EditedWeights, layer: int) -> tuple[list[str], Tensor]:
    """Whose the gates of `layer` are, and what each gives on its own fact [n]; nothing for others.

    In the order in which they are in the block, after its own units.
    """
    edit = weights.edit(layer)
    if not isinstance(edit, NeuronUpdate) or edit.neurons is None:
        return [], torch.empty(0)
    columns, keys, _ = _recorded(weights.history, layer, edit.neurons)
    own = edit.neurons.at_own(keys, edit.activation)
    return [column.fact.id for column in columns], full_openings(own)


def crowded_notice(gates: Sequence[FactGate]) -> str | None:
    """Which facts can not be held beside which, and what to do; None where all can."""
    worst = sorted((gate for gate in gates if gate.crowded), key=lambda gate: -gate.missed)
    if not worst:
        return None
    named = "; ".join(
        f"{gate.fact_id} beside {gate.rival} (share {gate.share:.2f}, {100 * gate.missed:.0f} % "
        "not held)"
        for gate in worst[:SHOWN]
    )
    more = f"; and {len(worst) - SHOWN} more" if len(worst) > SHOWN else ""
    return f"gates that open on each other's facts: {named}{more}: {TELL_APART}"


TELL_APART = (
    "another block may tell them apart (`nulledit locate --by cost`), or a higher method.threshold"
)
"""Of facts whose gates open on each other's."""


def _of_layer(history: History, layer: int, edit: LayerEdit) -> list[FactGate]:
    if not isinstance(edit, NeuronUpdate) or edit.neurons is None:
        return []
    columns, keys, targets = _recorded(history, layer, edit.neurons)
    units = edit.neurons.units(keys, edit.activation)  # [gates, facts]
    groups = {(c.batch, c.group): i for i, c in enumerate(columns)}
    owners = torch.tensor([groups[c.batch, c.group] for c in columns], device=keys.device)
    nearest, shares = rivals(units.mT, owners)
    sizes = targets.norm(dim=0)
    sizes = sizes.clamp_min(max(SMALL * float(sizes.median()), 1e-12))
    missed = (edit.neurons.columns @ units - targets).norm(dim=0) / sizes
    found = zip(columns, nearest.tolist(), shares.tolist(), missed.tolist(), strict=True)
    return [
        FactGate(
            column.fact.id,
            columns[other].fact.id if share > -torch.inf else None,
            max(share, 0.0),
            lacking,
        )
        for column, other, share, lacking in found
    ]


def _recorded(
    history: History, layer: int, neurons: Neurons
) -> tuple[list[Column], Tensor, Tensor]:
    """Columns of `neurons`, one each, with their inputs [d, n] and targets [d_out, n]."""
    columns = list(history.at_layer(layer, history.active))
    keys, targets = recorded(history, columns, layer)
    return columns, keys.to(neurons.rows), targets.to(neurons.rows)
