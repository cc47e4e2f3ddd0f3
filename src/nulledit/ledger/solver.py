"""Recorded columns to what they leave in a layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from nulledit.ledger.epoch_solver import EpochSolver, LayerState
from nulledit.ledger.gate_solver import GateSolver
from nulledit.ledger.records import Column, Epoch, History, Ledger
from nulledit.ledger.tensors import by_batch, recorded
from nulledit.ledger.update_solver import DescentSolver, UpdateSolver
from nulledit.methods import Descent, Filter, Gate, Method, Solve, find_method
from nulledit.models.layer_edit import LayerEdit, WeightUpdate

SOLVERS: dict[type[Method], type[EpochSolver[Any]]] = {
    Filter: UpdateSolver,
    Solve: UpdateSolver,
    Descent: DescentSolver,
    Gate: GateSolver,
}
"""Which solver makes the edits of a kind of method, and so the form that they leave in a layer."""


class LayerSolver:
    """Makes columns into what they leave in one layer, epoch after epoch."""

    def __init__(self, ledger: Ledger, layer: int, device: torch.device):
        """Of `ledger`, whose history may go on; solves run on `device`."""
        self.ledger, self.layer, self.device = ledger, layer, device
        self.base = self.history.original(layer).to(device)  # W₀
        self._solvers: dict[int, EpochSolver[Any]] = {}

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.ledger.history

    @property
    def latest(self) -> EpochSolver[Any]:
        """Of the latest epoch that edits the layer."""
        return self._solver(self._epochs()[-1])

    def fold(self, columns: Sequence[Column]) -> LayerState:
        """The state with exactly `columns` in the model, at its latest epoch."""
        edit: LayerEdit = WeightUpdate(self.base)
        before: list[Column] = []
        for epoch in self._epochs():
            mine = [c for c in columns if self.history.epoch_of(c) == epoch.id]
            state = self._solver(epoch).fold(edit, before, mine)
            edit, before = state.edit, before + mine
        return state

    def batches(
        self, columns: Sequence[Column]
    ) -> Iterator[tuple[list[Column], LayerState, LayerState]]:
        """Each batch of `columns` in turn, with the states before and after it."""
        edit: LayerEdit = WeightUpdate(self.base)
        before: list[Column] = []
        for epoch in self._epochs():
            solver = self._solver(epoch)
            mine = [c for c in columns if self.history.epoch_of(c) == epoch.id]
            state, own = solver.fold(edit, before, ()), list[Column]()
            for batch in by_batch(mine).values():
                if solver.method.by_gradient:
                    after = solver.fold(edit, before, own + batch)
                else:
                    rows = recorded(self.history, batch, self.layer)
                    after = solver.add(state, before + own, *rows)
                yield batch, state, after
                state, own = after, own + batch
            edit, before = state.edit, before + mine

    def _epochs(self) -> list[Epoch]:
        return [e for e in self.history.epochs if self.layer in e.recipe.layers]

    def _solver(self, epoch: Epoch) -> EpochSolver[Any]:
        if epoch.id not in self._solvers or self._solvers[epoch.id].epoch != epoch:
            method = find_method(epoch.recipe.method.name)
            solver = next(found for kind, found in SOLVERS.items() if isinstance(method, kind))
            self._solvers[epoch.id] = solver(self.ledger, epoch, self.layer, self.device)
        return self._solvers[epoch.id]
