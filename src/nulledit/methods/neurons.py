"""NSE: MEMIT with past keys, on the neurons that a batch activates most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.io.settings import Share, checked
from nulledit.linalg.solve import cholesky, solve_with
from nulledit.linalg.spectrum import Spectrum
from nulledit.methods.filters import FLOOR, MomentSettings, moment_gains
from nulledit.methods.problem import LayerProblem
from nulledit.methods.registry import Solve


@checked
@dataclass(frozen=True)
class NeuronSettings(MomentSettings):
    """MEMIT's, and how many neurons are edited."""

    neurons: Share = 0.8
    """p, share of the batch's activation that the edited neurons hold (0.8 for GPT-J; the
    published settings for LLaMA3 and GPT2-XL have 1.0, which is all neurons)."""


def chosen_neurons(keys: Tensor, share: float) -> Tensor:
    """The fewest neurons that hold `share` of Σ|activation| over `keys` [d_in, n], ascending."""
    activation = keys.abs().sum(1)
    if share == 1:
        return torch.arange(len(activation), device=keys.device)
    ordered = activation.sort(descending=True)
    reached = ordered.values.cumsum(0) >= share * activation.sum()
    count = int((~reached).sum()) + 1
    return ordered.indices[:count].sort().values


def restricted_moment(spectrum: Spectrum, neurons: Tensor) -> Tensor:
    """C_II [m, m] of the `neurons` I, eigenvalues of C floored as everywhere (1e-6 of the largest).

    LookupError if the spectrum does not hold all eigenvectors.
    """
    whole = spectrum.whole()
    values = whole.eigenvalues.clamp_min(FLOOR * float(whole.eigenvalues[-1]))
    rows = whole.eigenvectors[neurons]
    return (rows * values) @ rows.mT


def solve_neurons(problem: LayerProblem) -> Tensor:
    """Δ_I = R K_Iᵀ (λ₀ C_II + K_p,I K_p,Iᵀ + K_I K_Iᵀ)⁻¹, zero elsewhere: NSE (arXiv:2410.04045).

    K_p are the keys of the batches before. As an n × n system with G_I = (λ₀ C_II + K_p K_pᵀ)⁻¹.
    Projected inside, G is P G_I P, which reaches other neurons too: a null space is not made of
    single neurons.
    """
    settings: NeuronSettings = problem.settings
    inside = problem.projection == "inside"
    neurons = chosen_neurons(problem.keys, settings.neurons)
    past = problem.past_keys[neurons]
    moment = settings.moment_weight * restricted_moment(problem.spectrum, neurons)
    factor = cholesky(moment + past @ past.mT)
    keys = problem.projector.apply(problem.keys) if inside else problem.keys
    weighted = torch.zeros_like(keys)
    weighted[neurons] = torch.cholesky_solve(keys[neurons], factor)
    if inside:
        weighted = problem.projector.apply(weighted)
    return solve_with(problem.keys, problem.residual, weighted)


NSE = Solve(
    name="nse",
    about="MEMIT with past keys on the most active neurons; values from the unedited model",
    paper="arXiv:2410.04045",
    settings=NeuronSettings,
    gains=moment_gains,
    solve=solve_neurons,
    rewinds=True,
    reads_moment=True,
    cost="Cholesky of the chosen neurons' moment (up to d_in × d_in) and an n × n solve",
)
