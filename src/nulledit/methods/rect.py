"""RECT: MEMIT's update with its relatively small entries left out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nulledit.io.settings import Share, checked
from nulledit.linalg.postprocess import keep_largest
from nulledit.methods.filters import MomentSettings, moment_gains
from nulledit.methods.problem import LayerProblem
from nulledit.methods.registry import Solve, closed_form


@checked
@dataclass(frozen=True)
class RectSettings(MomentSettings):
    """MEMIT's, and how much of its update stays."""

    keep: Share = 0.4
    """Share of the entries of Δ that stay (0.4 in AlphaEdit's code; 0.2 in RECT's own example)."""


def solve_rect(problem: LayerProblem) -> Tensor:
    """MEMIT's Δ, of which the entries with the largest |Δ/W| stay (arXiv:2401.04700, Sec. 5).

    Leaving out entries leaves the null space. Projected inside, what stays is projected once more:
    the null space has the last word, and zeros are no longer exact.
    """
    kept = keep_largest(closed_form(problem), problem.weight, problem.settings.keep)
    return problem.projector.apply(kept.mT).mT if problem.projection == "inside" else kept


RECT = Solve(
    name="rect",
    about="MEMIT, of whose update only the largest relative changes stay",
    paper="arXiv:2401.04700",
    settings=RectSettings,
    gains=moment_gains,
    solve=solve_rect,
    linear=False,
    cost="n × n solve and a selection among d_out · d_in entries",
)
