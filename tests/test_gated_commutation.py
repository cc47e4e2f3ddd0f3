"""Gated edits commute: order, batches, detours and merges leave the same weights.

A fact's neuron is made of its own input and of all facts' targets, so what is compared is each
fact's unit with the one that it has elsewhere. In the MLP the units lie in the order in which their
facts came, which is all that differs: the function does not depend on it, state ids do.
"""

import json

import pytest
import torch
from support.cli import done, options_of, refused
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.errors import ConfigError

GATED = RECIPE.with_fields({"method.name": "gated", "layers": [1], "values.steps": 4})
MATE = Fact(id="mate", subject="Karo Dun", prompt="{} lives in", target="Velm")  # on karo's key
OLD = Fact(id="old", subject="Velm", prompt="The harbour of {} lies on the", target="coast")


@pytest.fixture
def facts(facts):
    return [*facts, MATE]


@pytest.fixture(params=["llama", pytest.param("gpt2", marks=pytest.mark.slow), "gemma3_text"])
def fresh(request, tokenizer):
    """Makes editors of one model. Gemma 2 is left out: its softmax is in float32."""
    return lambda **more: editor_of(build_model(request.param), tokenizer, **more)


def editor_of(model, tokenizer, recipe=GATED, **more):
    gated = recipe.method.name == "gated"
    statistics = statistics_of(model, tokenizer, layers=recipe.layers, inputs=gated)
    return Editor(model, tokenizer, recipe=recipe, statistics=statistics, **more)


def units(editor):
    """Of each fact in the model: its row, bias, factor and column."""
    found, columns = editor.weights.edit(1).neurons, editor.history.active
    assert len(columns) == len(found.rows)
    return {
        f"{column.fact.id} {name}": tensor[:, i] if name == "columns" else tensor[i]
        for i, column in enumerate(columns)
        for name, tensor in found.tensors().items()
    }


def same_units(editor, other):
    mine, theirs = units(editor), units(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert float((mine[name] - tensor).norm()) <= 1e-10 * float(tensor.norm()), name
    stored, of_other = (e.editable.form(1).stored(slice(None)) for e in (editor, other))
    inputs = torch.randn(16, 40, generator=torch.Generator().manual_seed(1)).double()
    activation = editor.weights.edit(1).activation
    given, expected = (u.columns @ u.units(inputs, activation) for u in (stored, of_other))
    torch.testing.assert_close(
        given, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max())
    )


def bits(editor):
    return {name: t.clone() for name, t in editor.model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


DETOURS = {
    "one batch in another order": [("edit", 4, 2, 0, 3, 1)],
    "one by one": [("edit", 0), ("edit", 1), ("edit", 2), ("edit", 3), ("edit", 4)],
    "one by one backwards": [("edit", 4), ("edit", 3), ("edit", 2), ("edit", 1), ("edit", 0)],
    "two on one key apart": [("edit", 1, 4), ("edit", 3, 2, 0)],
    "undone and back": [("edit", 1, 3, 2), ("undo", "zola"), ("edit", 4, 0), ("redo", "zola")],
    "undone and again": [
        ("edit", 0, 1, 3),
        ("undo", "karo", "ada"),
        ("edit", 4, 0),
        ("edit", 2, 3),
    ],
    "an answer replaced": [("edit", "old", 4, 1), ("edit", 3, 2, 0)],
    "a replacement undone": [("edit", 2, 4), ("edit", "old"), ("edit", 3, 0, 1), ("undo", "old")],
    "all out and back": [("edit", 3, 1), ("restore",), ("redo",), ("edit", 0, 2, 4)],
    "rebuilt": [
        ("edit", 4, 3, 2),
        ("undo", "mate"),
        ("edit", 1, 0),
        ("redo", "mate"),
        ("rebuild",),
    ],
}


def test_no_way_to_the_same_facts_matters(fresh, facts):
    direct = fresh()
    direct.edit(facts, shuffle=False)
    for story in DETOURS.values():
        editor = fresh()
        for action, *what in story:
            if action == "edit":
                chosen = [OLD if i == "old" else facts[i] for i in what]
                editor.edit(chosen, shuffle=False)
            else:
                getattr(editor, action)(*what)
        same_units(editor, direct)


def test_merged_runs_are_one_run(fresh, facts):
    direct = fresh()
    direct.edit(facts, shuffle=False)
    for parts in (((0, 1), (2, 3, 4)), ((2, 4), (3, 0, 1)), ((0, 2), (2, 3, 4, 1))):
        one, other = fresh(), fresh()
        for editor, part in zip((one, other), parts, strict=True):
            editor.edit([facts[i] for i in part], shuffle=False)
        one.merge(other.history)
        assert len(one.history.epochs) == 1
        same_units(one, direct)


def test_a_fact_added_and_undone_leaves_the_very_bits(fresh, facts):
    editor = fresh()
    before = [bits(editor)]
    for fact in facts:  # the last is on a key that is there, so both are optimised again
        editor.edit(fact)
        before.append(bits(editor))
    editor.edit(OLD)
    editor.undo("old")
    assert same_bits(bits(editor), before[-1])
    for fact, expected in zip(facts[::-1], before[-2::-1], strict=True):
        editor.undo(fact.id)
        assert same_bits(bits(editor), expected), fact.id
    assert editor.weights.edit(1).neurons is None


def test_runs_of_other_settings_are_merged_in_epochs(tokenizer, facts):
    def made(part, **more):
        editor = editor_of(build_model("llama"), tokenizer, **more)
        editor.edit(part, shuffle=False)
        return editor

    for more in ({"recipe": GATED.with_fields({"method.sharpness": 8})}, {"seed": 3}):
        one, other = made(facts[:2]), made(facts[2:], **more)
        alone = units(one)
        one.merge(other.history)
        assert [f.id for f in one.facts] == [f.id for f in facts]
        assert len(one.history.epochs) == 2
        merged = units(one)
        assert all(torch.equal(merged[name], tensor) for name, tensor in alone.items())


def test_what_can_not_be_one_run_is_not_merged(tokenizer, facts):
    gated = editor_of(build_model("llama"), tokenizer)
    gated.edit(facts[:2])
    for recipe, words in (
        (GATED.with_fields({"layers": [2]}), "this one's are in 1, the recipe names 2"),
        (RECIPE, "can't be in one run"),
    ):
        other = editor_of(build_model("llama"), tokenizer, recipe)
        other.edit(facts[2:])
        for editor, history in ((gated, other.history), (other, gated.history)):
            before, state = bits(editor), editor.history.state_id
            expected = words if editor is gated else "can't be in one run|names 1"
            with pytest.raises(ConfigError, match=expected):
                editor.merge(history)
            assert same_bits(bits(editor), before)
            assert editor.history.state_id == state


def test_the_command_merges_gated_runs(place, tmp_path):
    records = json.loads((place / "facts.json").read_text(encoding="utf-8"))
    done(
        *("stats", "make", place / "model", "--text", place / "corpus.txt", "--inputs"),
        *("--layers", "1", "--window", "64", "--out", tmp_path / "stats", "--quiet"),
    )
    gated = ("--method", "gated", "--layers", "1", "--stats", tmp_path / "stats")
    linear = ("--stats", place / "stats")
    found = {}
    for name, part, options in (
        ("one", records[:2], gated),
        ("two", records[2:], gated),
        ("whole", records, gated),
        ("linear", records[2:], linear),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(part), encoding="utf-8")
        done(
            *("edit", tmp_path / f"{name}.json", "--out", tmp_path / name, *options),
            *options_of(place)[:4],
            *("--no-shuffle", "--no-evaluate", "--quiet"),
        )
    done("merge", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both", "--quiet")
    done("verify", tmp_path / "both", "--quiet")
    for name in ("both", "whole"):
        editor = Editor.load(tmp_path / name)
        found[name] = units(editor)
        assert [f.id for f in editor.facts] == [record["id"] for record in records]
    assert found["both"].keys() == found["whole"].keys()
    for name, tensor in found["whole"].items():
        torch.testing.assert_close(found["both"][name], tensor, rtol=1e-4, atol=1e-4)
    merge = ("merge", tmp_path / "one", tmp_path / "linear", "--out", tmp_path / "x", "--quiet")
    assert "can't be in one run" in refused(*merge)
    assert not (tmp_path / "x").exists()
