"""Questions beyond CounterFact's: what follows from a fact, and asking after other texts."""

import json
from dataclasses import replace

import pytest
import torch

from nulledit import Editor, Fact, Probe
from nulledit.errors import FactError
from nulledit.evaluation import Query, contains, evaluate, queries_of, rates, score
from nulledit.evaluation.queries import shipped_sentences, statement, unrelated
from nulledit.models.editable_model import EditableModel

ADA = Fact(
    id="ada",
    subject="Ada Byron",
    prompt="The mother tongue of {} is",
    target="Velmish",
    old_answer="English",
    paraphrases=("{} speaks",),
    neighbours=(
        Probe("Karo Dun speaks", "English"),
        Probe("People in Velm speak", "velmish"),
        Probe("The winters are"),
    ),
    portability=(Probe("Ada Byron grew up in", "Velm"), Probe("Ada Byron writes to the", "sea")),
)
TEXTS = ("The river is long.", "Winter came to the coast.", "He said so.")


@pytest.fixture
def editor(tiny_model, tokenizer, recipe, make_statistics):
    model = tiny_model("llama")
    return Editor(model, tokenizer, recipe=recipe, statistics=make_statistics(model))


def test_what_follows_is_asked_with_nothing_against_it():
    assert queries_of(ADA)[-2:] == (
        Query("ada", "portability", "Ada Byron grew up in", "Velm", None),
        Query("ada", "portability", "Ada Byron writes to the", "sea", None),
    )
    assert queries_of(replace(ADA, portability=())) == queries_of(ADA)[:-2]


def test_portability_is_a_measure_only_where_a_fact_has_it(tiny_model, tokenizer):
    def rates_of(fact):
        found = score(EditableModel(tiny_model("llama"), tokenizer), queries_of(fact))
        return rates(found), [item for item in found if item.query.kind == "portability"]

    with_it, asked = rates_of(ADA)
    assert with_it["portability_tokens"].mean == sum(item.tokens for item in asked) / 2
    assert with_it["portability_strict"].n == 1
    assert "portability" not in with_it  # nothing to prefer the answer to
    without, _ = rates_of(replace(ADA, portability=()))
    assert not any(name.startswith("portability") for name in without)


def test_any_accepted_answer_is_right(tiny_model, tokenizer, monkeypatch):
    model = EditableModel(tiny_model("llama"), tokenizer)

    def scored(*queries):
        return score(model, queries)

    plain = Query("ada", "portability", "Ada Byron grew up in", "Velm", None)
    (token,) = model.encoder.encode(plain.prompt, target="sea").target_ids
    likeliest = torch.arange(400.0).where(torch.arange(400) != token, 1e3)
    monkeypatch.setattr(model, "logits", lambda states: likeliest.expand(len(states), -1))
    said = "sea"
    for kind, other in (("portability", None), ("specificity", "town"), ("forgotten", None)):
        answers = ("Velm", "the river", said)
        alone = scored(*(replace(plain, kind=kind, answer=text, other=other) for text in answers))
        (found,) = scored(replace(plain, kind=kind, other=other, aliases=answers[1:]))
        best = min if kind == "forgotten" else max
        assert found.tokens == best(item.tokens for item in alone)
        assert found.strict == (all if kind == "forgotten" else any)(item.strict for item in alone)
        assert (found.answer_nll, found.preferred) == (alone[0].answer_nll, alone[0].preferred)
        assert any(item.strict != found.strict for item in alone)


def test_accepted_answers_are_asked_for_wherever_the_answer_is():
    names = {"target_aliases": ("Velm tongue",), "neighbours": (Probe("a", "b", ("c", "VELMISH")),)}
    fact = replace(ADA, **names, portability=(Probe("d", "e", ("f",)),))
    asked = {query.kind: query for query in queries_of(fact, distract=True, texts=TEXTS)}
    assert asked["efficacy"].aliases == asked["generalization"].aliases == ("Velm tongue",)
    assert asked["efficacy_distracted"].aliases == ("Velm tongue",)
    assert asked["specificity"].aliases == asked["specificity_distracted"].aliases
    assert asked["specificity"].other is None  # the target is right there, too
    assert asked["portability"].said == ("e", "f")
    forgotten = {query.kind: query.aliases for query in queries_of(fact.forgotten())}
    assert forgotten["forgotten"] == ("Velm tongue",)
    assert fact.forgotten("English").target_aliases == ()


def test_an_alias_that_the_model_says_counts_as_the_target(editor):
    fact = replace(ADA, target="nothing of the kind")
    said = evaluate(editor.editable, [fact]).answers["ada"].split()[0]
    for aliases, wanted in (((), 0.0), (("nor this", said), 1.0)):
        assert (
            evaluate(editor.editable, [replace(fact, target_aliases=aliases)]).generation.mean
            == wanted
        )


def test_the_same_prompts_are_asked_again_after_other_texts():
    plain, more = queries_of(ADA), queries_of(ADA, distract=True, texts=TEXTS)
    assert more[: len(plain)] == plain
    own, *near = more[len(plain) :]
    assert own == replace(
        plain[0], kind="efficacy_distracted", prompt=f"{unrelated(ADA, TEXTS)} {plain[0].prompt}"
    )
    edited = "The mother tongue of Ada Byron is Velmish. "
    neighbours = [query for query in plain if query.kind == "specificity"]
    assert near == [
        replace(query, kind="specificity_distracted", prompt=edited + query.prompt)
        for query in neighbours
    ]
    assert [query.other for query in near] == ["Velmish", None]


def test_the_text_that_distracts_depends_on_the_fact_alone():
    facts = [replace(ADA, id=str(i)) for i in range(60)]
    chosen = [unrelated(fact, TEXTS) for fact in facts]
    assert set(chosen) == set(TEXTS)
    assert chosen == [unrelated(fact, TEXTS) for fact in facts]
    assert chosen == [unrelated(replace(fact, target="Ostrel"), TEXTS) for fact in facts]


def test_a_text_that_names_the_fact_does_not_distract():
    texts = ("Ada Byron came.", "They speak VELMISH.", "In English, please.", "It rains.")
    for i in range(20):
        assert unrelated(replace(ADA, id=str(i)), texts) == "It rains."
    for none in (texts[:3], ()):
        with pytest.raises(FactError, match=r"fact 'ada': none of \d texts .*'Velmish'"):
            unrelated(ADA, none)


def test_the_shipped_sentences_are_many_and_whole():
    sentences = shipped_sentences()
    assert len(set(sentences)) > 100
    assert all(len(s.split()) > 4 and s[-1] in ".!?" and s[0] not in " \n" for s in sentences)
    after = queries_of(ADA, distract=True)
    assert next(q.prompt for q in after if q.kind == "efficacy_distracted").startswith(
        unrelated(ADA, sentences)
    )
    assert not contains(unrelated(ADA, sentences), "Ada Byron")


@pytest.mark.parametrize(
    ("subject", "prompt", "target", "expected"),
    [
        ("Rome", "{} lies in", "France", "Rome lies in France."),
        ("Rome", "{} lies in", "the U.S.", "Rome lies in the U.S."),
        ("東京", "{}は", "川です。", "東京は川です。"),
    ],
)
def test_the_statement_ends_in_one_full_stop(subject, prompt, target, expected):
    assert statement(Fact(subject, prompt, target)) == expected


def test_an_evaluation_distracts_on_request(editor):
    plain = evaluate(editor.editable, [ADA], generate=False)
    found = evaluate(editor.editable, [ADA], generate=False, distract=True, distractors=TEXTS)
    assert [item.query for item in found.scores] == list(
        queries_of(ADA, distract=True, texts=TEXTS)
    )
    more = set(found.rates) - set(plain.rates)
    assert more == {
        kind + suffix
        for kind in ("efficacy_distracted", "specificity_distracted")
        for suffix in ("", "_strict", "_tokens")
    }
    assert all(found.rates[name] == plain.rates[name] for name in plain.rates)
    row = found.rows()["ada"]
    assert {name: row[name] for name in plain.rows()["ada"]} == plain.rows()["ada"]
    assert row["efficacy_distracted"] in (0, 1)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rates"].keys() == (
        found.rates.keys()
    )
    default = evaluate(editor.editable, [ADA], generate=False, distract=True)
    assert [item.query for item in default.scores] == list(queries_of(ADA, distract=True))
