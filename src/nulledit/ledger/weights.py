"""The edited matrices of a model: always round(W₀ + fold of the active columns)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.errors import LedgerError
from nulledit.ledger.entries import Column, History
from nulledit.ledger.fold import fold, metric_of, solve_joint
from nulledit.linalg.angles import unit_columns
from nulledit.models.layouts import as_out_in, write_weight
from nulledit.models.partial import PartialModel


@dataclass(frozen=True)
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


class EditedWeights:
    """Keeps a model's edited matrices in step with a history."""

    def __init__(self, model: PartialModel, history: History):
        """`history` may have no epoch yet; then nothing is edited."""
        self.model, self.history = model, history
        self._exact: dict[int, Tensor] = {}
        self.refresh()

    @property
    def layers(self) -> tuple[int, ...]:
        """Edited blocks."""
        return tuple(self.history.epoch.recipe["layers"]) if self.history.epochs else ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The epoch's tensors: W₀ and the metric of each layer."""
        return self.history.tensors[self.history.epoch.tensors]

    def exact(self, layer: int) -> Tensor:
        """The weight [d_out, d_in] of `layer` before rounding, float64."""
        return self._exact[layer]

    def base(self, layer: int) -> Tensor:
        """W₀ [d_out, d_in] of `layer`, float64, on the CPU."""
        return self.tensors[f"base.{layer}"].double()

    def refresh(self, columns: Sequence[Column] | None = None) -> None:
        """Set every edited matrix to W₀ + the fold of `columns` (the active ones by default)."""
        chosen = self.history.active if columns is None else columns
        for layer in self.layers:
            self._set(layer, fold(self.history, layer, chosen, device=self._solve_device(layer)))

    def write(
        self, layer: int, columns: Sequence[Column], keys: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Edit `layer`: `columns` as recorded, and `residual` [d_out, n] at new `keys` [d_in, n].

        Returns the new keys and absolute targets as they are to be recorded: in the dtype that
        they are stored in, so that a reloaded ledger solves with the same numbers.
        """
        dtype = self.record_dtype
        keys = keys.to(dtype)
        targets = (self.exact(layer).cpu() @ keys.double() + residual).to(dtype)
        old_keys, old_targets = self.recorded(columns, layer)
        weight = solve_joint(
            self.history,
            layer,
            torch.cat([old_keys, keys], dim=1),
            torch.cat([old_targets, targets], dim=1),
            device=self._solve_device(layer),
        )
        if not torch.isfinite(weight).all():
            raise LedgerError(
                f"the update of layer {layer} is not finite and was not kept: load the model in "
                "float32 or bfloat16, or use a larger method.l2"
            )
        self._set(layer, weight)
        return keys, targets

    def recorded(self, columns: Sequence[Column], layer: int) -> tuple[Tensor, Tensor]:
        """Keys [d_in, n] and absolute targets [d_out, n] of `columns`."""
        if not columns:
            d_out, d_in = self.tensors[f"base.{layer}"].shape
            empty = torch.empty(0, dtype=self.record_dtype)
            return empty.reshape(d_in, 0), empty.reshape(d_out, 0)
        return (
            self.history.column_tensor(columns, f"keys.{layer}").mT,
            self.history.column_tensor(columns, f"targets.{layer}").mT,
        )

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
        mine, _ = self.recorded(columns, self.layers[0])
        return self.near_keys(mine, others, cosine=cosine)

    def near_keys(
        self, keys: Tensor, others: Sequence[Column], *, cosine: float
    ) -> list[tuple[Column, float]]:
        """Those of `others` whose first-layer key is within `cosine` of one of `keys` [d_in, n]."""
        if not others:
            return []
        theirs, _ = self.recorded(others, self.layers[0])
        best = (unit_columns(theirs).mT @ unit_columns(keys)).max(1).values.tolist()
        found = [(c, value) for c, value in zip(others, best, strict=True) if value > cosine]
        return sorted(found, key=lambda pair: -pair[1])

    def moved(self, before: Tensor) -> list[tuple[Column, float]]:
        """How the active columns moved in the last layer since its exact weight was `before`.

        ‖change at the key‖ over ‖what the edits had written there‖, largest first.
        """
        columns, layer = self.history.active, self.layers[-1]
        keys, _ = self.recorded(columns, layer)
        K, before = keys.double(), before.cpu()
        change = (self.exact(layer).cpu() - before) @ K
        written = (before - self.base(layer)) @ K
        shares = (change.norm(dim=0) / written.norm(dim=0).clamp_min(1e-12)).tolist()
        return sorted(zip(columns, shares, strict=True), key=lambda pair: -pair[1])

    def _set(self, layer: int, weight: Tensor) -> None:
        self._exact[layer] = weight
        write_weight(self.model.mlp_out(layer), weight)

    def _solve_device(self, layer: int) -> torch.device:
        """Where the layer's weights are, unless float64 is missing there."""
        device = as_out_in(self.model.mlp_out(layer)).device
        return torch.device("cpu") if device.type == "mps" else device

    def _report(self, layer: int) -> LayerReport:
        metric, base = metric_of(self.tensors, layer), self.base(layer)
        columns, exact = self.history.active, self.exact(layer).cpu()
        stored = as_out_in(self.model.mlp_out(layer)).double().cpu()
        keys, _ = self.recorded(columns, layer)
        shares, n = metric.free_share(keys), len(columns)
        norm = float((exact - base).norm())
        return LayerReport(
            layer=layer,
            protected=base.shape[1] - metric.rank,
            d_in=base.shape[1],
            free_share=float(shares.mean()) if n else math.nan,
            free_share_error=float(shares.std()) / n**0.5 if n > 1 else math.nan,
            n=n,
            update_share=norm / float(base.norm()),
            rounding_share=float((stored - exact).norm()) / norm if norm else 0.0,
        )
