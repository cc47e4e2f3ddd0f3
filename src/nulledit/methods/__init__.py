"""Methods: functions from a layer's problem to its update."""

from nulledit.methods.filters import FILTERS
from nulledit.methods.registry import Method, Registry

METHODS = Registry()
for _method in FILTERS:
    METHODS.add(_method)

find_method = METHODS.find
register = METHODS.add

__all__ = ["METHODS", "Method", "Registry", "find_method", "register"]
