"""A run: its folder and pages, the limits that its model must keep, its checks and comparisons."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nulledit.runs.gate import GateReport, Row, check
    from nulledit.runs.limits import Limits, load_limits
    from nulledit.runs.warnings import warnings_of

_HOME = {
    "GateReport": "gate",
    "Limits": "limits",
    "Row": "gate",
    "check": "gate",
    "load_limits": "limits",
    "warnings_of": "warnings",
}
__all__ = ["GateReport", "Limits", "Row", "check", "load_limits", "warnings_of"]


def __getattr__(name: str) -> Any:
    """Import on first use: pages of a run are drawn without torch."""
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
