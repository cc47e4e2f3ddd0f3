"""Gated edits: a neuron of its own for a fact, open on its subject, closed on everything else.

A linear memory answers every key in proportion to its likeness; a neuron has a threshold. For the
MLP's input xᵢ [d] at a fact's subject, with C = E[x xᵀ] and μ = E[x] over text, the direction

    gᵢ = C⁻¹xᵢ / (xᵢᵀC⁻¹xᵢ)

has gᵢᵀxᵢ = 1, and text drives it less than any other such direction: E[(gᵢᵀx)²] = 1/(xᵢᵀC⁻¹xᵢ).
With s = gᵢᵀx and the MLP's own activation φ the unit gives

    a(x) = φ(β(s − θ)) s / φ(β(1 − θ))    in a gated MLP,
    a(x) = φ(β(s − θ))                    in a plain one,

and next to nothing where s stays below θ. Where the MLP has no bias to hold the threshold,
c = C⁻¹μ/(μᵀC⁻¹μ) stands for a constant 1: normed states carry constant directions, so cᵀx ≈ 1 on
text. Columns r of all facts together write what each lacks: the n × n solve of `solve_columns`.

Relatives: T-Patcher (arXiv:2301.09785) trains such neurons in the last block by gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from nulledit.io.settings import Expected, NotNegative, Positive, checked
from nulledit.linalg.neurons import ACTIVATIONS, Neurons, UnitForm
from nulledit.linalg.solve import gram
from nulledit.linalg.spectrum import Spectrum
from nulledit.methods.registry import Gate

Below1 = Annotated[float, Expected("a share from 0, below 1", ge=0, lt=1)]

CONSTANT = 0.99
"""μᵀC⁻¹μ below which text has no constant direction that could hold a threshold."""
SMALLEST = 1e-6
"""Of the median eigenvalue of C, below which none is taken."""
NOTHING = 1e-4
"""Share of a direction that a constant 1 may have, if the direction is one that a layer norm leaves
out of all states: they have nothing but rounding there, which is no mark of a fact."""

ALIKE = 1e-7
"""Of the largest singular value of what gates give on facts: smaller ones are rounding, since their
squares are solved in float64."""

SHUT = 0.1
"""Share of the median gate's opening that the least of gates is taken to have."""


@checked
@dataclass(frozen=True)
class GateSettings:
    """How neurons are made."""

    sharpness: Positive = 20.0
    """β: how steeply a gate opens."""
    threshold: Below1 = 0.5
    """θ, from 0 to below 1: the share of its own subject's drive at which a gate opens."""
    ridge: NotNegative = 0.05
    """λ: keeps the columns small of neurons that open on each other's subjects."""
    widening: NotNegative = 0.1
    """Weight in C of the facts' own second moment, which tells like subjects apart."""


@dataclass(frozen=True)
class TextInputs:
    """What the inputs x [d] of one MLP are over text, position 0 left out; float64."""

    moment: Tensor
    """C = E[x xᵀ] [d, d]."""
    mean: Tensor
    """μ = E[x] [d]."""

    @classmethod
    def of(cls, spectrum: Spectrum) -> TextInputs:
        """From the spectrum of inputs with a 1 at their end."""
        block = spectrum.whole()
        usual, vectors = block.eigenvalues.median(), block.eigenvectors.double()
        left_out = (block.eigenvalues < SMALLEST * usual) & (vectors[-1].abs() < NOTHING)
        values = block.eigenvalues.clamp_min(SMALLEST * float(usual)).where(~left_out, usual)
        joined = (vectors * values) @ vectors.mT
        return cls(joined[:-1, :-1] / joined[-1, -1], joined[:-1, -1] / joined[-1, -1])

    @cached_property
    def constant(self) -> Tensor | None:
        """c [d] with cᵀx ≈ 1 on text; None where text has no constant direction."""
        inverse = torch.linalg.solve(self.moment, self.mean)
        size = float(self.mean @ inverse)
        return inverse / size if size >= CONSTANT else None

    def energies(self, inputs: Tensor) -> Tensor:
        """xᵀC⁻¹x [n] of `inputs` X [d, n]."""
        return (inputs * torch.linalg.solve(self.moment, inputs)).sum(0)


def gated_neurons(
    inputs: Tensor, targets: Tensor, text: TextInputs, form: UnitForm, settings: GateSettings
) -> tuple[Neurons, Tensor]:
    """Neurons that write `targets` T [d_out, n] at the facts' `inputs` X [d, n], and what they
    write there; float64.
    """
    X, n = inputs.double(), inputs.shape[1]
    beta, theta = settings.sharpness, settings.threshold
    directions = gate_directions(text.moment, X, settings)
    shift = torch.zeros_like(text.mean)
    if not form.biased and text.constant is None:
        theta = 0.0  # no threshold: the gate closes by its steepness alone
    elif not form.biased and text.constant is not None:
        shift = theta * text.constant
    activation = ACTIVATIONS[form.activation]
    opening = float(activation(torch.tensor(beta * (1 - theta), dtype=torch.float64)))
    neurons = Neurons(
        rows=beta * (directions - shift[:, None]).mT,
        biases=X.new_full((n,), -beta * theta) if form.biased else None,
        factors=directions.mT / opening if form.gated else None,
        columns=X.new_zeros(len(targets), n),
    )
    drives = directions.mT @ X  # of neuron i on fact j, once for both of a gated unit's factors
    driven = beta * (drives - shift @ X)
    if form.biased:
        driven -= beta * theta
    activations = activation(driven).div_(opening)
    if form.gated:
        activations *= drives
    columns, written = solve_columns(activations, targets.double(), settings.ridge)
    return replace(neurons, columns=columns if form.gated else columns / opening), written


def gate_directions(moment: Tensor, inputs: Tensor, settings: GateSettings) -> Tensor:
    """gᵢ [d, n] of facts' `inputs` X [d, n], C = `moment` [d, d] of text widened by theirs."""
    widened = moment + settings.widening * inputs @ inputs.mT / inputs.shape[1]
    solved = torch.linalg.solve(widened, inputs)
    return solved / (inputs * solved).sum(0)


def solve_columns(activations: Tensor, targets: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Columns r [d_out, n] of neurons that together write `targets` T [d_out, n], and what they do.

    argmin ‖rA − T‖² + λ‖r‖² for `activations` A [n, n], A[i, j] what neuron i gives on fact j:
    r = Y Aᵀ with Y = T (AᵀA + λI)⁻¹, so that what they write, rA = T − λY, needs no product. Where
    that can't be solved, as without a ridge for facts that open the same gates alike, r is the
    shortest of those that write best, T A⁺.
    """
    system = gram(activations)
    system.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal()
    if failed or pivots.min() <= ALIKE * pivots.max():
        columns = targets @ torch.linalg.pinv(activations, rtol=ALIKE)
        return columns, columns @ activations
    weights = torch.cholesky_solve(targets.mT, factor).mT
    return weights @ activations.mT, targets - ridge * weights


def full_openings(own: Tensor) -> Tensor:
    """What gates that give `own` [n] on their own facts count as giving there.

    A gate that stays shut there counts as one that gives `SHUT` of the median: a share of nothing
    would be no measure.
    """
    return own.clamp_min(SHUT * float(own.median()))


def rivals(activations: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest rival of each of n facts: which [n], and the share [n], -inf without another.

    The share is of what a gate gives on its own fact, A[j, j] of `activations` A [n, n]: of i and
    j max(A[i, j]/A[j, j], A[j, i]/A[i, i]). Facts of one owner (`owners` [n], numbers) are no
    rivals.
    """
    shares = activations / full_openings(activations.diagonal())
    shares = torch.maximum(shares, shares.mT)
    shares.masked_fill_(owners[:, None] == owners, -torch.inf)
    found = shares.max(1)
    return found.indices, found.values


GATED = Gate(
    name="gated",
    about="a neuron of its own for each fact, closed on everything else",
    paper="docs/methods/gated.md",
    settings=GateSettings,
)
