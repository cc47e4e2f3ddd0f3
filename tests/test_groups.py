"""Rates by relation and by age against the rates of each group alone."""

import json
import math

import pytest

from nulledit import Fact
from nulledit.evaluation import Query, Rate, Score, by_age, by_relation, rates, rates_by
from nulledit.evaluation.groups import rates_of_rows
from nulledit.evaluation.runner import Evaluation


def fact(i, prompt, relation=None):
    return Fact(f"Subject{i}", prompt, "Velmish", id=f"f{i}", relation=relation)


def item(fact_id, kind, strict, preferred=None):
    query = Query(fact_id, kind, "prompt", "answer", None if preferred is None else "other")
    return Score(query, 1.0, None if preferred is None else 2.0, preferred, strict, strict / 2)


SCORES = [
    item(f"f{i}", kind, i % 3 == 0, preferred)
    for i in range(9)
    for kind, preferred in (
        ("efficacy", i % 2 == 0),
        ("specificity", None),
        *([("portability", None)] if i < 3 else []),
    )
]
LABEL = {f"f{i}": "old" if i < 4 else "new" for i in range(8)} | {"gone": "old"}


def test_relations_by_the_given_id_or_else_by_the_template():
    facts = [
        *(fact(i, f"wording {i % 2} of {{}} is", "P103") for i in range(3)),
        *(fact(i, "{} speaks") for i in range(3, 6)),
        *(fact(i, "{} works as") for i in range(6, 8)),
        fact(8, "{} lies in", "P17"),
    ]
    labels = by_relation(facts, smallest=3)
    assert list(labels) == [f.id for f in facts]
    assert list(labels.values()) == ["P103"] * 3 + ["{} speaks"] * 3 + ["other"] * 3
    assert set(by_relation(facts).values()) == {"other"}
    assert len({*by_relation(facts, smallest=1).values()}) == 4
    assert by_relation([]) == {}


def test_cohorts_are_of_one_size_but_the_last():
    ids = [f"f{i}" for i in range(5)]
    assert by_age(ids, size=2) == {
        "f0": "1-2",
        "f1": "1-2",
        "f2": "3-4",
        "f3": "3-4",
        "f4": "5-5",
    }
    with pytest.raises(ValueError, match="at least one"):
        by_age(ids, size=0)


def test_a_groups_rates_are_those_of_its_scores_alone():
    found = rates_by(SCORES, LABEL)
    assert list(found) == ["old", "new"]
    for name, measures in found.items():
        alone = rates(s for s in SCORES if LABEL.get(s.query.fact_id) == name)
        for measure, rate in measures.items():
            assert_same(rate, alone.get(measure))
    assert found["new"]["portability_strict"] is None
    assert found["old"]["portability_strict"].n == 3
    assert found["old"]["generalization"] is None
    assert found["old"]["efficacy_tokens"].n == 4
    assert rates_by([], LABEL) == {}
    assert rates_by(SCORES, {}) == {}


def assert_same(rate, other):
    if rate is None or other is None:
        assert rate is other
    else:
        assert (rate.mean, rate.n) == (other.mean, other.n)
        assert math.isnan(rate.standard_error) == math.isnan(other.standard_error)
        assert math.isnan(rate.standard_error) or rate.standard_error == other.standard_error


def test_rows_of_an_evaluation_give_the_same_rates_kept_or_not():
    says = {f"f{i}": i < 2 for i in range(9)}
    evaluation = Evaluation(tuple(SCORES), {}, rates(SCORES), None, None, says)
    rows = evaluation.rows()
    found = rates_of_rows(json.loads(json.dumps(rows)), LABEL)
    for name, measures in rates_by(SCORES, LABEL).items():
        for measure, rate in measures.items():
            assert_same(found[name][measure], rate)
    assert found["old"]["generation"] == Rate(0.5, pytest.approx(math.sqrt(1 / 12)), 4)
    assert found["new"]["generation"].mean == 0
    assert "answer" not in found["old"]
