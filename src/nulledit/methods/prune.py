"""PRUNE: MEMIT, with the large singular values of all edits together held back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from nulledit.io.settings import Expected, checked
from nulledit.linalg.postprocess import restrain
from nulledit.methods.filters import CompensatedSettings, moment_gains
from nulledit.methods.registry import Filter


@checked
@dataclass(frozen=True)
class PruneSettings(CompensatedSettings):
    """MEMIT's, and how hard singular values are held back."""

    base: Annotated[float, Expected("a number above 1", gt=1)] = math.e
    """α, base of the logarithm: larger holds back more (e and 1.2 in the published code)."""


def restrain_total(total: Tensor, original: Tensor, settings: PruneSettings) -> Tensor:
    """The total update [d_out, d_in] with singular values above those of W₀ held back.

    It is added to W₀. (The official AlphaEdit code adds it to the edited weight, so that the edits
    count twice.)
    """
    return restrain(total, original, settings.base)


PRUNE = Filter(
    name="prune",
    about="MEMIT, with singular values of the total update above those of W₀ held back",
    paper="arXiv:2405.16821",
    settings=PruneSettings,
    gains=moment_gains,
    finish=restrain_total,
    cost="n × n solve and two d_out × d_out eigendecompositions",
)
