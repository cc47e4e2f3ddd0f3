"""What a model makes of facts, of other text, and of itself: scores, answers, perplexity, KL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nulledit._lazy import lazily

if TYPE_CHECKING:
    from nulledit.evaluation.fluency import Writing, generation_entropy, write_texts
    from nulledit.evaluation.generation import contains, generate_answers, generate_texts
    from nulledit.evaluation.groups import by_age, by_relation, rates_by, rates_of_rows
    from nulledit.evaluation.preservation import (
        Preservation,
        preservation_error,
        preservation_report,
        shipped_corpus,
        shipped_text,
    )
    from nulledit.evaluation.queries import Query, queries_of
    from nulledit.evaluation.reading import (
        Divergence,
        Perplexity,
        Reading,
        perplexity,
        read,
        read_windows,
    )
    from nulledit.evaluation.retry import retry_failing
    from nulledit.evaluation.runner import Evaluation, evaluate
    from nulledit.evaluation.scores import Score, per_fact, rates, score
    from nulledit.evaluation.stats import Rate, paired_bootstrap

_HOME = {
    "Divergence": "nulledit.evaluation.reading",
    "Evaluation": "nulledit.evaluation.runner",
    "Perplexity": "nulledit.evaluation.reading",
    "Preservation": "nulledit.evaluation.preservation",
    "Query": "nulledit.evaluation.queries",
    "Rate": "nulledit.evaluation.stats",
    "Reading": "nulledit.evaluation.reading",
    "Score": "nulledit.evaluation.scores",
    "Writing": "nulledit.evaluation.fluency",
    "by_age": "nulledit.evaluation.groups",
    "by_relation": "nulledit.evaluation.groups",
    "contains": "nulledit.evaluation.generation",
    "evaluate": "nulledit.evaluation.runner",
    "generate_answers": "nulledit.evaluation.generation",
    "generate_texts": "nulledit.evaluation.generation",
    "generation_entropy": "nulledit.evaluation.fluency",
    "paired_bootstrap": "nulledit.evaluation.stats",
    "per_fact": "nulledit.evaluation.scores",
    "perplexity": "nulledit.evaluation.reading",
    "preservation_error": "nulledit.evaluation.preservation",
    "preservation_report": "nulledit.evaluation.preservation",
    "queries_of": "nulledit.evaluation.queries",
    "rates": "nulledit.evaluation.scores",
    "rates_by": "nulledit.evaluation.groups",
    "rates_of_rows": "nulledit.evaluation.groups",
    "read": "nulledit.evaluation.reading",
    "read_windows": "nulledit.evaluation.reading",
    "retry_failing": "nulledit.evaluation.retry",
    "score": "nulledit.evaluation.scores",
    "shipped_corpus": "nulledit.evaluation.preservation",
    "shipped_text": "nulledit.evaluation.preservation",
    "write_texts": "nulledit.evaluation.fluency",
}
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
    "preservation_error",
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
__getattr__, __dir__ = lazily(__name__, _HOME)
