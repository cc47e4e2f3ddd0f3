"""What a model makes of facts, of other text, and of itself: scores, answers, perplexity, KL."""

from nulledit.evaluation.fluency import Writing, generation_entropy, write_texts
from nulledit.evaluation.generation import contains, generate_answers, generate_texts
from nulledit.evaluation.groups import by_age, by_relation, rates_by, rates_of_rows
from nulledit.evaluation.perplexity import (
    Divergence,
    Perplexity,
    Reading,
    perplexity,
    read,
    read_windows,
)
from nulledit.evaluation.preservation import (
    Preservation,
    preservation,
    preservation_report,
    shipped_corpus,
    shipped_text,
)
from nulledit.evaluation.queries import Query, queries_of
from nulledit.evaluation.retry import retry_failing
from nulledit.evaluation.runner import Evaluation, evaluate, paired_bootstrap
from nulledit.evaluation.scores import Rate, Score, per_fact, rates, score

__all__ = [
    "Divergence",
    "Evaluation",
    "Perplexity",
    "Preservation",
    "Query",
    "Rate",
    "Reading",
    "Score",
    "Writing",
    "by_age",
    "by_relation",
    "contains",
    "evaluate",
    "generate_answers",
    "generate_texts",
    "generation_entropy",
    "paired_bootstrap",
    "per_fact",
    "perplexity",
    "preservation",
    "preservation_report",
    "queries_of",
    "rates",
    "rates_by",
    "rates_of_rows",
    "read",
    "read_windows",
    "retry_failing",
    "score",
    "shipped_corpus",
    "shipped_text",
    "write_texts",
]
