"""Units of an MLP: what they are, and what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x).square(),
}
"""Activations φ of MLPs, by name."""


@dataclass(frozen=True)
class UnitForm:
    """What a unit of an MLP is, as far as its formula goes."""

    activation: str
    """Name of φ."""
    biased: bool
    """Whether what φ is applied to has a bias."""
    gated: bool
    """Whether φ's result is multiplied by a second factor."""


@dataclass(frozen=True)
class Neurons:
    """n units of an MLP."""

    rows: Tensor
    """[n, d]: what φ is applied to."""
    biases: Tensor | None
    """[n]; None where the MLP has none there."""
    factors: Tensor | None
    """[n, d]: the second factor of a gated MLP; None in a plain one."""
    columns: Tensor
    """Of W [d_out, n]."""

    def units(self, inputs: Tensor, activation: str) -> Tensor:
        """What they give for `inputs` X [d, tokens]: [n, tokens], in the inputs' dtype."""
        driven = self.rows.to(inputs) @ inputs
        if self.biases is not None:
            driven = driven + self.biases.to(inputs)[:, None]
        found = ACTIVATIONS[activation](driven)
        return found if self.factors is None else found * (self.factors.to(inputs) @ inputs)
