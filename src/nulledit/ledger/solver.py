"""Recorded columns to what they leave in a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nulledit.config import Recipe
from nulledit.errors import LedgerError
from nulledit.ledger.records import Column, Epoch, History, Ledger
from nulledit.ledger.tensors import by_batch, read_form, read_spectrum, recorded
from nulledit.linalg.preconditioner import Preconditioner
from nulledit.linalg.solve import RecursiveState, room_left
from nulledit.linalg.spectrum import Spectrum
from nulledit.methods import Descent, Filter, Gate, Method, Solve, find_method
from nulledit.methods.gates import gated_neurons, moments_of
from nulledit.methods.problem import LayerProblem, TargetLoss
from nulledit.models.layer_edit import LayerEdit, NeuronUpdate, WeightUpdate, update_of


@dataclass(frozen=True)
class LayerState:
    """Where the solve of a layer is."""

    edit: LayerEdit
    """What the columns so far leave in the layer."""
    start: Tensor
    """Weight [d_out, d_in] that the epoch began with, float64: W₀ in the first."""
    total: Tensor
    """ΣΔ [d_out, d_in] of the epoch's batches, float64."""
    recursion: RecursiveState | None = None
    """What the epoch's columns leave of the preconditioner, where the method goes on from it."""

    @property
    def weight(self) -> Tensor:
        """W [d_out, d_in] of the edit."""
        return update_of(self.edit).weight


@dataclass(frozen=True)
class LayerPreconditioners:
    """What one layer's spectrum comes to under one recipe."""

    spectrum: Spectrum
    """Of the preserved keys, with the eigenvectors that the preconditioners need."""
    own: Preconditioner
    """G of the method's gains, zero outside the null space if projected inside."""
    projector: Preconditioner
    """P on the null space."""
    leakage: float
    """tr(GC) / (‖G‖ tr C), of what is written: the share of the preserved keys' energy that edits
    may disturb, weighed by how freely. tr(PC)/tr(C) for a projection."""

    @classmethod
    def of(cls, recipe: Recipe, spectrum: Spectrum, threshold: float) -> LayerPreconditioners:
        """LookupError where a compact spectrum lacks eigenvectors that G or P needs."""
        method = find_method(recipe.method.name)
        free = (spectrum.eigenvalues < threshold).to(spectrum.eigenvalues)
        gains = method.gains(spectrum.eigenvalues, threshold, method.read(recipe.method))
        projection = method.projection(recipe.method)
        if projection == "inside":
            gains = gains * free
        written = gains * free if projection == "after" else gains
        energy = spectrum.eigenvalues * written / written.max().clamp_min(1e-300)
        leakage = float(energy.sum() / spectrum.eigenvalues.sum())
        if method.reads_moment:
            spectrum.whole()
        kept = spectrum if method.reads_moment else spectrum.reduced(gains, free)
        return cls(kept, spectrum.preconditioner(gains), spectrum.preconditioner(free), leakage)


class LayerSolver:
    """Makes columns into what they leave in one layer, epoch after epoch."""

    def __init__(self, ledger: Ledger, layer: int, device: torch.device):
        """Of `ledger`, whose history may go on; solves run on `device`."""
        self.ledger, self.layer, self.device = ledger, layer, device
        self.base = self.history.original(layer).to(device).double()  # W₀
        self._solvers: dict[int, EpochSolver] = {}

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.ledger.history

    @property
    def latest(self) -> EpochSolver:
        """Of the latest epoch that edits the layer."""
        return self._solver(self._epochs()[-1])

    def fold(self, columns: Sequence[Column]) -> LayerState:
        """The state with exactly `columns` in the model, at its latest epoch."""
        edit: LayerEdit = WeightUpdate(self.base, self.base)
        before: list[Column] = []
        for epoch in self._epochs():
            mine = [c for c in columns if self.history.epoch_of(c) == epoch.id]
            state = self._solver(epoch).fold(edit, before, mine)
            edit, before = state.edit, before + mine
        return state

    def _epochs(self) -> list[Epoch]:
        return [e for e in self.history.epochs if self.layer in e.recipe.layers]

    def _solver(self, epoch: Epoch) -> EpochSolver:
        if epoch.id not in self._solvers or self._solvers[epoch.id].epoch != epoch:
            method = find_method(epoch.recipe.method.name)
            solver = next(found for kind, found in SOLVERS.items() if isinstance(method, kind))
            self._solvers[epoch.id] = solver(self.ledger, epoch, self.layer, self.device)
        return self._solvers[epoch.id]


class EpochSolver:
    """One epoch of one layer: its method on its batches.

    With history, a run of batches is one joint solve over all columns: it equals the official
    sequential rule, and without a column it equals that rule without the fact. Columns of epochs
    before join it with what the layer gives at their keys as the epoch begins. For a `Filter`
    that solve is done batch by batch (`RecursiveState`), in a fold as in a run: the same columns
    give the same bits, and a new batch does nothing again. A `Solve` does all of it anew. Without
    history, each batch is solved in its turn on the weight that the batches before left.
    """

    def __init__(self, ledger: Ledger, epoch: Epoch, layer: int, device: torch.device):
        """`epoch` of `ledger` at `layer`; solves run on `device`."""
        self.ledger, self.epoch, self.layer, self.device = ledger, epoch, layer, device
        self.recipe = epoch.recipe
        self.method = find_method(self.recipe.method.name)
        self.settings = self.method.read(self.recipe.method)
        self.projection = self.method.projection(self.recipe.method)
        self.keeps = self.method.keeps(self.settings)
        self.recursive = self.keeps and isinstance(self.method, Filter)
        spectrum, threshold = read_spectrum(self.history.tensors[epoch.tensors], layer, device)
        self.preconditioners = LayerPreconditioners.of(self.recipe, spectrum, threshold)

        self._shares: dict[tuple[str, int], float] = {}  # by tensors and row, as keys don't change

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.ledger.history

    @property
    def confining(self) -> Preconditioner:
        """What says where edits may move: P where there is one, else G."""
        found = self.preconditioners
        return found.own if self.projection == "none" else found.projector

    def null_space_shares(self, columns: Sequence[Column]) -> Tensor:
        """‖Pk‖²/‖k‖² [n] of the keys of `columns`, each computed once."""
        names = [(self.history.batches[c.batch - 1].tensors, c.row) for c in columns]
        new = [i for i, name in enumerate(names) if name not in self._shares]
        if new:
            keys = recorded(self.history, [columns[i] for i in new], self.layer)[0]
            shares = self.confining.null_space_share(keys.to(self.device)).tolist()
            self._shares.update(zip((names[i] for i in new), shares, strict=True))
        return torch.tensor([self._shares[name] for name in names], dtype=torch.float64)

    def leakage(self, columns: Sequence[Column]) -> float:
        """Share of the preserved keys' energy that edits may disturb, whatever their `columns`."""
        return self.preconditioners.leakage

    def protected(self, d_in: int) -> int:
        """How many of the d_in directions edits may not use."""
        return d_in - self.confining.rank

    def room(self, state: LayerState, columns: Sequence[Column]) -> float:
        """Share of the usable directions that `columns`, which `state` holds, have not taken.

        nan where no direction is usable.
        """
        own = self.preconditioners.own
        if not columns:
            return 1.0
        if state.recursion is None:
            return room_left(own, self._recorded(columns)[0])
        return 1 - state.recursion.taken / own.rank if own.rank else math.nan

    def fold(
        self, edit: LayerEdit, before: Sequence[Column], columns: Sequence[Column]
    ) -> LayerState:
        """`columns` of this epoch on the `edit` that epochs before left, with columns `before`."""
        start = update_of(edit).weight
        state = LayerState(edit, start, torch.zeros_like(start))
        if self.keeps and not self.recursive and columns:
            return self._add(state, before, (), *self._recorded(columns))
        own: list[Column] = []
        for batch in by_batch(columns).values():
            state = self._add(state, before, own, *self._recorded(batch))
            own += batch
        return state

    def add(
        self,
        state: LayerState,
        columns: Sequence[Column],
        keys: Tensor,
        targets: Tensor,
        target_loss: TargetLoss | None = None,
    ) -> LayerState:
        """Go on from `state`, which holds `columns`, to new `keys` [d_in, n] with absolute
        `targets` [d_out, n].
        """
        held = self.history.at_layer(self.layer, columns)
        own = [c for c in held if self.history.epoch_of(c) == self.epoch.id]
        before = [c for c in held if self.history.epoch_of(c) != self.epoch.id]
        return self._add(state, before, own, self._exact(keys), self._exact(targets), target_loss)

    def write(
        self,
        state: LayerState,
        columns: Sequence[Column],
        keys: Tensor,
        residual: Tensor | None,
        target_loss: TargetLoss | None = None,
    ) -> tuple[LayerState, dict[str, Tensor]]:
        """Go on from `state`, which holds `columns`, to `residual` [d_out, n] at new `keys`.

        Without a residual the method finds the update by `target_loss`. Also returns what is to be
        recorded: one row per key, in the dtype of `keys`, so that a reloaded ledger solves with
        the same numbers.
        """
        now = state.edit.answer(keys)
        targets = (now if residual is None else now + residual).to(keys.dtype)
        after = self.add(state, columns, keys, targets, target_loss)
        return after, self._rows(keys, targets)

    def _rows(self, keys: Tensor, targets: Tensor) -> dict[str, Tensor]:
        named = {"keys": keys, "targets": targets}
        return {f"{name}.{self.layer}": t.mT.contiguous() for name, t in named.items()}

    def _add(
        self,
        state: LayerState,
        before: Sequence[Column],
        own: Sequence[Column],
        K: Tensor,
        V: Tensor,
        target_loss: TargetLoss | None = None,
    ) -> LayerState:
        """Go on from `state`, which holds the columns `before` this epoch and its `own`."""
        if self.recursive:
            return self._continued(state, before, K, V)
        past, (own_keys, own_targets) = self._recorded(before)[0], self._recorded(own)
        if self.keeps:
            start, weight = torch.zeros_like(state.total), state.start
            K, V = torch.cat([own_keys, K], dim=1), torch.cat([own_targets, V], dim=1)
            residual = torch.cat([V.new_zeros(len(V), past.shape[1]), V - weight @ K], dim=1)
            K, past = torch.cat([past, K], dim=1), past[:, :0]
        else:
            start, weight = state.total, state.weight
            residual, past = V - weight @ K, torch.cat([past, own_keys], dim=1)
        problem = LayerProblem(
            layer=self.layer,
            weight=weight,
            original=state.start,
            keys=K,
            residual=residual,
            past_keys=past,
            spectrum=self.preconditioners.spectrum,
            preconditioner=self.preconditioners.own,
            projector=self.preconditioners.projector,
            projection=self.projection,
            settings=self.settings,
            target_loss=target_loss,
        )
        return self._state(state, start + self.method.update(problem))

    def _continued(
        self, state: LayerState, before: Sequence[Column], K: Tensor, V: Tensor
    ) -> LayerState:
        recursion = state.recursion
        if recursion is None:
            recursion = RecursiveState(self.preconditioners.own)
            if before:
                past = self._recorded(before)[0]
                _, recursion = recursion.write(past, V.new_zeros(len(V), past.shape[1]))
        plain = self.method.finish is None and self.projection != "after"
        weight = state.weight if plain else state.start + state.total
        update, recursion = recursion.write(K, V - weight @ K)
        return self._state(state, state.total + update, recursion)

    def _state(
        self, before: LayerState, total: Tensor, recursion: RecursiveState | None = None
    ) -> LayerState:
        """The state with `total` [d_out, d_in] as the epoch's ΣΔ."""
        added, start = total, before.start
        if recursion and self.projection == "after":  # else each Δ is projected already
            added = self.preconditioners.projector.apply(added.mT).mT
        if self.method.finish:
            added = self.method.finish(added, start, self.settings)
        edit = replace(update_of(before.edit), weight=start + added)
        return LayerState(edit, start, total, recursion)

    def _recorded(self, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
        keys, targets = recorded(self.history, columns, self.layer)
        return self._exact(keys), self._exact(targets)

    def _exact(self, tensor: Tensor) -> Tensor:
        """In one memory layout, whatever it has: the same columns must give the same bits."""
        return tensor.to(self.device).double().contiguous()


class DescentSolver(EpochSolver):
    """An epoch by gradient: what is recorded and folded are the updates themselves."""

    def fold(
        self, edit: LayerEdit, before: Sequence[Column], columns: Sequence[Column]
    ) -> LayerState:
        """As `EpochSolver.fold`; LedgerError unless each batch is in it whole, or not at all."""
        state = super().fold(edit, before, ())
        for number, batch in by_batch(columns).items():
            tensors = self.history.tensors[self.history.batches[number - 1].tensors]
            if len(batch) != len(tensors[f"keys.{self.layer}"]):
                raise LedgerError(
                    f"batch {number} was written as one update by {self.method.name} and can't be "
                    f"in the model with {len(batch)} of its facts"
                )
            state = self._moved(state, tensors[f"update.{self.layer}"])
        return state

    def write(
        self,
        state: LayerState,
        columns: Sequence[Column],
        keys: Tensor,
        residual: Tensor | None,
        target_loss: TargetLoss | None = None,
    ) -> tuple[LayerState, dict[str, Tensor]]:
        """As `EpochSolver.write`; the targets recorded are what the update gives at the keys."""
        found, _ = super().write(state, columns, keys, residual, target_loss)
        update = (found.total - state.total).to(keys.dtype)
        after = self._moved(state, update)
        rows = self._rows(keys, after.edit.answer(keys).to(keys.dtype))
        return after, rows | {f"update.{self.layer}": update.cpu()}

    def _moved(self, state: LayerState, update: Tensor) -> LayerState:
        return self._state(state, state.total + self._exact(update))


class GateSolver(EpochSolver):
    """An epoch of gated edits: all its columns are solved together, whatever batch they are of.

    What is recorded as a target is what the neurons are to add at the fact's input; the order in
    which facts came, and their batches, mean nothing.
    """

    def __init__(self, ledger: Ledger, epoch: Epoch, layer: int, device: torch.device):
        super().__init__(ledger, epoch, layer, device)
        tensors = self.history.tensors[epoch.tensors]
        self.moment, self.mean = moments_of(read_spectrum(tensors, layer, device)[0])
        self.form = read_form(tensors, layer)

    def null_space_shares(self, columns: Sequence[Column]) -> Tensor:
        """1 − E[s²] [n] of the directions s of `columns`: the share that text does not drive."""
        X = self._recorded(columns)[0]
        return 1 - 1 / (X * torch.linalg.solve(self.moment, X)).sum(0).cpu()

    def leakage(self, columns: Sequence[Column]) -> float:
        """Mean E[s²] of the directions s of `columns`: how far text drives their gates."""
        return float(1 - self.null_space_shares(columns).mean()) if columns else 0.0

    def protected(self, d_in: int) -> int:
        """None of the d_in directions: W stays as it is."""
        return 0

    def room(self, state: LayerState, columns: Sequence[Column]) -> float:
        """Neurons are added as they are needed."""
        return 1.0

    def fold(
        self, edit: LayerEdit, before: Sequence[Column], columns: Sequence[Column]
    ) -> LayerState:
        """Neurons for `columns`, besides a block's own units; nothing was edited `before`."""
        return self._together(edit.base, *self._recorded(columns))

    def write(
        self,
        state: LayerState,
        columns: Sequence[Column],
        keys: Tensor,
        residual: Tensor | None,
        target_loss: TargetLoss | None = None,
    ) -> tuple[LayerState, dict[str, Tensor]]:
        """As `EpochSolver.write`; `residual` is what the unedited model lacks."""
        assert residual is not None
        targets = residual.to(keys.dtype)
        after = self.add(state, columns, keys, targets)
        return after, self._rows(keys, targets)

    def add(
        self,
        state: LayerState,
        columns: Sequence[Column],
        keys: Tensor,
        targets: Tensor,
        target_loss: TargetLoss | None = None,
    ) -> LayerState:
        """As `EpochSolver.add`."""
        K, V = self._recorded(self.history.at_layer(self.layer, columns))
        K, V = torch.cat([K, self._exact(keys)], 1), torch.cat([V, self._exact(targets)], 1)
        return self._together(state.edit.base, K, V)

    def _together(self, base: Tensor, K: Tensor, V: Tensor) -> LayerState:
        neurons = None
        if K.shape[1]:
            neurons = gated_neurons(K, V, self.moment, self.mean, self.form, self.settings)
        edit = NeuronUpdate(base, neurons, self.form.activation)
        return LayerState(edit, base[:, :0], base[:, :0])

    def _recorded(self, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
        if columns:
            return super()._recorded(columns)
        empty = self.mean.new_empty
        d_out = len(self.history.original(self.layer))
        return empty(len(self.mean), 0), empty(d_out, 0)


SOLVERS: dict[type[Method], type[EpochSolver]] = {
    Gate: GateSolver,
    Filter: EpochSolver,
    Solve: EpochSolver,
    Descent: DescentSolver,
}
"""Which solver makes the edits of a kind of method, and so the form that they leave in a layer."""
