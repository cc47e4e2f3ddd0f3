"""Entries to weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.config import Recipe
from nulledit.editing.problem import LayerProblem, TargetLoss
from nulledit.errors import LedgerError
from nulledit.ledger.entries import Column, History
from nulledit.linalg.spectrum import Metric, Spectrum
from nulledit.methods import find_method


@dataclass(frozen=True)
class LayerState:
    """Where a fold stands."""

    total: Tensor
    """ΣΔ [d_out, d_in] of all batches, float64."""
    weight: Tensor
    """W₀ + the total, or what the method's `finish` makes of it, float64."""


@dataclass(frozen=True)
class LayerMetrics:
    """The metrics of one layer under one recipe."""

    spectrum: Spectrum
    """Of the preserved keys, with the eigenvectors that the metrics need."""
    metric: Metric
    """G of the method's gains, zero outside the null space if projected inside."""
    projector: Metric
    """P on the null space."""

    @classmethod
    def of(cls, recipe: Recipe, spectrum: Spectrum, threshold: float) -> LayerMetrics:
        """LookupError where a compact spectrum lacks eigenvectors that G or P needs."""
        method = find_method(recipe.method.name)
        free = (spectrum.eigenvalues < threshold).to(spectrum.eigenvalues)
        gains = method.gains(spectrum.eigenvalues, threshold, method.read(recipe.method))
        if method.projection(recipe.method) == "inside":
            gains = gains * free
        kept = spectrum.whole() if method.reads_moment else spectrum.reduced(gains, free)
        return cls(kept, spectrum.metric(gains), spectrum.metric(free))


class LayerFold:
    """Makes columns into the weight of one layer.

    With history, a run of batches is one joint solve over all columns: it equals the official
    sequential rule, and without a column it equals that rule without the fact. Without history,
    each batch is solved in its turn on the weight that the batches before left.
    """

    def __init__(self, history: History, layer: int, device: torch.device):
        """Of the history's epoch; solves run on `device`."""
        epoch = history.epoch
        tensors = history.tensors[epoch.tensors]
        self.history, self.layer, self.device = history, layer, device
        self.recipe = Recipe.from_dict(epoch.recipe)
        self.method = find_method(self.recipe.method.name)
        self.settings = self.method.read(self.recipe.method)
        self.base = tensors[f"base.{layer}"].to(device).double()  # W₀
        spectrum, threshold = read_spectrum(tensors, layer, device)
        self.metrics = LayerMetrics.of(self.recipe, spectrum, threshold)

    def fold(self, columns: Sequence[Column]) -> LayerState:
        """The state with exactly `columns` in the model."""
        state = self._state(torch.zeros_like(self.base))
        if not columns:
            return state
        if self.method.history:
            return self.add(state, (), *self.recorded(columns))
        batches: dict[int, list[Column]] = {}
        for column in columns:
            batches.setdefault(column.batch, []).append(column)
        before: list[Column] = []
        for number, batch in sorted(batches.items()):
            if self.method.by_gradient:
                state = self.moved(state, self._stored(number, batch))
            else:
                state = self.add(state, before, *self.recorded(batch))
            before += batch
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
        `targets` [d_out, n].
        """
        # One memory layout, whatever the caller's: the same columns must give the same bits.
        old_keys, old_targets = self.recorded(columns) if columns else (keys[:, :0], targets[:, :0])
        K, V = self._exact(keys), self._exact(targets)
        start = state.total
        if self.method.history:
            K = torch.cat([self._exact(old_keys), K], dim=1)
            V = torch.cat([self._exact(old_targets), V], dim=1)
            start, old_keys = torch.zeros_like(self.base), old_keys[:, :0]
        weight = self.base if self.method.history else state.weight
        problem = LayerProblem(
            layer=self.layer,
            weight=weight,
            original=self.base,
            keys=K,
            residual=V - weight @ K,
            past_keys=self._exact(old_keys),
            spectrum=self.metrics.spectrum,
            metric=self.metrics.metric,
            projector=self.metrics.projector,
            projection=self.method.projection(self.recipe.method),
            settings=self.settings,
            target_loss=target_loss,
        )
        return self._state(start + self.method.update(problem))

    def moved(self, state: LayerState, update: Tensor) -> LayerState:
        """`state` with `update` [d_out, d_in], as stored, added."""
        return self._state(state.total + self._exact(update))

    def recorded(self, columns: Sequence[Column]) -> tuple[Tensor, Tensor]:
        """Keys [d_in, n] and absolute targets [d_out, n] of `columns`, as stored."""
        return (
            self.history.column_tensor(columns, f"keys.{self.layer}").mT,
            self.history.column_tensor(columns, f"targets.{self.layer}").mT,
        )

    def _state(self, total: Tensor) -> LayerState:
        finish = self.method.finish
        shown = finish(total, self.base, self.settings) if finish else total
        return LayerState(total, self.base + shown)

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


def spectrum_tensors(
    spectrum: Spectrum, threshold: float, layer: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What `read_spectrum` reads, with the eigenvectors in `dtype`."""
    return {
        f"eigenvalues.{layer}": spectrum.eigenvalues.double().contiguous(),
        f"eigenvectors.{layer}": spectrum.eigenvectors.to(dtype).contiguous(),
        f"first_eigenvector.{layer}": torch.tensor(spectrum.start),
        f"threshold.{layer}": torch.tensor(threshold, dtype=torch.float64),
    }


def read_spectrum(
    tensors: dict[str, Tensor], layer: int, device: torch.device | None = None
) -> tuple[Spectrum, float]:
    """The spectrum of `layer` in an epoch's tensors, float64, and its τ."""
    spectrum = Spectrum(
        tensors[f"eigenvalues.{layer}"].to(device),
        tensors[f"eigenvectors.{layer}"].to(device).double(),
        int(tensors[f"first_eigenvector.{layer}"]),
    )
    return spectrum, float(tensors[f"threshold.{layer}"])
