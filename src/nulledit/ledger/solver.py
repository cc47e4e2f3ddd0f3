"""Entries to weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.config import Recipe
from nulledit.errors import LedgerError
from nulledit.ledger.records import Column, Epoch, History, Ledger
from nulledit.linalg.blocks import (
    AnyMetric,
    AnySpectrum,
    BlockSpectrum,
    part_names,
    parts_of,
)
from nulledit.linalg.solve import RecursiveState
from nulledit.linalg.spectrum import Spectrum
from nulledit.methods import find_method
from nulledit.methods.problem import LayerProblem, TargetLoss


@dataclass(frozen=True)
class LayerState:
    """Where a fold stands."""

    start: Tensor
    """Weight [d_out, d_in] that the epoch began with, float64: W₀ in the first."""
    total: Tensor
    """ΣΔ [d_out, d_in] of the epoch's batches, float64."""
    weight: Tensor
    """The start + the total, or what the method's `finish` makes of it, float64."""
    remaining: RecursiveState | None = None
    """What the epoch's columns leave of the metric, where the method goes on from it."""


@dataclass(frozen=True)
class LayerMetrics:
    """The metrics of one layer under one recipe."""

    spectrum: AnySpectrum
    """Of the preserved keys, with the eigenvectors that the metrics need."""
    metric: AnyMetric
    """G of the method's gains, zero outside the null space if projected inside."""
    projector: AnyMetric
    """P on the null space."""
    leakage: float
    """tr(GC) / (‖G‖ tr C), of what is written: the share of the preserved keys' energy that edits
    may disturb, weighed by how freely. tr(PC)/tr(C) for a projection."""

    @classmethod
    def of(cls, recipe: Recipe, spectrum: AnySpectrum, threshold: float) -> LayerMetrics:
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
        kept = spectrum.whole() if method.reads_moment else spectrum.reduced(gains, free)
        return cls(kept, spectrum.metric(gains), spectrum.metric(free), leakage)


class LayerSolver:
    """Makes columns into the weight of one layer, epoch after epoch."""

    def __init__(self, ledger: Ledger, layer: int, device: torch.device):
        """Of `ledger`, whose history may go on; solves run on `device`."""
        self.ledger, self.layer, self.device = ledger, layer, device
        self.base = self.history.original(layer).to(device).double()  # W₀
        self._stages: dict[int, EpochSolver] = {}

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.ledger.history

    @property
    def stage(self) -> EpochSolver:
        """The latest epoch that edits the layer."""
        return self._stage(self._epochs()[-1])

    def fold(self, columns: Sequence[Column]) -> LayerState:
        """The state with exactly `columns` in the model, at its latest epoch."""
        state = LayerState(self.base, torch.zeros_like(self.base), self.base)
        before: list[Column] = []
        for epoch in self._epochs():
            state = LayerState(state.weight, torch.zeros_like(self.base), state.weight)
            mine = [c for c in columns if self.history.epoch_of(c) == epoch.id]
            state = self._stage(epoch).fold(state, before, mine)
            before += mine
        return state

    def add(
        self,
        state: LayerState,
        columns: Sequence[Column],
        keys: Tensor,
        targets: Tensor,
        *,
        target_loss: TargetLoss | None = None,
    ) -> LayerState:
        """Go on from `state`, which holds `columns`, to new `keys` [d_in, n] with absolute
        `targets` [d_out, n], in the latest epoch.
        """
        stage = self.stage
        held = self.history.at_layer(self.layer, columns)
        own = [c for c in held if self.history.epoch_of(c) == stage.epoch.id]
        before = [c for c in held if self.history.epoch_of(c) != stage.epoch.id]
        return stage.add(state, before, own, keys, targets, target_loss=target_loss)

    def _epochs(self) -> list[Epoch]:
        return [e for e in self.history.epochs if self.layer in e.recipe.layers]

    def _stage(self, epoch: Epoch) -> EpochSolver:
        if epoch.id not in self._stages or self._stages[epoch.id].epoch != epoch:
            self._stages[epoch.id] = EpochSolver(self.ledger, epoch, self.layer, self.device)
        return self._stages[epoch.id]


class EpochSolver:
    """One epoch of one layer: its method on its batches.

    With history, a run of batches is one joint solve over all columns: it equals the official
    sequential rule, and without a column it equals that rule without the fact. Columns of epochs
    before join it with what the layer gives at their keys as the epoch begins. For the filter
    family that solve is done batch by batch (`RecursiveState`), in a fold as in a run: the same
    columns give the same bits, and a new batch does nothing again. Without history, each batch is
    solved in its turn on the weight that the batches before left.
    """

    def __init__(self, ledger: Ledger, epoch: Epoch, layer: int, device: torch.device):
        """`epoch` of `ledger` at `layer`; solves run on `device`."""
        self.ledger, self.epoch, self.layer, self.device = ledger, epoch, layer, device
        self.recipe = epoch.recipe
        self.method = find_method(self.recipe.method.name)
        self.settings = self.method.read(self.recipe.method)
        self.keeps = self.method.keeps(self.settings)
        spectrum, threshold = read_spectrum(self.history.tensors[epoch.tensors], layer, device)
        self.metrics = LayerMetrics.of(self.recipe, spectrum, threshold)

        self._shares: dict[tuple[str, int], float] = {}  # by tensors and row, as keys don't change

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.ledger.history

    @property
    def confining(self) -> AnyMetric:
        """What says where edits may move: P where there is one, else G."""
        projected = self.method.projection(self.recipe.method) != "none"
        return self.metrics.projector if projected else self.metrics.metric

    def free_shares(self, columns: Sequence[Column]) -> Tensor:
        """‖Pk‖²/‖k‖² [n] of the keys of `columns`, each computed once."""
        names = [(self.history.batches[c.batch - 1].tensors, c.row) for c in columns]
        new = [i for i, name in enumerate(names) if name not in self._shares]
        if new:
            keys = recorded(self.history, [columns[i] for i in new], self.layer)[0]
            shares = self.confining.free_share(keys.to(self.device)).tolist()
            self._shares.update(zip((names[i] for i in new), shares, strict=True))
        return torch.tensor([self._shares[name] for name in names], dtype=torch.float64)

    @property
    def recursive(self) -> bool:
        """Whether the joint solve can go on from batch to batch."""
        return (
            self.method.joint
            and self.keeps
            and self.method.projection(self.recipe.method) != "after"
        )

    def fold(
        self, state: LayerState, before: Sequence[Column], columns: Sequence[Column]
    ) -> LayerState:
        """`columns` of this epoch on a `state` at its beginning, which holds `before`."""
        if not columns:
            return state
        if self.keeps and not self.recursive:
            return self.add(state, before, (), *recorded(self.history, columns, self.layer))
        batches: dict[int, list[Column]] = {}
        for column in columns:
            batches.setdefault(column.batch, []).append(column)
        own: list[Column] = []
        for number, batch in sorted(batches.items()):
            if self.method.by_gradient:
                state = self.moved(state, self._stored(number, batch))
            else:
                pair = recorded(self.history, batch, self.layer)
                state = self.add(state, before, own, *pair)
            own += batch
        return state

    def add(
        self,
        state: LayerState,
        before: Sequence[Column],
        own: Sequence[Column],
        keys: Tensor,
        targets: Tensor,
        *,
        target_loss: TargetLoss | None = None,
    ) -> LayerState:
        """Go on from `state`, which holds the columns `before` this epoch and its `own`."""
        # One memory layout, whatever the caller's: the same columns must give the same bits.
        K, V = self._exact(keys), self._exact(targets)
        if self.recursive:
            return self._continued(state, before, K, V)
        past = self._past(K, before)
        own_keys, own_targets = self._past(K, own), self._targets(V, own)
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
            spectrum=self.metrics.spectrum,
            metric=self.metrics.metric,
            projector=self.metrics.projector,
            projection=self.method.projection(self.recipe.method),
            settings=self.settings,
            target_loss=target_loss,
        )
        return self._state(state.start, start + self.method.update(problem))

    def _continued(
        self, state: LayerState, before: Sequence[Column], K: Tensor, V: Tensor
    ) -> LayerState:
        remaining = state.remaining
        if remaining is None:
            remaining = RecursiveState(self.metrics.metric)
            if before:
                past = self._past(K, before)
                _, remaining = remaining.write(past, V[:, :0].new_zeros(len(V), past.shape[1]))
        update, remaining = remaining.write(K, V - state.weight @ K)
        total = state.total + update
        return LayerState(state.start, total, state.start + total, remaining)

    def moved(self, state: LayerState, update: Tensor) -> LayerState:
        """`state` with `update` [d_out, d_in], as stored, added."""
        return self._state(state.start, state.total + self._exact(update))

    def _state(self, start: Tensor, total: Tensor) -> LayerState:
        finish = self.method.finish
        return LayerState(
            start, total, start + (finish(total, start, self.settings) if finish else total)
        )

    def _past(self, like: Tensor, columns: Sequence[Column]) -> Tensor:
        """Recorded keys of `columns` [d_in, n]."""
        keys = recorded(self.history, columns, self.layer)[0] if columns else like[:, :0]
        return self._exact(keys)

    def _targets(self, like: Tensor, columns: Sequence[Column]) -> Tensor:
        """Recorded targets of `columns` [d_out, n]."""
        targets = recorded(self.history, columns, self.layer)[1] if columns else like[:, :0]
        return self._exact(targets)

    def _stored(self, number: int, columns: Sequence[Column]) -> Tensor:
        batch = self.history.batches[number - 1]
        tensors = self.history.tensors[batch.tensors]
        if len(columns) != len(tensors[f"keys.{self.layer}"]):
            raise LedgerError(
                f"batch {number} was written as one update by {self.method.name} and can't be in "
                f"the model with {len(columns)} of its facts"
            )
        return tensors[f"update.{self.layer}"]

    def _exact(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device).double().contiguous()


def recorded(history: History, columns: Sequence[Column], layer: int) -> tuple[Tensor, Tensor]:
    """Keys [d_in, n] and absolute targets [d_out, n] of `columns` at `layer`, as stored."""
    return (
        history.column_tensor(columns, f"keys.{layer}").mT,
        history.column_tensor(columns, f"targets.{layer}").mT,
    )


def spectrum_tensors(
    spectrum: AnySpectrum, threshold: float, layer: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What `read_spectrum` reads, with the eigenvectors in `dtype`."""
    found = {f"threshold.{layer}": torch.tensor(threshold, dtype=torch.float64)}
    if isinstance(spectrum, BlockSpectrum):
        found[f"tokens.{layer}"] = torch.tensor(spectrum.tokens)
    for name, part in parts_of(spectrum, f"{layer}").items():
        found |= {
            f"eigenvalues.{name}": part.eigenvalues.double().contiguous(),
            f"eigenvectors.{name}": part.eigenvectors.to(dtype).contiguous(),
            f"first_eigenvector.{name}": torch.tensor(part.start),
        }
        if dtype != torch.float64:
            found[f"rounded.{name}"] = torch.tensor(True)
    return found


def read_spectrum(
    tensors: Mapping[str, Tensor], layer: int, device: torch.device | None = None
) -> tuple[AnySpectrum, float]:
    """The spectrum of `layer` in an epoch's tensors, float64, and its τ.

    Eigenvectors that were rounded are made orthonormal again: a part of 1e-7 of a gain of 1e8 would
    be no positive metric. Epochs from before that was done lack the mark of it, and so keep the
    weights that they were recorded with, bit for bit.
    """

    def part(name: str) -> Spectrum:
        kept = Spectrum(
            tensors[f"eigenvalues.{name}"].to(device),
            tensors[f"eigenvectors.{name}"].to(device).double(),
            int(tensors[f"first_eigenvector.{name}"]),
        )
        return kept.orthonormal() if f"rounded.{name}" in tensors else kept

    threshold, tokens = float(tensors[f"threshold.{layer}"]), tensors.get(f"tokens.{layer}")
    if tokens is None:
        return part(f"{layer}"), threshold
    parts = part_names(f"{layer}", len(tokens), tensors)
    blocks = {i: part(name) for i, name in parts.items()}
    width = next(iter(blocks.values())).d_in if blocks else 0
    return BlockSpectrum(blocks, tuple(tokens.int().tolist()), width), threshold
