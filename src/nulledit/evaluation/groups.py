"""Rates of groups of facts: by relation, as in Figure 7 of AlphaEdit's paper, or by age."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nulledit.data.facts import Fact
from nulledit.evaluation.scores import MEASURES, Score, per_fact
from nulledit.evaluation.stats import Rate

OTHER = "other"

GroupRates = dict[str, dict[str, Rate | None]]
"""Label -> measure -> its rate over the label's facts; None where none of them has the measure."""


def by_relation(facts: Sequence[Fact], *, smallest: int = 10) -> dict[str, str]:
    """Fact id -> its relation, or its prompt's template where none is given.

    Relations of fewer than `smallest` facts are put together as "other". AlphaEdit
    (arXiv:2410.02355), Figure 7, shows rates by relation.
    """
    sizes = Counter(fact.relation_key for fact in facts)
    return {
        fact.id: fact.relation_key if sizes[fact.relation_key] >= smallest else OTHER
        for fact in facts
    }


def by_age(fact_ids: Sequence[str], *, size: int) -> dict[str, str]:
    """Fact id -> its cohort, such as "101-200", of ids in the order in which they were edited."""
    if size < 1:
        raise ValueError(f"a cohort needs at least one fact, got a size of {size}")
    labels = {}
    for i, fact_id in enumerate(fact_ids):
        first = i - i % size
        labels[fact_id] = f"{first + 1}-{min(first + size, len(fact_ids))}"
    return labels


def rates_by(scores: Iterable[Score], label: Mapping[str, str]) -> GroupRates:
    """Rates of each label's facts: what `rates` says of the scores of those facts alone.

    Labels come in the order of `label`; a fact without one is left out.
    """
    rows: dict[str, dict[str, float]] = {}
    for measure, facts in per_fact(scores).items():
        for fact_id, value in facts.items():
            rows.setdefault(fact_id, {})[measure] = value
    return rates_of_rows(rows, label)


def rates_of_rows(rows: Mapping[str, Mapping[str, Any]], label: Mapping[str, str]) -> GroupRates:
    """The same of one row per fact, as `Evaluation.rows()` gives and a run's lines keep.

    Every value of a row that is a number (or True or False) is averaged; others are not.
    """
    measures = dict.fromkeys(MEASURES)
    for row in rows.values():
        measures.update(dict.fromkeys(m for m, value in row.items() if _is_number(value)))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for fact_id, name in label.items():
        if fact_id in rows:
            groups.setdefault(name, []).append(rows[fact_id])
    return {
        name: {
            measure: Rate.of(values) if values else None
            for measure in measures
            for values in [[float(r[measure]) for r in group if _is_number(r.get(measure))]]
        }
        for name, group in groups.items()
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
