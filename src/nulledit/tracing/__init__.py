"""Where in a model a fact is read from: causal tracing, and what it suggests."""

from nulledit.tracing.location import Location, locate
from nulledit.tracing.questions import Question, Questions, ask
from nulledit.tracing.suggestion import Suggestion, suggest
from nulledit.tracing.trace import Trace, TraceSettings, trace

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
