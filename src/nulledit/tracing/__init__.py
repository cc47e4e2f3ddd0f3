"""Which blocks to edit: causal tracing of where facts are read, and what a value costs."""

from nulledit.tracing.costs import Costs, CostSettings, cost_of, measure_costs
from nulledit.tracing.location import Location, locate
from nulledit.tracing.questions import Question, Questions, ask
from nulledit.tracing.suggestion import CheapBlocks, Suggestion, cheapest, suggest
from nulledit.tracing.trace import Trace, TraceSettings, trace

__all__ = [
    "CheapBlocks",
    "CostSettings",
    "Costs",
    "Location",
    "Question",
    "Questions",
    "Suggestion",
    "Trace",
    "TraceSettings",
    "ask",
    "cheapest",
    "cost_of",
    "locate",
    "measure_costs",
    "suggest",
    "trace",
]
