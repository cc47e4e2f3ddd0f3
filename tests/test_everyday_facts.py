"""The facts in benchmarks/facts are whole, and those for choosing and for reporting are apart."""

from collections import Counter
from pathlib import Path

import pytest

from nulledit import read_facts
from nulledit.data.facts import SLOT

FOLDER = Path(__file__).parents[1] / "benchmarks" / "facts"
PURPOSES = ("choosing", "reporting")
KINDS = set(
    "date year number price version address telephone name sentence quotation url yes-no "
    "german french spanish chinese arabic".split()
)


def everyday(purpose):
    return read_facts(FOLDER / f"everyday-{purpose}.yaml")


def corrections(purpose):
    return read_facts(FOLDER / f"everyday-corrections-{purpose}.yaml")


def place(prompt):
    if prompt.startswith(SLOT):
        return "first"
    return "last" if prompt.rstrip("?:").endswith(SLOT) else "middle"


@pytest.mark.parametrize("read", [everyday, corrections])
@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_fact_is_whole(read, purpose):
    file = read(purpose)
    assert not file.notices
    for fact in file.facts:
        assert len(set(fact.paraphrases)) == 2
        assert not set(fact.paraphrases) & {fact.render(fact.prompt)}
        assert 1 <= len(fact.neighbours) <= 3
        assert all(n.answer for n in fact.neighbours)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_every_kind_and_place_is_there(purpose):
    facts = everyday(purpose).facts
    assert len(facts) >= 60
    assert {fact.relation for fact in facts} == KINDS
    places = Counter(place(fact.prompt) for fact in facts)
    assert min(places["first"], places["middle"], places["last"]) >= 8
    assert sum("?" in fact.prompt for fact in facts) >= 10
    assert max(Counter(fact.subject for fact in facts).values()) >= 3
    assert all(8 <= len(fact.target.split()) <= 20 for fact in facts if fact.relation == "sentence")
    assert all(2 <= len(fact.target.split()) <= 4 for fact in facts if fact.relation == "name")


@pytest.mark.parametrize("purpose", PURPOSES)
def test_no_neighbour_asks_about_an_edited_subject(purpose):
    facts = everyday(purpose).facts
    questions = {f.render(f.prompt) for f in facts} | {p for f in facts for p in f.paraphrases}
    subjects = {fact.subject.casefold().removeprefix("the ") for fact in facts}
    for neighbour in (n for fact in facts for n in fact.neighbours):
        assert neighbour.prompt not in questions
        assert not [s for s in subjects if s in neighbour.prompt.casefold()], neighbour.prompt


def test_choosing_and_reporting_are_the_same_mixture_and_share_nothing():
    one, other = (everyday(purpose).facts for purpose in PURPOSES)
    assert Counter(f.relation for f in one) == Counter(f.relation for f in other)
    assert not {f.subject for f in one} & {f.subject for f in other}
    assert not {f.id for f in one} & {f.id for f in other}
    assert not {f.render(f.prompt) for f in one} & {f.render(f.prompt) for f in other}
    told = [
        {f.target.casefold() for f in facts if f.relation != "yes-no"} for facts in (one, other)
    ]
    assert not told[0] & told[1]
    asked = [{n.prompt for f in facts for n in f.neighbours} for facts in (one, other)]
    assert not asked[0] & asked[1]


@pytest.mark.parametrize("purpose", PURPOSES)
def test_a_correction_answers_a_question_of_its_set_anew(purpose):
    by_question = {(f.subject, f.prompt, f.relation): f for f in everyday(purpose).facts}
    for fact in corrections(purpose).facts:
        earlier = by_question[fact.subject, fact.prompt, fact.relation]
        assert fact.old_answer == earlier.target != fact.target
        assert fact.id != earlier.id


def other_relations(purpose):
    return read_facts(FOLDER / f"other-relations-{purpose}.yaml")


@pytest.mark.parametrize("purpose", PURPOSES)
def test_other_relations_are_of_the_fact_s_subject(purpose):
    file = other_relations(purpose)
    assert not file.notices
    assert len(file.facts) >= 30
    for fact in file.facts:
        subject = fact.subject.casefold().removeprefix("the ")
        assert len(set(fact.paraphrases)) == 2
        assert 2 <= len(fact.other_relations) <= 3
        assert len({probe.prompt for probe in fact.other_relations}) == len(fact.other_relations)
        for probe in fact.other_relations:
            assert subject in probe.prompt.casefold()
            assert probe.answer
            assert fact.target.casefold() not in probe.answer.casefold()
            assert probe.prompt not in (*fact.paraphrases, fact.render(fact.prompt))


def test_facts_with_other_relations_are_apart_too():
    one, other = (other_relations(purpose).facts for purpose in PURPOSES)
    for name in ("id", "subject", "prompt", "target"):
        assert not {getattr(f, name) for f in one} & {getattr(f, name) for f in other}, name
    asked = [{p.prompt for f in facts for p in f.other_relations} for facts in (one, other)]
    assert not asked[0] & asked[1]
