"""Where in a model a fact is read from: causal tracing, and what it suggests."""

from nulledit.locating.location import Location, locate
from nulledit.locating.questions import Question, Questions, ask
from nulledit.locating.suggestion import Suggestion, suggest
from nulledit.locating.tracing import Trace, TraceSettings, trace

__all__ = [
    "Location",
    "Question",
    "Questions",
    "Suggestion",
    "Trace",
    "TraceSettings",
    "ask",
    "locate",
    "suggest",
    "trace",
]
