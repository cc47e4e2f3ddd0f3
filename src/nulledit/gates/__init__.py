"""Limits that an edited model must keep, and signs that it will soon break them."""

from nulledit.gates.hidden import hidden_growth
from nulledit.gates.limits import Limits, load_limits
from nulledit.gates.measure import GateReport, Row, check
from nulledit.gates.warn import warnings_of

__all__ = ["GateReport", "Limits", "Row", "check", "hidden_growth", "load_limits", "warnings_of"]
