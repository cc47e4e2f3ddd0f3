"""Entries to weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nulledit.config import Recipe
from nulledit.editing.problem import LayerProblem
from nulledit.ledger.entries import Column, History
from nulledit.linalg.spectrum import Metric
from nulledit.methods.registry import find_method


def fold(
    history: History,
    layer: int,
    columns: Sequence[Column],
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Weight W₀ + Δ [d_out, d_in] of `layer`, float64, with `columns` in the model.

    A run of batches with history and one metric is one joint solve over all columns: it equals the
    official sequential rule, and without a column it equals that rule without the fact.
    """
    if not columns:
        return history.tensors[history.epoch.tensors][f"base.{layer}"].to(device).double()
    keys = history.column_tensor(columns, f"keys.{layer}").mT
    targets = history.column_tensor(columns, f"targets.{layer}").mT
    return solve_joint(history, layer, keys, targets, device=device)


def solve_joint(
    history: History,
    layer: int,
    keys: Tensor,
    targets: Tensor,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Weight W₀ + Δ [d_out, d_in] for `keys` [d_in, n] with absolute `targets` [d_out, n]."""
    epoch = history.epoch
    tensors = history.tensors[epoch.tensors]
    recipe = Recipe.from_dict(epoch.recipe)
    base = tensors[f"base.{layer}"].to(device).double()
    # One memory layout, whatever the caller's: the same columns must give the same bits.
    K, V = (t.to(device).double().contiguous() for t in (keys, targets))
    metric = metric_of(tensors, layer, device)
    problem = LayerProblem(layer=layer, weight=base, keys=K, residual=V - base @ K, metric=metric)
    return base + find_method(recipe.method.name).solve(problem)


def metric_of(tensors: dict[str, Tensor], layer: int, device: torch.device | None = None) -> Metric:
    """The metric of `layer` from an epoch's tensors."""
    return Metric(
        tensors[f"metric.vectors.{layer}"].to(device),
        tensors[f"metric.gains.{layer}"].to(device),
        float(tensors[f"metric.rest.{layer}"]),
    )


def metric_tensors(metric: Metric, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `metric_of` reads, with the vectors in `dtype`."""
    return {
        f"metric.vectors.{layer}": metric.vectors.to(dtype).contiguous(),
        f"metric.gains.{layer}": metric.gains.double().contiguous(),
        f"metric.rest.{layer}": torch.tensor(metric.rest, dtype=torch.float64),
    }
