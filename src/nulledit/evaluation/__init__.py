"""What a model makes of facts, of other text, and of itself: scores, answers, perplexity, drift."""

from nulledit.evaluation.generation import contains, generate_answers
from nulledit.evaluation.metrics import Rate, Score, rates, score
from nulledit.evaluation.perplexity import Perplexity, perplexity, read_windows
from nulledit.evaluation.preservation import (
    Preservation,
    preservation,
    preservation_report,
    shipped_corpus,
    shipped_text,
)
from nulledit.evaluation.protocols import Query, queries_of
from nulledit.evaluation.runner import Evaluation, evaluate, paired_bootstrap

__all__ = [
    "Evaluation",
    "Perplexity",
    "Preservation",
    "Query",
    "Rate",
    "Score",
    "contains",
    "evaluate",
    "generate_answers",
    "paired_bootstrap",
    "perplexity",
    "preservation",
    "preservation_report",
    "queries_of",
    "rates",
    "read_windows",
    "score",
    "shipped_corpus",
    "shipped_text",
]
