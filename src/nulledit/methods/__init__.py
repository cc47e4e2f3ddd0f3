"""Methods: functions from a layer's problem to its update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nulledit.methods.equality import EQUALITY
from nulledit.methods.evoedit import EVOEDIT
from nulledit.methods.filters import FILTERS
from nulledit.methods.finetune import FINETUNE
from nulledit.methods.gates import GATED
from nulledit.methods.neurons import NSE
from nulledit.methods.problem import LayerProblem
from nulledit.methods.prune import PRUNE
from nulledit.methods.rect import RECT
from nulledit.methods.registry import Descent, Filter, Function, Gate, Method, Registry, Solve

METHODS = Registry(group="nulledit.methods")
for _method in (*FILTERS, *EQUALITY, RECT, PRUNE, NSE, EVOEDIT, GATED, FINETUNE):
    METHODS.add(_method)

change_recipe = METHODS.change
find_method = METHODS.find
register = METHODS.add


@dataclass(frozen=True)
class NoSettings:
    """A method without constants."""


def method(
    name: str,
    *,
    paper: str = "",
    settings: type = NoSettings,
    kind: type[Solve] | type[Descent] = Solve,
    **traits: Any,
) -> Callable[[Function], Function]:
    """Register the decorated function, LayerProblem → Δ [d_out, d_in], as a method.

    Its first docstring line says what it is. `settings`: a frozen dataclass of its constants.
    `traits`: other fields of its `kind`. ConfigError if the name is taken.
    """

    def made(solve: Function) -> Function:
        about = (solve.__doc__ or "").strip().split("\n")[0].rstrip(".")
        register(
            kind(name=name, about=about, paper=paper, settings=settings, solve=solve, **traits)
        )
        return solve

    return made


__all__ = [
    "METHODS",
    "Descent",
    "Filter",
    "Gate",
    "LayerProblem",
    "Method",
    "NoSettings",
    "Registry",
    "Solve",
    "change_recipe",
    "find_method",
    "method",
    "register",
]
