"""A run: its folder and pages, the limits that its model must keep, its checks and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nulledit._lazy import lazily

if TYPE_CHECKING:
    from nulledit.runs.gate import GateReport, Row, check
    from nulledit.runs.limits import Limits, load_limits
    from nulledit.runs.warnings import warnings_of

_HOME = {
    "GateReport": "nulledit.runs.gate",
    "Limits": "nulledit.runs.limits",
    "Row": "nulledit.runs.gate",
    "check": "nulledit.runs.gate",
    "load_limits": "nulledit.runs.limits",
    "warnings_of": "nulledit.runs.warnings",
}
__all__ = [
    "GateReport",
    "Limits",
    "Row",
    "check",
    "load_limits",
    "warnings_of",
]
__getattr__, __dir__ = lazily(__name__, _HOME)
