"""A tiny model that really knows a small world, edited: the new facts hold, the others stay."""

import dataclasses

import pytest
import torch
from support import world
from support.editors import LASTING as RECIPE
from support.models import FAMILIES, statistics_of

from nulledit import Editor


@pytest.fixture(scope="module")
def words(worlds):
    return worlds("llama")[1]


@pytest.fixture(scope="module")
def known_worlds(worlds):
    """A fresh copy of the trained model of a family."""

    def get(family):
        trained, _ = worlds(family)
        model = type(trained)(trained.config).eval()
        model.load_state_dict(trained.state_dict())
        return model

    return get


@pytest.fixture
def make_editor(known_worlds, words):
    def make(family="llama", edited=(), by=0.0, seed=0, **changes):
        """An editor whose statistics come from texts about everyone but those `edited`.

        `by`: share of its own size by which each weight of the model is moved at random.
        """
        model = known_worlds(family)
        random = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data *= 1 + by * torch.randn(parameter.shape, generator=random)
        lines = [s for s in world.sentences() if not any(person in s for person in edited)]
        statistics = statistics_of(model, words, layers=RECIPE.layers, lines=lines)
        return Editor(
            model, words, recipe=dataclasses.replace(RECIPE, **changes), statistics=statistics
        )

    return make


@torch.no_grad()
def ask(editor, prompt):
    ids = editor.tokenizer(prompt, return_tensors="pt")["input_ids"]
    return editor.tokenizer.decode(editor.model(ids).logits[0, -1].argmax())


def everything(editor, but=()):
    """Share of the answers about all people not in `but` that are still true, in both wordings."""
    rest = [
        ask(editor, template.format(person)) == world.answer(person, relation)
        for person in world.PEOPLE
        for relation, (templates, _) in world.RELATIONS.items()
        for template in templates
        if person not in but
    ]
    return sum(rest) / len(rest)


EDITS = {"Karo Dun": "job", "Ada Velm": "home", "Mira Ostrel": "tongue", "Tolo Brask": "job"}


NORMED = {"values": dataclasses.replace(RECIPE.values, at="each")}


WORLDS = (*FAMILIES, "granite", "mixtral", "olmo2")
"""The first families, one whose W is scaled, one of experts, one where a norm follows W."""


@pytest.fixture(scope="module")
def followed():
    """By architecture, for each edited fact, whether the other wording has the new answer."""
    return {}


def edited(architecture, make_editor, followed):
    """An editor that knew its world and has the four edits, and these."""
    changes = NORMED if architecture == "olmo2" else {}
    editor = make_editor(architecture, edited=EDITS, **changes)
    assert everything(editor) == 1.0, "the model should know its world before any edit"
    facts = [world.fact(p, r, world.another(p, r)) for p, r in EDITS.items()]
    editor.edit(facts, batch_size=2, shuffle=False)
    followed[architecture] = [ask(editor, f.paraphrases[0]) == f.target for f in facts]
    return editor, facts


@pytest.mark.few("llama")
@pytest.mark.parametrize("architecture", WORLDS)
def test_new_facts_hold_and_the_others_stay(architecture, make_editor, followed):
    """What a value reaches holds. A world this small may keep one answer from every value: which
    one is an affair of its training."""
    editor, facts = edited(architecture, make_editor, followed)
    reached = [c.fact.id for c in editor.history.active if c.outcome.lead > 0.5]
    held = [fact for fact in facts if fact.id in reached]
    assert len(held) >= len(facts) - 1
    for fact in held:
        assert ask(editor, fact.render(fact.prompt)) == fact.target
    assert everything(editor, but=EDITS) >= 0.95
    first, *others = held
    editor.undo(first.id)  # in no preserved text, so the others' edits may reach what is asked
    assert ask(editor, first.render(first.prompt)) != first.target
    for fact in others:
        assert ask(editor, fact.render(fact.prompt)) == fact.target
    editor.undo(*(fact.id for fact in facts if fact != first))
    assert everything(editor) == 1.0


@pytest.mark.slow
def test_the_other_wording_follows(make_editor, followed):
    """As a rule: three of four over all worlds, since it hangs on what each has learned."""
    for architecture in WORLDS:
        if architecture not in followed:
            edited(architecture, make_editor, followed)
    heard = [ok for found in followed.values() for ok in found]
    assert sum(heard) >= 0.75 * len(heard)


def test_an_edit_holds_whatever_the_rounding(make_editor):
    """Weights moved by far more than rounding does take other paths, and hold by a margin."""
    facts = [world.fact(p, r, world.another(p, r)) for p, r in list(EDITS.items())[:2]]
    for seed in range(3):
        editor = make_editor(edited=EDITS, by=1e-3, seed=seed)
        report = editor.edit(facts)
        assert all(column.outcome.lead > 0.5 for column in report.columns)
        for fact in facts:
            assert ask(editor, fact.render(fact.prompt)) == fact.target


@pytest.mark.few(3, of="size")
@pytest.mark.parametrize("size", [3, 2, 1])
def test_three_relations_of_one_subject_hold(make_editor, size):
    """`{} works as a` and `{} speaks` begin with the subject: one key, at every layer."""
    editor = make_editor(edited=["Karo Quill"])
    facts = [world.fact("Karo Quill", r, world.another("Karo Quill", r)) for r in world.RELATIONS]
    editor.edit(facts, batch_size=size, shuffle=False)
    assert {f.id for f in editor.facts} == {f.id for f in facts}
    assert len({(c.batch, c.group) for c in editor.history.active}) == 1, "one key, one group"
    for fact in facts:
        assert ask(editor, fact.render(fact.prompt)) == fact.target


def test_undo_of_one_on_a_shared_key_rebuilds_the_others(make_editor):
    editor = make_editor(edited=["Karo Quill"])
    facts = [world.fact("Karo Quill", r, world.another("Karo Quill", r)) for r in world.RELATIONS]
    editor.edit(facts)
    report = editor.undo(facts[1].id)
    assert set(report.rebuilt) == {facts[0].id, facts[2].id}
    for fact in (facts[0], facts[2]):
        assert ask(editor, fact.render(fact.prompt)) == fact.target


def test_a_new_answer_replaces_the_older_one(make_editor):
    editor = make_editor(edited=["Ada Fenn"])
    others = [o for o in world.RELATIONS["job"][1] if o != world.answer("Ada Fenn", "job")]
    first, second = others[:2]
    old = world.fact("Ada Fenn", "job", first, id="old")
    new = world.fact("Ada Fenn", "job", second, id="new")
    editor.edit([old])
    assert ask(editor, "Ada Fenn works as a") == first
    editor.edit([new])
    assert ask(editor, "Ada Fenn works as a") == second
    assert [f.id for f in editor.facts] == ["new"]
    editor.undo("new")
    assert ask(editor, "Ada Fenn works as a") == first


def test_a_fact_the_model_holds_is_kept_and_marked(make_editor):
    editor = make_editor()
    held = dataclasses.replace(
        world.fact("Mira Nim", "home", world.another("Mira Nim", "home")),
        target=world.answer("Mira Nim", "home"),
        old_answer=None,
    )
    report = editor.edit([held])
    assert report.columns[0].outcome.known
    assert "said by the model already" in report.notices[-1]
    assert editor.facts == [held]
    assert everything(editor) == 1.0


def test_the_projection_protects(make_editor):
    """Without it the same edits at the same strength disturb more of what was sampled."""
    from nulledit.statistics.collect import key_moments

    errors = {}
    facts = [world.fact(p, "job", world.another(p, "job")) for p in world.PEOPLE[:4]]
    for value in (0.001, 0.999):
        space = dataclasses.replace(RECIPE.null_space, value=value)
        editor = make_editor(edited=world.PEOPLE[:4], null_space=space)
        rows = [editor.tokenizer(s)["input_ids"] for s in world.sentences()]
        moments = key_moments(editor.editable, rows, [1])
        editor.edit(facts)
        tensors = editor.history.tensors[editor.history.epochs[0].tensors]
        update = editor.weights.exact(1) - tensors["base.1"].double()
        norm = update.norm()
        errors[value] = float((update @ moments[1].value * update).sum().sqrt() / norm)
    assert errors[0.001] < 0.5 * errors[0.999]
