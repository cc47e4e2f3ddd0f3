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


def fold(history: History, layer: int, columns: Sequence[Column] | None = None) -> Tensor:
    """Weight W₀ + Δ [d_out, d_in] of `layer`, float64, with `columns` (the active ones by default).

    A run of batches with history and one metric is one joint solve over all columns: it equals the
    official sequential rule, and without a column it equals that rule without the fact.
    """
    epoch = history.epochs[-1]
    tensors = history.tensors[epoch.tensors]
    base = tensors[f"base.{layer}"].double()
    chosen = list(history.active if columns is None else columns)
    if not chosen:
        return base
    keys = history.column_tensor(chosen, f"keys.{layer}").double().mT
    targets = history.column_tensor(chosen, f"targets.{layer}").double().mT
    return base + solve_joint(history, layer, keys, targets)


def solve_joint(history: History, layer: int, keys: Tensor, targets: Tensor) -> Tensor:
    """Δ [d_out, d_in] for columns `keys` [d_in, n] with absolute `targets` [d_out, n]."""
    epoch = history.epochs[-1]
    tensors = history.tensors[epoch.tensors]
    recipe = Recipe.from_dict(epoch.recipe)
    base = tensors[f"base.{layer}"].double()
    problem = LayerProblem(
        layer=layer,
        weight=base,
        keys=keys,
        residual=targets - base @ keys,
        metric=metric_of(tensors, layer),
    )
    return find_method(recipe.method.name).solve(problem)


def metric_of(tensors: dict[str, Tensor], layer: int) -> Metric:
    """The metric of `layer` from an epoch's tensors."""
    return Metric(
        tensors[f"metric.vectors.{layer}"],
        tensors[f"metric.gains.{layer}"],
        float(tensors[f"metric.rest.{layer}"]),
    )


def metric_tensors(metric: Metric, layer: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `metric_of` reads, with the vectors in `dtype`."""
    return {
        f"metric.vectors.{layer}": metric.vectors.to(dtype).contiguous(),
        f"metric.gains.{layer}": metric.gains.double().contiguous(),
        f"metric.rest.{layer}": torch.tensor(metric.rest, dtype=torch.float64),
    }
