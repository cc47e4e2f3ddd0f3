"""The edited matrices of a model: always round(W₀ + fold of the active columns)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.errors import LedgerError
from nulledit.io.text import count
from nulledit.ledger.records import Column, History, Ledger
from nulledit.ledger.solver import LayerSolver, LayerState, recorded
from nulledit.linalg.angles import unit_columns
from nulledit.linalg.blocks import AnyMetric
from nulledit.linalg.solve import room_left
from nulledit.methods.problem import TargetLoss
from nulledit.models.accepted import refuse_adapters
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import as_out_in, holds_weight, write_weight
from nulledit.models.unchanged import bit_sums


@dataclass(frozen=True, repr=False)
class LayerReport:
    """What the edits do to one layer."""

    layer: int
    """Block number."""
    protected: int
    """Directions that edits may not use, of d_in."""
    d_in: int
    """Width of the keys."""
    free_share: float
    """Mean ‖Pk‖²/‖k‖² of the edit keys: the share that edits may use; nan without edits."""
    free_share_error: float
    """Its standard error over the edited facts; nan for fewer than two."""
    n: int
    """Edited facts."""
    update_share: float
    """‖Δ‖/‖W₀‖ of all edits so far."""
    rounding_share: float
    """‖rounding‖/‖Δ‖: what storing in the model's dtype costs."""
    room: float
    """1 − tr(KᵀGK (I + KᵀGK)⁻¹) / rank G: the share of the usable directions that no edit has
    taken yet; 1 without edits, nan where no direction is usable."""

    def __repr__(self) -> str:
        moved = f"‖Δ‖/‖W₀‖ {self.update_share:.3g}, room left {self.room:.3g}"
        return f"<LayerReport of layer {self.layer}, {count(self.n, 'fact')}: {moved}>"


class EditedWeights:
    """Keeps a model's edited matrices in step with a history."""

    def __init__(self, model: EditableModel, ledger: Ledger):
        """`ledger` may have no epoch yet; then nothing is edited."""
        self.model, self.ledger = model, ledger
        self._folds: dict[int, LayerSolver] = {}
        self._states: dict[int, LayerState] = {}
        self._sums = bit_sums(model.model)
        self.refresh()

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.ledger.history

    @property
    def first(self) -> int:
        """The first block that the current epoch edits."""
        return self.history.epoch.recipe.layers[0]

    @property
    def layers(self) -> tuple[int, ...]:
        """Edited blocks."""
        return self.history.layers

    def exact(self, layer: int) -> Tensor:
        """The weight [d_out, d_in] of `layer` before rounding, float64."""
        return self._states[layer].weight

    def base(self, layer: int) -> Tensor:
        """W₀ [d_out, d_in] of `layer`, float64, on the CPU."""
        return self._fold(layer).base.cpu()

    def projector(self, layer: int) -> AnyMetric:
        """P of `layer`, on the null space of its preserved keys."""
        return self._fold(layer).stage.metrics.projector

    def leakage(self, layer: int) -> float:
        """Share of the preserved keys' energy that edits of `layer` may disturb, 0 to 1."""
        return self._fold(layer).stage.metrics.leakage

    def refresh(self, columns: Sequence[Column] | None = None) -> None:
        """Set every edited matrix to W₀ + the fold of `columns` (the active ones by default)."""
        chosen = self.history.active if columns is None else columns
        for layer in self.layers:
            self._set(layer, self._fold(layer).fold(chosen))
        self._forget(set(self._states) - set(self.layers))

    def _forget(self, layers: set[int]) -> None:
        """Put W₀ back into layers that no epoch edits any more."""
        for layer in layers:
            write_weight(self.model.mlp_out(layer), self._folds.pop(layer).base)
            del self._states[layer]

    def check_unchanged(self) -> None:
        """LedgerError if something else wrote to the model: an edit would undo or misjudge that."""
        model, edited = self.model.model, set()
        refuse_adapters(model)
        for layer, state in self._states.items():
            name = self.model.parameter_name(layer)
            edited.add(name)
            if not holds_weight(self.model.mlp_out(layer), state.weight):
                raise LedgerError(
                    f"{name}: was changed by something else since it was last written, and would "
                    "be overwritten; to keep the change, make a new Editor of the model as it is "
                    "(what was edited becomes part of its base); to drop it, call "
                    "editor.weights.refresh()"
                )
        sums = bit_sums(model)
        others = (self._sums.keys() | sums.keys()) - edited
        changed = sorted(n for n in others if sums.get(n) != self._sums.get(n))
        if changed:
            raise LedgerError(
                f"{len(changed)} of the parameters that no edit writes were changed by something "
                f"else since the editor took the model ({changed[0]} for one), so it is no longer "
                "the base of its ledger: make a new Editor of the model as it is (what was edited "
                "becomes part of its base), or load it again"
            )

    @contextmanager
    def holding(self, columns: Sequence[Column]) -> Iterator[None]:
        """Only `columns` in the weights inside; afterwards the very states of before."""
        self.check_unchanged()
        states = self.states()
        try:
            self.refresh(columns)
            yield
        finally:
            self.return_to(states)

    def states(self) -> dict[int, LayerState]:
        """Where each layer stands, for `return_to`."""
        return dict(self._states)

    def return_to(self, states: dict[int, LayerState]) -> None:
        """Set every edited matrix as it was when `states` were taken; others to W₀."""
        for layer, state in states.items():
            self._set(layer, state)
        self._forget(set(self._states) - set(states))

    def write(
        self,
        layer: int,
        columns: Sequence[Column],
        keys: Tensor,
        residual: Tensor | None,
        *,
        target_loss: TargetLoss | None = None,
    ) -> dict[str, Tensor]:
        """Edit `layer`, which holds `columns`: `residual` [d_out, n] at new `keys` [d_in, n].

        Without a residual the method finds the update by `target_loss`. Returns what is to be
        recorded, one row per key, in the dtype that it is stored in, so that a reloaded ledger
        solves with the same numbers.
        """
        dtype, fold, before = self.record_dtype, self._fold(layer), self._states[layer]
        keys = keys.to(dtype)
        now = before.weight.cpu() @ keys.double()
        targets = (now if residual is None else now + residual).to(dtype)
        state = fold.add(before, columns, keys, targets, target_loss=target_loss)
        if not torch.isfinite(state.weight).all():
            raise LedgerError(
                f"the update of layer {layer} is not finite and was not kept: load the model in "
                "float32 or bfloat16, or protect more (a larger method.l2 or method.moment_weight)"
            )
        recorded = {f"keys.{layer}": keys.mT.contiguous()}
        stage = fold.stage
        if stage.method.by_gradient:
            update = (state.total - before.total).to(dtype)
            state = stage.moved(before, update)
            recorded[f"update.{layer}"] = update.cpu()
            targets = (state.weight.cpu() @ keys.double()).to(dtype)
        self._set(layer, state)
        return {**recorded, f"targets.{layer}": targets.mT.contiguous()}

    def recorded(self, columns: Sequence[Column], layer: int) -> tuple[Tensor, Tensor]:
        """Keys [d_in, n] and absolute targets [d_out, n] of those of `columns` that have them."""
        mine = self.history.at_layer(layer, columns)
        if not mine:
            d_out, d_in = self._fold(layer).base.shape
            empty = torch.empty(0, dtype=self.record_dtype)
            return empty.reshape(d_in, 0), empty.reshape(d_out, 0)
        return recorded(self.history, mine, layer)

    def _fold(self, layer: int) -> LayerSolver:
        if layer not in self._folds:
            self._folds[layer] = LayerSolver(self.ledger, layer, self._solve_device(layer))
        return self._folds[layer]

    @property
    def record_dtype(self) -> torch.dtype:
        """What keys and targets are kept in: float32, or float64 for a float64 model."""
        return torch.float64 if self.model.model.dtype == torch.float64 else torch.float32

    def reports(self) -> tuple[LayerReport, ...]:
        """The state of each layer."""
        return tuple(self._report(layer) for layer in self.layers)

    def near(
        self, columns: Sequence[Column], others: Sequence[Column], *, cosine: float
    ) -> list[tuple[Column, float]]:
        """Those of `others` whose first-layer key is within `cosine` of one of `columns`'."""
        if not columns or not others:
            return []
        mine, _ = self.recorded(columns, self.first)
        return self.near_keys(mine, others, cosine=cosine)

    def near_keys(
        self, keys: Tensor, others: Sequence[Column], *, cosine: float
    ) -> list[tuple[Column, float]]:
        """Those of `others` whose first-layer key is within `cosine` of one of `keys` [d_in, n].

        A column of an epoch that does not edit the current first layer has no key to compare.
        """
        others = self.history.at_layer(self.first, others)
        if not others or not keys.shape[1]:
            return []
        theirs, _ = self.recorded(others, self.first)
        best = (unit_columns(theirs).mT @ unit_columns(keys)).max(1).values.tolist()
        found = [(c, value) for c, value in zip(others, best, strict=True) if value > cosine]
        return sorted(found, key=lambda pair: -pair[1])

    def moved(self, before: Tensor) -> list[tuple[Column, float]]:
        """How the active columns moved in the last layer since its exact weight was `before`.

        ‖change at the key‖ over ‖what the edits had written there‖, largest first.
        """
        layer = self.layers[-1]
        columns = self.history.at_layer(layer, self.history.active)
        keys, _ = self.recorded(columns, layer)
        K, before = keys.double(), before.cpu()
        change = (self.exact(layer).cpu() - before) @ K
        written = (before - self.base(layer)) @ K
        shares = (change.norm(dim=0) / written.norm(dim=0).clamp_min(1e-12)).tolist()
        return sorted(zip(columns, shares, strict=True), key=lambda pair: -pair[1])

    def _set(self, layer: int, state: LayerState) -> None:
        self._states[layer] = state
        write_weight(self.model.mlp_out(layer), state.weight)

    def _solve_device(self, layer: int) -> torch.device:
        """Where the layer's weights are, unless float64 is missing there."""
        device = as_out_in(self.model.mlp_out(layer)).device
        return torch.device("cpu") if device.type == "mps" else device

    def _report(self, layer: int) -> LayerReport:
        stage, base = self._fold(layer).stage, self.base(layer)
        columns, exact = self.history.at_layer(layer, self.history.active), self.exact(layer).cpu()
        stored = as_out_in(self.model.mlp_out(layer)).double().cpu()
        shares = stage.free_shares(columns)
        n = len({c.fact for c in columns})
        norm = float((exact - base).norm())
        return LayerReport(
            layer=layer,
            protected=base.shape[1] - stage.confining.rank,
            d_in=base.shape[1],
            free_share=float(shares.mean()) if n else math.nan,
            free_share_error=float(shares.std()) / n**0.5 if n > 1 else math.nan,
            n=n,
            update_share=norm / float(base.norm()),
            rounding_share=float((stored - exact).norm()) / norm if norm else 0.0,
            room=self._room(layer, columns),
        )

    def _room(self, layer: int, columns: Sequence[Column]) -> float:
        if not columns:
            return 1.0
        metric, remaining = self._fold(layer).stage.metrics.metric, self._states[layer].remaining
        if remaining is not None:
            return 1 - remaining.taken / metric.rank if metric.rank else math.nan
        return room_left(metric, self.recorded(columns, layer)[0].to(metric.device))
