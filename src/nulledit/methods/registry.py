"""The table of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nulledit.config import MethodSettings
from nulledit.editing.problem import LayerProblem
from nulledit.errors import ConfigError
from nulledit.methods.filters import alphaedit_gains, solve_filter


@dataclass(frozen=True)
class Method:
    """One method and its traits."""

    name: str
    """As in recipes."""
    paper: str
    """Where it is from."""
    history: bool
    """Whether past facts stay in the system, so that batches equal one joint solve."""
    gains: Callable[[Tensor, float, MethodSettings], Tensor]
    """The spectral filter: (eigenvalues [d_in], τ, settings) → g [d_in]."""
    solve: Callable[[LayerProblem], Tensor]
    """The update Δ [d_out, d_in], float64."""


METHODS = {
    m.name: m
    for m in (Method("alphaedit", "arXiv:2410.02355", True, alphaedit_gains, solve_filter),)
}


def find_method(name: str) -> Method:
    """A method by name, or a ConfigError that lists those known."""
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]
