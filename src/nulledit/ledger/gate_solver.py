"""Epochs of gated edits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nulledit.ledger.epoch_solver import EpochSolver, LayerState
from nulledit.ledger.records import Column, Epoch, Ledger
from nulledit.ledger.tensors import read_form, read_spectrum
from nulledit.linalg.neurons import Neurons
from nulledit.methods.gates import TextInputs, gated_neurons
from nulledit.methods.problem import TargetLoss
from nulledit.models.layer_edit import LayerEdit, NeuronUpdate


class GateSolver(EpochSolver[LayerState]):
    """An epoch of gated edits: all its columns are solved together, whatever batch they are of.

    What is recorded as a target is what neurons are to add at the fact's input; the order in which
    facts came, and their batches, mean nothing. Neurons of epochs before stay as they are, and what
    they give at this epoch's inputs is not written again.
    """

    def __init__(self, ledger: Ledger, epoch: Epoch, layer: int, device: torch.device):
        super().__init__(ledger, epoch, layer, device)
        tensors = self.history.tensors[epoch.tensors]
        self.text = TextInputs.of(read_spectrum(tensors, layer, device)[0])
        self.width, self.form = len(self.text.mean), read_form(tensors, layer)

    def fold(
        self, edit: LayerEdit, before: Sequence[Column], columns: Sequence[Column]
    ) -> LayerState:
        """As `EpochSolver.fold`; epochs `before` are of gated edits, too."""
        begun = edit.neurons if isinstance(edit, NeuronUpdate) else None
        return self._state(edit.base, begun, *self._recorded(columns))

    def null_space_shares(self, columns: Sequence[Column]) -> Tensor:
        """1 − E[s²] [n] of the directions s of `columns`: the share that text does not drive."""
        return 1 - 1 / self.text.energies(self._recorded(columns)[0]).cpu()

    def leakage(self, columns: Sequence[Column]) -> float:
        """Mean E[s²] of the directions s of `columns`: how far text drives their gates."""
        return float(1 - self.null_space_shares(columns).mean()) if columns else 0.0

    def protected(self, d_in: int) -> int:
        """None of the d_in directions: W stays as it is."""
        return 0

    def room(self, state: LayerState, columns: Sequence[Column]) -> float:
        """All of it: neurons are added as they are needed."""
        return 1.0

    def _targets(self, state: LayerState, keys: Tensor, residual: Tensor | None) -> Tensor:
        """What the unedited model lacks there."""
        assert residual is not None
        return residual

    def _add(
        self,
        state: LayerState,
        before: Sequence[Column],
        own: Sequence[Column],
        K: Tensor,
        V: Tensor,
        target_loss: TargetLoss | None = None,
    ) -> LayerState:
        edit = state.edit
        held = edit.neurons if isinstance(edit, NeuronUpdate) else None
        begun = held.first(len(before)) if held and before else None  # a neuron for each column
        own_keys, own_targets = self._recorded(own)
        K, V = torch.cat([own_keys, K], dim=1), torch.cat([own_targets, V], dim=1)
        return self._state(edit.base, begun, K, V)

    def _state(self, base: Tensor, begun: Neurons | None, K: Tensor, V: Tensor) -> LayerState:
        """`begun` neurons, and those that write what they lack of V [d_out, n] at K [d, n]."""
        neurons, written = begun, None
        # one column keeps the strides of many, with which products round otherwise
        K, V = (t.clone(memory_format=torch.contiguous_format) for t in (K, V))
        if K.shape[1]:
            there = begun.columns @ begun.units(K, self.form.activation) if begun else None
            lacking = V if there is None else V - there
            fresh, written = gated_neurons(K, lacking, self.text, self.form, self.settings)
            neurons = begun.with_others(fresh) if begun else fresh
            written = written if there is None else written + there
        return LayerState(NeuronUpdate(base, neurons, self.form.activation, written))
