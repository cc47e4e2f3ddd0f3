"""One change of a recipe at a time, in the order of what it is expected to be worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nulledit.config import Recipe
from nulledit.methods import find_method

STAGES = ("step size", "clamp", "layers", "threshold")
STEPS = (4, 100)  # fewest and most forward passes per fact
LARGEST_LEAKAGE = 0.9
SHIFT = 15  # windows move by one fifteenth of the depth


@dataclass(frozen=True)
class Move:
    """A candidate, and what is changed for it."""

    stage: str
    """One of `STAGES`."""
    label: str
    """The change in words."""
    recipe: Recipe


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """Those of `STAGES` that change what the recipe's method computes."""
    method = find_method(recipe.method.name)
    stages = [] if method.by_gradient else ["step size", "clamp"]
    stages.append("layers")
    if method.projection(recipe.method) != "none" or _filters_by_threshold(recipe):
        stages.append("threshold")
    return tuple(stages)


def moves(
    stage: str, recipe: Recipe, depth: int, windows: Sequence[tuple[int, ...]] = ()
) -> Iterator[Move]:
    """The neighbours of `recipe` in one coordinate; `windows` of layers are tried first.

    `recipe` names its layers; `depth` is the model's number of blocks.
    """
    found = {
        "step size": _step_sizes,
        "clamp": _clamps,
        "layers": lambda r: _layers(r, depth, windows),
        "threshold": _thresholds,
    }
    for label, changes in found[stage](recipe):
        changed = recipe.with_fields(changes)
        if changed != recipe:
            yield Move(stage, label, changed)


def name_of(recipe: Recipe) -> str:
    """The same for recipes that are the same."""
    return json.dumps(recipe.to_dict(), sort_keys=True)


Changes = Iterator[tuple[str, dict[str, Any]]]


def _step_sizes(recipe: Recipe) -> Changes:
    rate, steps = recipe.values.learning_rate, recipe.values.steps
    for factor, passes in ((2, 1), (2, 0.5), (0.5, 1), (0.5, 2)):
        lr, n = _rounded(rate * factor), min(max(round(steps * passes), STEPS[0]), STEPS[1])
        changes = {"values.learning_rate": lr, "values.steps": n}
        yield f"learning rate {lr:g}, {n} steps", changes


def _clamps(recipe: Recipe) -> Changes:
    for factor in (2 / 3, 4 / 3):
        value = _rounded(recipe.values.clamp * factor)
        yield f"clamp {value:g}", {"values.clamp": value}


def _layers(recipe: Recipe, depth: int, windows: Sequence[tuple[int, ...]]) -> Changes:
    layers, shift = recipe.layers, max(1, round(depth / SHIFT))
    found = [
        *windows,
        tuple(layer + shift for layer in layers),
        tuple(layer - shift for layer in layers),
        layers[1:],  # values are those of the same last layer
        (layers[0] - 1, *layers),
    ]
    for window in dict.fromkeys(found):
        # Nothing above the last block would read what is written there.
        if window and window[0] >= 0 and window[-1] < depth - 1:
            yield f"layers {said(window)}", {"layers": list(window)}


def _thresholds(recipe: Recipe) -> Changes:
    rule = recipe.null_space.rule
    for factor in (2, 0.5):
        value = _rounded(recipe.null_space.value * factor)
        if rule == "leakage":
            value = min(value, LARGEST_LEAKAGE)
        yield f"null space {rule} {value:g}", {"null_space.value": value}


def said(layers: Sequence[int]) -> str:
    """`3-5` for consecutive layers, else `3,5,8`."""
    first, last = layers[0], layers[-1]
    if len(layers) > 1 and tuple(layers) == tuple(range(first, last + 1)):
        return f"{first}-{last}"
    return ",".join(map(str, layers))


def _filters_by_threshold(recipe: Recipe) -> bool:
    """Whether the method's own filter reads the threshold."""
    method = find_method(recipe.method.name)
    constants = method.read(recipe.method)
    eigenvalues = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    low, high = (method.gains(eigenvalues, value, constants) for value in (0.2, 0.7))
    return not torch.equal(low, high)


def _rounded(value: float) -> float:
    """Three digits: what a recipe shows is what was tried."""
    return float(f"{value:.3g}")
