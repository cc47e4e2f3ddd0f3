"""NAS against a plain derivation in float64: whole runs of the model, hooks on blocks and MLPs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor
from nulledit.editing import norm_anchor
from nulledit.editing.norm_anchor import anchored, mean_length, sample
from nulledit.editing.values import optimise_values
from nulledit.errors import StatisticsError
from nulledit.models.layouts import frozen

LAYER = RECIPE.layers[-1]
ANCHORED = RECIPE.with_fields({"values.norm_anchor": True})
CONTEXTS = RECIPE.contexts.texts
FAMILIES = ("llama", "gptj", "granite", "mixtral")


@pytest.fixture
def make(tokenizer):
    def editor(family="llama", recipe=ANCHORED, **given):
        model = build_model(family)
        statistics = statistics_of(model, tokenizer)
        return Editor(model, tokenizer, recipe=recipe, statistics=statistics, **given)

    return editor


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A sample that is quick to optimise, and a cache of the test's own."""
    monkeypatch.setenv("NULLEDIT_CACHE", str(tmp_path))
    facts = sample()[:5]
    monkeypatch.setattr(norm_anchor, "sample", lambda: facts)
    return facts


def mlp_of(model):
    block = model.get_submodule("model.layers" if hasattr(model, "model") else "transformer.h")
    return block[LAYER], getattr(block[LAYER], "mlp", None)


def standing(editor, fact, *, add=None, context="{}", target=""):
    """h after the block and what the MLP adds to it, at the subject's last token; logits and ids.

    `add` goes to h, in a run of the whole model.
    """
    model, tokenizer = editor.model, editor.tokenizer
    before = context.replace("{}", fact.prompt).split("{}")[0] + fact.subject
    text = context.replace("{}", fact.prompt).replace("{}", fact.subject)
    last = len(tokenizer(before)["input_ids"]) - 1
    ids = torch.tensor([tokenizer(text + target)["input_ids"]])
    block, mlp = mlp_of(model)
    seen = {}

    def keep(name):
        def hook(_module, _args, output):
            states = output[0] if isinstance(output, tuple) else output
            if name == "h" and add is not None:
                states = states.clone()
                states[0, last] += add
                output = (states, *output[1:]) if isinstance(output, tuple) else states
            seen[name] = states[0, last]
            return output

        return hook

    handles = [block.register_forward_hook(keep("h")), mlp.register_forward_hook(keep("v"))]
    try:
        with torch.no_grad():
            logits = model(ids).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    multiplier = getattr(model.config, "residual_multiplier", 1.0)
    return seen["h"], multiplier * seen["v"], logits, ids[0]


def plain_values(editor, facts, contexts):
    with frozen(editor.model):
        return optimise_values(
            editor.editable,
            facts,
            range(len(facts)),
            layers=[LAYER],
            contexts=contexts,
            settings=RECIPE.values,
            positions=4096,
        )


def plain_length(editor, facts):
    lengths = []
    for fact, value in zip(facts, plain_values(editor, facts, ("{}",)), strict=True):
        h, v, *_ = standing(editor, fact)
        lengths.append(float((value.z - h + v).norm()))
    return sum(lengths) / len(lengths)  # too few for one to be left out


def plain_nll(editor, fact, delta):
    target, found = " " + fact.target, []
    for context in CONTEXTS:
        *_, logits, ids = standing(editor, fact, add=delta, context=context, target=target)
        n = len(editor.tokenizer(target)["input_ids"])
        found.append(F.cross_entropy(logits[-n - 1 : -1], ids[-n:]))
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_w_gives_is_scaled_and_outcomes_are_of_what_is_written(make, few, facts, family):
    editor, twin = make(family), make(family, RECIPE)
    length = plain_length(twin, few)
    editor.edit(facts[:2], shuffle=False)
    columns = editor.history.active
    plain = plain_values(twin, facts[:2], CONTEXTS)
    for column, fact, value in zip(columns, facts[:2], plain, strict=True):
        h, v, *_ = standing(twin, fact)
        v_star = value.z - (h - v)
        assert v_star.norm() < 2 * length, "the case below is another test's"
        expected = (h - v) + v_star * (length / v_star.norm())
        z = editor.history.column_tensor([column], "z")[0]
        assert torch.allclose(z, expected, atol=1e-8)
        delta = z - h
        assert math.isclose(column.outcome.delta_share, delta.norm() / h.norm(), rel_tol=1e-6)
        assert math.isclose(column.outcome.nll, plain_nll(twin, fact, delta), rel_tol=1e-6)
        assert abs(column.outcome.nll - value.outcome.nll) > 1e-4
        assert column.outcome.loss > column.outcome.nll


def test_the_sample_is_of_the_unedited_model_and_v_of_the_edited_one(make, few, facts):
    editor, twin = make(), make()
    length = plain_length(twin, few)
    editor.edit(facts[:2], shuffle=False)
    plain = plain_values(editor, facts[2:3], CONTEXTS)[0]
    h, v, *_ = standing(editor, facts[2])
    editor.edit(facts[2:3])
    v_star = plain.z - (h - v)
    z = editor.history.column_tensor(editor.history.active[-1:], "z")[0]
    assert torch.allclose(z, (h - v) + v_star * (length / v_star.norm()), atol=1e-8)


def test_a_value_does_not_depend_on_its_neighbours(make, few, facts):
    alone, together = make(), make()
    alone.edit(facts[:1], shuffle=False)
    together.edit(facts, shuffle=False)
    one = alone.history.column_tensor(alone.history.active, "z")
    both = together.history.column_tensor(together.history.active[:1], "z")
    assert torch.allclose(one, both, atol=1e-9)


def test_where_v_is_too_long_nothing_is_written(make, few, facts, monkeypatch):
    editor = make()
    monkeypatch.setattr(norm_anchor, "mean_length", lambda lengths: 0.4 * min(lengths))
    report = editor.edit(facts[:2], shuffle=False)
    assert any(note.startswith("norm anchor: 2 of 2 values") for note in report.notices)
    for column in editor.history.active:
        assert column.outcome.delta_share < 1e-12
    for layer in editor.recipe.layers:
        written = editor._session.weights.exact(layer) - editor._session.weights.base(layer)
        assert written.norm() < 1e-9


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_after_a_norm_the_value_is_w_s_own_output(make, few, facts, family):
    editor = make(family)
    editor.edit(facts[:2], shuffle=False)
    for layer in editor.recipe.layers:
        z = editor.history.column_tensor(editor.history.active, f"z.{layer}")
        lengths = z.norm(dim=1)
        assert torch.allclose(lengths, lengths.mean().expand(2), rtol=1e-9)


@pytest.mark.parametrize("changes", [{"values.at": "each"}, {"method.name": "nse"}])
def test_every_way_to_values_can_be_anchored(make, few, facts, changes):
    editor = make(recipe=ANCHORED.with_fields(changes))
    editor.edit(facts[:2])
    editor.edit(facts[2:])
    assert all(math.isfinite(c.outcome.nll) for c in editor.history.active)


def test_the_length_is_measured_once_and_kept_with_what_it_depends_on(
    make, few, facts, monkeypatch, tmp_path
):
    make().edit(facts[:1])
    (file,) = tmp_path.glob("statistics/*/value-length-*.json")
    kept = json.loads(file.read_text())
    assert (kept["layer"], kept["facts"]) == (LAYER, len(few))

    def refuse(*_args, **_kwargs):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(norm_anchor, "value_lengths", refuse)
        make().edit(facts[:1])
        with pytest.raises(AssertionError):
            make(recipe=ANCHORED.with_fields({"values.steps": 3})).edit(facts[:1])
    file.write_text('{"length": -1.0}')
    with pytest.raises(StatisticsError, match="delete the file"):
        make().edit(facts[:1])


def test_the_shipped_sample_leaves_its_longest_out():
    assert len(sample()) == 25
    lengths = [1.0] * 38 + [50.0, 70.0]
    assert mean_length(lengths) == 1.0
    assert mean_length([1.0, 2.0, 6.0]) == 3.0


NUMBERS = st.lists(st.floats(-5, 5), min_size=4, max_size=4).map(
    lambda row: torch.tensor(row, dtype=torch.float64)
)


@given(NUMBERS, NUMBERS, NUMBERS, st.floats(0.1, 20))
def test_v_has_the_length_or_delta_is_dropped(z, hidden, added, length):
    v = z - hidden + added
    found = anchored(z, hidden, added, length)
    assert (found is None) == (v.norm() > 2 * length)
    if found is not None and v.norm() > 1e-6:
        scaled = found - hidden + added
        assert math.isclose(scaled.norm(), length, rel_tol=1e-6)
        assert F.cosine_similarity(scaled, v, dim=0) > 1 - 1e-9
