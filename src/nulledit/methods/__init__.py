"""Methods: functions from a layer's problem to its update."""

from nulledit.methods.equality import EQUALITY
from nulledit.methods.evoedit import EVOEDIT
from nulledit.methods.filters import FILTERS
from nulledit.methods.finetune import FINETUNE
from nulledit.methods.neurons import NSE
from nulledit.methods.prune import PRUNE
from nulledit.methods.rect import RECT
from nulledit.methods.registry import Method, Registry

METHODS = Registry()
for _method in (*FILTERS, *EQUALITY, RECT, PRUNE, NSE, EVOEDIT, FINETUNE):
    METHODS.add(_method)

find_method = METHODS.find
register = METHODS.add

__all__ = ["METHODS", "Method", "Registry", "find_method", "register"]
