"""Other relations of the edited subjects: what the base would say there is what is asked for."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import RECIPE, build_model, changed, statistics_of

from nulledit import Editor, Fact
from nulledit.data.facts import Probe
from nulledit.errors import ConfigError, FactError
from nulledit.evaluation import evaluate, queries_of
from nulledit.evaluation.comparison import Comparison
from nulledit.evaluation.measures import AT_RELATIONS
from nulledit.evaluation.relations import kept_relations, relation_states
from nulledit.models.editable_model import EditableModel
from nulledit.runs.gate import check
from nulledit.runs.limits import Limits
from nulledit.runs.measure import check_lengths
from nulledit.runs.tables import rates_tables
from nulledit.studies.questions import FACTS as FACTS_QUESTION

WINDOWS = [[3, 1, 4, 1, 5, 9], [2, 6, 5]]
PROMPTS = ("Ada Byron was a", "The mother tongue of Ada Byron is", "Ada Byron wrote", "Ada Byron")
ADA = Fact(
    id="ada",
    subject="Ada Byron",
    prompt="{} lives in",
    target="Velm",
    old_answer="London",
    other_relations=tuple(map(Probe, PROMPTS[:3])),
)
KARO = Fact(
    id="karo",
    subject="Karo Dun",
    prompt="{} lives in",
    target="Oslo",
    other_relations=("Karo Dun was a", {"prompt": "Karo Dun plays the", "answer": "Velm"}),
)
NONE = Fact(id="none", subject="Velm", prompt="{} lies in", target="Norway")
FACTS = [ADA, KARO, NONE]


@pytest.fixture(scope="module")
def pair(tokenizer):
    model = build_model("llama", seed=1)
    return EditableModel(model, tokenizer), EditableModel(changed(model, scale=0.1), tokenizer)


@pytest.fixture
def editor(tokenizer):
    model = build_model("llama")
    return Editor(model, tokenizer, recipe=RECIPE, statistics=statistics_of(model, tokenizer))


def compared(base, now, facts=FACTS):
    return kept_relations(now, facts, relation_states(base, facts), relation_states(now, facts))


def whole(model, prompt):
    ids = torch.tensor([model.encoder.encode(prompt).ids])
    with torch.no_grad():
        return model.model(ids).logits[0, -1].double().log_softmax(-1)


def test_the_unedited_model_keeps_everything(pair):
    base, _ = pair
    found = compared(base, base)
    assert found["relation_specificity"] == {"ada": 1, "karo": 1}
    assert found["relation_kl"] == {"ada": 0, "karo": 0}


def test_it_is_what_two_whole_models_say(pair):
    base, now = pair
    found = compared(base, now)
    for fact in (ADA, KARO):
        kept, apart = [], []
        for probe in fact.other_relations:
            p, q = whole(base, probe.prompt), whole(now, probe.prompt)
            kept.append(p.argmax() == q.argmax())
            apart.append(float((p.exp() * (p - q)).sum()))
        assert found["relation_specificity"][fact.id] == pytest.approx(sum(kept) / len(kept))
        assert found["relation_kl"][fact.id] == pytest.approx(sum(apart) / len(apart), rel=1e-4)
    assert min(found["relation_kl"].values()) > 0
    assert min(found["relation_specificity"].values()) < 1  # there was something to lose


@settings(max_examples=20, deadline=None)
@given(
    prompts=st.lists(st.sampled_from(PROMPTS), min_size=1, max_size=4, unique=True),
    positions=st.sampled_from([1, 16, 2048]),
)
def test_how_prompts_run_together_does_not_matter(pair, prompts, positions):
    base, now = pair
    together = [dataclasses.replace(ADA, other_relations=tuple(map(Probe, prompts))), KARO]
    states = [relation_states(model, together, positions=positions) for model in pair]
    found = kept_relations(now, together, *states)
    alone = [compared(base, now, [dataclasses.replace(ADA, other_relations=(p,))]) for p in prompts]
    for name in AT_RELATIONS:
        mean = sum(one[name]["ada"] for one in alone) / len(alone)
        assert found[name]["ada"] == pytest.approx(mean, rel=1e-3, abs=1e-6)
        assert found[name]["karo"] == pytest.approx(compared(base, now)[name]["karo"], rel=1e-3)


def test_broken_numbers_keep_nothing(pair, tokenizer):
    base, _ = pair
    states = relation_states(base, FACTS)
    broken = {prompt: torch.full_like(state, math.nan) for prompt, state in states.items()}
    found = kept_relations(base, FACTS, states, broken)
    assert set(found["relation_specificity"].values()) == {0.0}
    assert all(map(math.isnan, found["relation_kl"].values()))


def test_a_base_that_was_asked_something_else_is_refused(pair):
    base, now = pair
    with pytest.raises(ValueError, match="Karo Dun was a"):
        kept_relations(now, FACTS, relation_states(base, [ADA]), relation_states(now, FACTS))


def test_an_evaluation_has_it_beside_a_base_only(editor):
    before = evaluate(editor.editable, FACTS, windows=WINDOWS)
    assert not set(AT_RELATIONS) & set(before.summary())
    editor.edit(FACTS)
    alone = evaluate(editor.editable, FACTS)
    assert not set(AT_RELATIONS) & set(alone.rows()["ada"])
    after = evaluate(editor.editable, FACTS[:2], windows=WINDOWS, base=before)
    assert after.summary()["relation_specificity"]["n"] == 2
    assert after.summary()["relation_kl"]["mean"] > 0
    assert after.kl.value > 0
    assert after.rows()["ada"]["relation_kl"] == after.values()["relation_kl"]["ada"]
    assert "relation specificity" in repr(after._table())
    for fact in FACTS:
        editor.undo(fact.id)
    again = evaluate(editor.editable, FACTS, windows=WINDOWS, base=before)
    assert again.summary()["relation_specificity"]["mean"] == 1
    assert again.summary()["relation_kl"]["mean"] == 0


def test_facts_without_such_prompts_lack_the_measure(editor):
    before = evaluate(editor.editable, [NONE], windows=WINDOWS)
    after = evaluate(editor.editable, [NONE], windows=WINDOWS, base=before)
    assert not set(AT_RELATIONS) & set(after.summary())


def test_answers_are_asked_for_and_stand_against_the_target():
    asked = [q for q in queries_of(KARO) if q.kind == "other_relations"]
    assert [(q.prompt, q.answer, q.other) for q in asked] == [
        ("Karo Dun plays the", "Velm", "Oslo")
    ]
    same = dataclasses.replace(KARO, target="Velm")
    assert [q.other for q in queries_of(same) if q.kind == "other_relations"] == [None]
    gone = [q for q in queries_of(KARO.forgotten()) if q.kind == "other_relations"]
    assert [(q.answer, q.other) for q in gone] == [("Velm", None)]


def test_limits_ask_base_and_edited_model(editor):
    limits = Limits.from_dict(
        {"relation_specificity": {"at_least": 100}, "relation_kl": {"at_most": 0}}
    )
    assert check(editor, limits, facts=FACTS).passed
    editor.edit(FACTS)
    before = None
    with editor.base_weights():
        before = evaluate(editor.editable, FACTS, generate=False)
    told = evaluate(editor.editable, FACTS, generate=False, base=before).summary()
    kept, apart = check(editor, limits).rows
    assert kept.found == pytest.approx(100 * told["relation_specificity"]["mean"])
    assert apart.found == pytest.approx(told["relation_kl"]["mean"])
    assert (apart.verdict, apart.unit, apart.n) == ("FAILED", "nat", 2)
    none = check(editor, limits, facts=[NONE])
    assert none.rows[0].note == "no fact has a prompt on another relation of its subject"
    with pytest.raises(ConfigError, match="has at_most; expected at_least"):
        Limits.from_dict({"relation_specificity": {"at_most": 3}})


def test_a_prompt_that_does_not_fit_is_found_before_an_edit(editor):
    long = dataclasses.replace(ADA, other_relations=(Probe("Ada " * 600),))
    with pytest.raises(FactError, match=r"fact ada, other_relations: .*longer than"):
        check_lengths(editor, [long])
    with pytest.raises(FactError, match=r"other_relations: .*longer than"):
        relation_states(editor.editable, [long])


def test_facts_keep_what_is_asked_beside_them():
    record = KARO.to_dict()
    assert record["other_relations"] == [
        {"prompt": "Karo Dun was a"},
        {"prompt": "Karo Dun plays the", "answer": "Velm"},
    ]
    assert Fact.from_dict(record) == KARO
    assert "other_relations" not in NONE.to_dict()
    assert KARO.bare == dataclasses.replace(KARO, other_relations=())


def test_pages_and_studies_show_it(editor):
    before = evaluate(editor.editable, FACTS)
    _, ask = FACTS_QUESTION.ask(None, None, FACTS)
    assert ask(editor)["ada"]["relation_kl"] == 0
    editor.edit(FACTS)
    after = evaluate(editor.editable, FACTS, base=before)
    assert ask(editor) == after.rows() | {
        fact: {**row, "generation": None, "answer": None} for fact, row in after.rows().items()
    }
    rates, other = rates_tables({"before": before.summary(), "after": after.summary()})
    shown = {row["measure"]: row for row in (*rates.rows, *other.rows)}
    kept, apart = shown["relation specificity (%)"], shown["KL at other relations (nat)"]
    assert kept["before"] is None
    assert kept["after"].n == apart["after"].n == 2
    assert apart["after"].mean == pytest.approx(after.summary()["relation_kl"]["mean"])
    assert "relation specificity" in Comparison(before, after)._repr_html_()
