"""RECT: MEMIT's update with its relatively small entries left out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nulledit.io.settings import Share, checked
from nulledit.linalg.postprocess import keep_largest
from nulledit.methods.filters import CompensatedSettings, moment_gains
from nulledit.methods.registry import Filter


@checked
@dataclass(frozen=True)
class RectSettings(CompensatedSettings):
    """MEMIT's, and how much of its update stays."""

    keep: Share = 0.4
    """Share of the entries of Δ that stay (0.4 in AlphaEdit's code; 0.2 in RECT's own example)."""


def keep_relative(update: Tensor, weight: Tensor, settings: RectSettings) -> Tensor:
    """The entries of Δ [d_out, d_in] with the largest |Δ/W| (arXiv:2401.04700, Sec. 5).

    Leaving out entries leaves the null space. Projected inside, what stays is projected once more:
    the null space has the last word, and zeros are no longer exact.
    """
    return keep_largest(update, weight, settings.keep)


RECT = Filter(
    name="rect",
    about="MEMIT, of whose update only the largest relative changes stay",
    paper="arXiv:2401.04700",
    settings=RectSettings,
    gains=moment_gains,
    trim=keep_relative,
    cost="n × n solve and a selection among d_out · d_in entries",
)
