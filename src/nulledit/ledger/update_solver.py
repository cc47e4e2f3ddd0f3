"""Epochs whose edits are updates of W: filters, solves and descents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.config import Recipe
from nulledit.errors import LedgerError
from nulledit.ledger.epoch_solver import EpochSolver, LayerState
from nulledit.ledger.records import Column, Epoch, Ledger
from nulledit.ledger.tensors import by_batch, read_spectrum, recorded
from nulledit.linalg.preconditioner import Preconditioner
from nulledit.linalg.solve import RecursiveState, room_left
from nulledit.linalg.spectrum import Spectrum
from nulledit.methods import Filter, find_method
from nulledit.methods.problem import LayerProblem, TargetLoss
from nulledit.methods.streams import endangered, own_weights
from nulledit.models.layer_edit import LayerEdit, WeightUpdate, update_of


@dataclass(frozen=True)
class UpdateState(LayerState):
    """Where the solve of a layer is, of whose W the edits are an update."""

    start: WeightUpdate
    """What the epoch began with: W₀ in the first."""
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


class UpdateSolver(EpochSolver[UpdateState]):
    """An epoch of a filter or a solve.

    With history, a run of batches is one joint solve over all columns: it equals the official
    sequential rule, and without a column it equals that rule without the fact. Columns of epochs
    before join it with what the layer gives at their keys as the epoch begins. For a `Filter`
    that solve is done batch by batch (`RecursiveState`), in a fold as in a run: the same columns
    give the same bits, and a new batch does nothing again. A `Solve` does all of it anew. Without
    history, each batch is solved in its turn on the weight that the batches before left.
    """

    def __init__(self, ledger: Ledger, epoch: Epoch, layer: int, device: torch.device):
        super().__init__(ledger, epoch, layer, device)
        self.width = self.history.original(layer).shape[1]
        self.projection = self.method.projection(self.recipe.method)
        self.keeps = self.method.keeps(self.settings)
        self.recursive = self.keeps and isinstance(self.method, Filter)
        spectrum, threshold = read_spectrum(self.history.tensors[epoch.tensors], layer, device)
        self.preconditioners = LayerPreconditioners.of(self.recipe, spectrum, threshold)
        self._shares: dict[tuple[str, int], float] = {}  # by tensors and row, as keys don't change

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
        """tr(GC) / (‖G‖ tr C), whatever the `columns`."""
        return self.preconditioners.leakage

    def protected(self, d_in: int) -> int:
        """Directions outside of where edits may move."""
        return d_in - self.confining.rank

    def room(self, state: UpdateState, columns: Sequence[Column]) -> float:
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
    ) -> UpdateState:
        """`columns` of this epoch on the `edit` that epochs before left, with columns `before`."""
        start = update_of(edit)
        state = UpdateState(edit, start, self._nothing(start))
        if self.keeps and not self.recursive and columns:
            return self._add(state, before, (), *self._recorded(columns))
        own: list[Column] = []
        for batch in by_batch(columns).values():
            state = self._add(state, before, own, *self._recorded(batch))
            own += batch
        return state

    def _nothing(self, start: WeightUpdate) -> Tensor:
        """0 as an update of `start`, which takes no memory."""
        return torch.zeros((), dtype=torch.float64, device=self.device).expand(start.base.shape)

    def _targets(self, state: UpdateState, keys: Tensor, residual: Tensor | None) -> Tensor:
        """What the layer is to give there."""
        now = state.edit.answer(keys)
        return now if residual is None else now + residual

    def _add(
        self,
        state: UpdateState,
        before: Sequence[Column],
        own: Sequence[Column],
        K: Tensor,
        V: Tensor,
        target_loss: TargetLoss | None = None,
    ) -> UpdateState:
        if self.recursive:
            return self._continued(state, before, own, K, V)
        past, (own_keys, own_targets) = self._recorded(before)[0], self._recorded(own)
        if self.keeps:
            start, weight = self._nothing(state.start), state.start.weight
            K, V = torch.cat([own_keys, K], dim=1), torch.cat([own_targets, V], dim=1)
            residual = torch.cat([V.new_zeros(len(V), past.shape[1]), V - weight @ K], dim=1)
            K, past = torch.cat([past, K], dim=1), past[:, :0]
        else:
            start, weight = state.total, state.weight
            residual, past = V - weight @ K, torch.cat([past, own_keys], dim=1)
        problem = LayerProblem(
            layer=self.layer,
            weight=weight,
            original=state.start.weight,
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
        self,
        state: UpdateState,
        before: Sequence[Column],
        own: Sequence[Column],
        K: Tensor,
        V: Tensor,
    ) -> UpdateState:
        recursion, settings = state.recursion, self.settings
        if recursion is None:
            recursion = RecursiveState(self.preconditioners.own)
            if before:
                past = self._recorded(before)[0]
                _, recursion = recursion.write(past, V.new_zeros(len(V), past.shape[1]))
        plain = self.method.linear and self.projection != "after"
        now = update_of(state.edit) if plain else state.start.with_more(state.total)
        T = own_weights(settings, K.shape[1])
        beside = endangered(settings, K, lambda: self._recorded([*before, *own])[0])
        update, recursion = recursion.write(K, V - now.times(K), own=T, beside=beside)
        return self._state(state, state.total + update, recursion)

    def _state(
        self, before: UpdateState, total: Tensor, recursion: RecursiveState | None = None
    ) -> UpdateState:
        """The state with `total` [d_out, d_in] as the epoch's ΣΔ."""
        added, start, P = total, before.start, self.preconditioners.projector
        if recursion and self.method.trim:  # Δ leads to the joint solution from where W is
            W, begun = before.weight, start.weight
            step = begun + total - W
            added = W - begun + self.method.written(step, W, self.settings, P, self.projection)
        elif recursion and self.projection == "after":  # else each Δ is projected already
            added = P.apply(added.mT).mT
        if self.method.finish:
            added = self.method.finish(added, start.weight, self.settings)
        return UpdateState(start.with_more(added), start, total, recursion)


class DescentSolver(UpdateSolver):
    """An epoch by gradient: what is recorded and folded are the updates themselves."""

    def fold(
        self, edit: LayerEdit, before: Sequence[Column], columns: Sequence[Column]
    ) -> UpdateState:
        """As `UpdateSolver.fold`; LedgerError unless each batch is in it whole, or not at all."""
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
        state: UpdateState,
        columns: Sequence[Column],
        keys: Tensor,
        residual: Tensor | None,
        target_loss: TargetLoss | None = None,
    ) -> tuple[UpdateState, dict[str, Tensor]]:
        """As `EpochSolver.write`; the targets recorded are what the update gives at the keys."""
        found, _ = super().write(state, columns, keys, residual, target_loss)
        update = (found.total - state.total).to(keys.dtype)
        after = self._moved(state, update)
        rows = self._rows(keys, after.edit.answer(keys).to(keys.dtype))
        return after, rows | {f"update.{self.layer}": update.cpu()}

    def _moved(self, state: UpdateState, update: Tensor) -> UpdateState:
        return self._state(state, state.total + self._exact(update))
