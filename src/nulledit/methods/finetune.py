"""FT: gradient steps on the layer's weight, within a small box around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nulledit.io.settings import Count, NotNegative, Positive, checked
from nulledit.methods.problem import LayerProblem
from nulledit.methods.registry import Descent


@checked
@dataclass(frozen=True)
class FineTuneSettings:
    """Adam on one matrix."""

    steps: Count = 25
    """Most gradient steps per batch (published)."""
    learning_rate: Positive = 5e-4
    """Adam's (published)."""
    weight_decay: NotNegative = 0.0
    """Adam's, on the weight itself, not on the update (0 in AlphaEdit's code)."""
    norm_constraint: NotNegative = 5e-4
    """Largest |Δ| of an entry per batch, as ROME's FT+L on GPT2-XL; 0: none, as FT in AlphaEdit's
    code."""
    stop_loss: NotNegative = 1e-2
    """No more steps when the loss (nats) is below this (published)."""


def solve_finetune(problem: LayerProblem) -> Tensor:
    """Adam on the targets' NLL from W, clamped to |Δ| ≤ ε: FT (as in arXiv:2202.05262, App. E).

    Projected inside, Δ = ΔP after each step's clamp: the null space is kept exactly, the box only
    nearly.
    """
    if problem.target_loss is None:
        raise ValueError("fine-tuning needs the problem's target_loss")
    settings: FineTuneSettings = problem.settings
    start = problem.weight
    weight = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([weight], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    for _ in range(settings.steps):
        loss, gradient = problem.target_loss(weight.detach())
        if loss < settings.stop_loss:
            break
        weight.grad = gradient.to(weight)
        adam.step()
        weight.data.copy_(start + _allowed(weight.data - start, problem))
    return weight.detach() - start


def _allowed(update: Tensor, problem: LayerProblem) -> Tensor:
    limit = problem.settings.norm_constraint
    if limit:
        update = update.clamp(-limit, limit)
    if problem.projection == "inside":
        update = problem.projector.apply(update.mT).mT
    return update


FINETUNE = Descent(
    name="ft",
    about="constrained fine-tuning of the layer's weight on the targets",
    paper="arXiv:2202.05262",
    settings=FineTuneSettings,
    solve=solve_finetune,
    cost="25 forward and backward passes of the model per layer; no values",
)
