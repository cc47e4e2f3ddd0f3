"""Units of an MLP: what they are, and what they give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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

    def at_own(self, inputs: Tensor, activation: str) -> Tensor:
        """What each gives for its own of `inputs` X [d, n]: [n], the diagonal of `units`."""
        driven = (self.rows.to(inputs) * inputs.mT).sum(1)
        if self.biases is not None:
            driven = driven + self.biases.to(inputs)
        found = ACTIVATIONS[activation](driven)
        if self.factors is None:
            return found
        return found * (self.factors.to(inputs) * inputs.mT).sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by field."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}

    def map(self, change: Callable[[Tensor], Tensor]) -> Neurons:
        """The same with each tensor changed."""
        return replace(self, **{name: change(t) for name, t in self.tensors().items()})

    def first(self, n: int) -> Neurons:
        """The first `n` of them."""
        return Neurons(
            self.rows[:n],
            None if self.biases is None else self.biases[:n],
            None if self.factors is None else self.factors[:n],
            self.columns[:, :n],
        )

    def with_others(self, other: Neurons) -> Neurons:
        """These and, after them, `other` units of the same MLP."""

        def joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
            return None if a is None or b is None else torch.cat([a, b])

        return Neurons(
            torch.cat([self.rows, other.rows]),
            joined(self.biases, other.biases),
            joined(self.factors, other.factors),
            torch.cat([self.columns, other.columns], dim=1),
        )
