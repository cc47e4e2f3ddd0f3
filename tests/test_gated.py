"""Gated edits: the formula, undo to the bit, facts that do not see each other."""

import math

import pytest
import torch
from support.models import ARCHITECTURES, EXPERTS, LINES, RECIPE, build_model, statistics_of
from transformers import AutoModelForCausalLM

from nulledit import Editor
from nulledit.config import Recipe, load_recipe
from nulledit.errors import ConfigError, LedgerError, ModelError, StatisticsError
from nulledit.evaluation.preservation import preservation_report
from nulledit.export.write import write_export
from nulledit.linalg.neurons import ACTIVATIONS, UnitForm
from nulledit.methods.gates import GateSettings, TextInputs, gated_neurons, solve_columns
from nulledit.models.load import model_hash
from nulledit.runs.verify import verify

GATED = RECIPE.with_fields({"method.name": "gated", "layers": [1]})


def editor_of(model, tokenizer, recipe=GATED, **more):
    statistics = statistics_of(model, tokenizer, layers=(1,), inputs=True)
    return Editor(model, tokenizer, recipe=recipe, statistics=statistics, **more)


def bits(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.few
def test_every_architecture_is_edited_and_undone_to_the_bit(architecture, tokenizer, facts):
    model = build_model(architecture)
    before = bits(model)
    if architecture in EXPERTS:
        with pytest.raises(ModelError, match="can't be given neurons"):
            editor_of(model, tokenizer)
        return
    editor = editor_of(model, tokenizer)
    editor.edit(facts[:2])
    two = bits(model)
    editor.edit(facts[2:])
    editor.undo(*(f.id for f in facts[2:]))
    assert same_bits(bits(model), two)
    editor.redo()
    editor.restore()
    assert same_bits(bits(model), before)


def test_a_model_without_a_recipe_gets_gates_or_where_it_can_t_alphaedit(
    architecture, tokenizer, caplog
):
    recipe = Editor(build_model(architecture), tokenizer).recipe
    experts = architecture in EXPERTS
    assert recipe.method.name == ("alphaedit" if experts else "gated")
    assert recipe.layers == ((1, 2) if experts else (2,))  # of four blocks, never the last
    assert ("alphaedit in place of gated: block 2 is a mixture" in caplog.text) == experts
    assert "otherwise" not in recipe.to_dict()["method"]
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_method_that_is_named_has_no_other_in_its_place(tokenizer):
    default = load_recipe("default")
    for recipe in (default.with_fields({"method.name": "gated"}), GATED):
        with pytest.raises(ModelError, match="can't be given neurons"):
            Editor(build_model("mixtral"), tokenizer, recipe=recipe)
    assert default.with_fields({"values.steps": 3}).method == default.method
    wrong = default.with_fields({"method.otherwise": "alphaedt"})
    with pytest.raises(ConfigError, match="unknown method 'alphaedt'"):
        Editor(build_model("llama"), tokenizer, recipe=wrong)


@pytest.mark.few
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in EXPERTS])
def test_a_run_is_saved_loaded_and_gone_on_with(architecture, tokenizer, facts, tmp_path):
    model = build_model(architecture)
    base = model_hash(model)
    editor = editor_of(model, tokenizer)
    editor.edit(facts[:3])
    editor.save(tmp_path)
    edited = bits(model)
    other = Editor.load(tmp_path)
    assert same_bits(bits(other.model), edited)
    with other.base_weights():
        assert model_hash(other.model) == base
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-9, atol=1e-9)
    other.edit(facts[3:])
    editor.detach()
    editor.edit(facts[3:])
    for name, tensor in bits(model).items():
        found = other.model.state_dict()[name]
        torch.testing.assert_close(found, tensor, rtol=1e-6, atol=1e-7)  # values by descent
    other.save(tmp_path)
    assert verify(tmp_path).problems == []
    other.restore()
    other.save(tmp_path)
    assert verify(tmp_path).problems == []


def dense(inputs, targets, moment, mean, form, beta, theta, ridge, widening):
    """The formula, neuron by neuron: what the block adds at any x."""
    n = inputs.shape[1]
    phi = ACTIVATIONS[form.activation]
    C = moment + widening / n * sum(torch.outer(x, x) for x in inputs.T)
    inverse = torch.linalg.inv(C)
    directions = [inverse @ x / (x @ inverse @ x) for x in inputs.T]
    constant = torch.linalg.inv(moment) @ mean
    constant = constant / (mean @ constant)
    opening = phi(torch.tensor(beta * (1 - theta)).double())

    def unit(g, x):
        s = g @ x
        at = theta if form.biased else theta * (constant @ x)
        return phi(beta * (s - at)) * (s / opening if form.gated else 1 / opening)

    A = torch.stack([torch.stack([unit(g, x) for g in directions]) for x in inputs.T])
    r = torch.linalg.inv(A.T @ A + ridge * torch.eye(n).double()) @ A.T @ targets.T
    return lambda x: sum(unit(g, x) * row for g, row in zip(directions, r, strict=True))


@pytest.mark.parametrize("apart", [0.0, 1e-13])
@pytest.mark.parametrize("n", [2, 9, 40])
def test_without_a_ridge_facts_on_the_same_gates_share_what_is_written(n, apart):
    """Two that open every gate alike can't get two values: each gets their mean, by short columns;
    the others get their own."""
    generator = torch.Generator().manual_seed(n)
    given = torch.eye(n, dtype=torch.float64)
    given += 0.1 * torch.rand(n, n, generator=generator, dtype=torch.float64)
    given[-1], given[:, -1] = given[0].clone(), given[:, 0].clone()
    given[-1, -1] = given[0, 0]
    given[0, 0] += apart
    targets = torch.randn(5, n, generator=generator, dtype=torch.float64)
    columns, written = solve_columns(given, targets, 0.0)
    wanted = targets.clone()
    wanted[:, [0, -1]] = targets[:, [0, -1]].mean(1, keepdim=True)
    assert torch.allclose(written, wanted, atol=1e-9)
    assert torch.allclose(columns @ given, written, atol=1e-9)
    assert torch.allclose(columns[:, 0], columns[:, -1], atol=1e-9), "the shortest are alike"
    assert columns.norm() < 10 * targets.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("biased", "gated"), [(True, False), (False, False), (False, True)])
def test_neurons_are_the_formula(activation, biased, gated):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    text = drawn(7, 300) + 3 * torch.eye(7, dtype=torch.float64)[:, :1]  # a constant direction
    text[0] = 3.0
    moment, mean = text @ text.T / 300, text.mean(1)
    form, settings = UnitForm(activation, biased, gated), GateSettings(6.0, 0.3, 0.02, 0.1)
    inputs, targets = text[:, :4] * 1.1, drawn(5, 4)
    found, written = gated_neurons(inputs, targets, TextInputs(moment, mean), form, settings)
    torch.testing.assert_close(written, found.columns @ found.units(inputs, activation))
    expected = dense(inputs, targets, moment, mean, form, 6.0, 0.3, 0.02, 0.1)
    for x in text[:, :20].T:
        given = found.columns @ found.units(x[:, None], activation)[:, 0]
        torch.testing.assert_close(given, expected(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["gated", "alphaedit"])
def test_what_moved_is_what_the_edits_write_otherwise_at_the_keys(name, tokenizer, facts):
    """Over two epochs, whose first facts are asked of neurons that came after them."""
    recipe = RECIPE.with_fields({"method.name": name, "layers": [1]})
    model = build_model("llama")
    statistics = statistics_of(model, tokenizer, layers=(1,), inputs=name == "gated")
    editor = Editor(model, tokenizer, recipe=recipe, statistics=statistics)
    editor.edit(facts[:3])
    editor.next_epoch(recipe.with_fields({"values.steps": 2}), statistics=statistics)
    editor.edit(facts[3:])
    weights = editor._session.weights

    for change in (lambda: editor.undo(facts[0].id, facts[3].id), editor.redo):
        held = {column.id for column in editor.history.active}
        edit = weights.edit(1)
        report = change()
        stay = [column for column in editor.history.active if column.id in held]
        keys, _ = weights.recorded(stay, 1)
        before = edit.added(keys)
        shares = (weights.edit(1).added(keys) - before).norm(dim=0) / before.norm(dim=0)
        found = dict(report.moved)
        assert list(found) == sorted(found, key=lambda id_: -found[id_])
        assert len(found) == len(stay) >= 2
        for column, share in zip(stay, shares.tolist(), strict=True):
            assert found[column.fact.id] == pytest.approx(share, rel=1e-6, abs=1e-9)
        written = weights.written()
        again = weights.edit(1).added(weights.recorded(written.columns, 1)[0])
        torch.testing.assert_close(written.added, again)


def test_a_threshold_needs_a_constant_or_a_bias():
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(5, 400, generator=generator, dtype=torch.float64)
    moment, mean = text @ text.T / 400, text.mean(1)  # no direction is constant
    form, settings = UnitForm("silu", False, True), GateSettings()
    found, _ = gated_neurons(text[:, :2], text[:, 5:7], TextInputs(moment, mean), form, settings)
    solved = torch.linalg.solve(moment + settings.widening / 2 * text[:, :2] @ text[:, :2].T,
                                text[:, :2])  # fmt: skip
    directions = solved / (text[:, :2] * solved).sum(0)
    torch.testing.assert_close(found.rows, settings.sharpness * directions.T)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # others have parts in float32
def test_order_and_batches_mean_nothing(family, tokenizer, facts, tmp_path):
    found = []
    for batches in ([facts], [facts[2:], facts[:2]], [[f] for f in reversed(facts)]):
        model = build_model(family)
        editor = editor_of(model, tokenizer, value_cache=tmp_path)
        for batch in batches:
            editor.edit(batch, shuffle=False)
        keys = torch.randn(16, 50, generator=torch.Generator().manual_seed(1)).double()
        found.append(editor.weights.edit(1).answer(keys))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-10)


def test_a_fact_taken_out_leaves_what_the_others_alone_would_be(tokenizer, facts):
    editor = editor_of(build_model("llama"), tokenizer)
    editor.edit(facts)
    editor.undo(facts[1].id)
    alone = editor_of(build_model("llama"), tokenizer)
    alone.edit([facts[0], *facts[2:]], shuffle=False)
    inputs = torch.randn(16, 50, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(
        editor.weights.edit(1).answer(inputs), alone.weights.edit(1).answer(inputs),
        rtol=1e-5, atol=1e-8,
    )  # fmt: skip


def test_what_changed_by_hand_is_noticed(tokenizer, facts):
    editor = editor_of(build_model("llama"), tokenizer)
    editor.edit(facts[:2])
    mlp = editor.model.model.layers[1].mlp
    for matrix in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        for row in (0, -1):  # the block's own, and a neuron's
            before = matrix.weight.data[row, row].clone()
            matrix.weight.data[row, row] += 1
            with pytest.raises(LedgerError, match="was changed by something else"):
                editor.edit(facts[2:])
            matrix.weight.data[row, row] = before
    editor.edit(facts[2:])


def test_a_model_folder_that_something_else_changed_is_not_replaced(tokenizer, facts, tmp_path):
    """Every file is written anew, since the model's shape changes; what is not ours stays."""
    run, file = tmp_path / "run", tmp_path / "run/model/model.safetensors"
    editor = editor_of(build_model("llama"), tokenizer)
    editor.edit(facts[:1])
    editor.save(run)
    note = run / "model" / "of_mine" / "notes.txt"
    note.parent.mkdir()
    note.write_text("mine")
    editor.edit(facts[1:2])
    editor.save(run)
    assert note.read_text() == "mine"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.unlink()  # weights in memory may be a map of the old one
    file.write_bytes(raw)
    editor.edit(facts[2:])
    with pytest.raises(LedgerError, match=r"model\.safetensors: changed by something else"):
        editor.save(run)
    assert file.read_bytes() == raw
    assert note.read_text() == "mine"


def test_gates_are_refused_what_they_can_not_do(tokenizer, facts):
    model = build_model("llama")
    for change, words in (
        ({"method.projection": "inside"}, "gated has no projection"),
        ({"values.chunk_tokens": 3}, "gated writes whole targets"),
        ({"method.threshold": 1.0}, "threshold.*expected a share from 0, below 1"),
        ({"method.sharpness": 0}, "sharpness"),
    ):
        with pytest.raises(ConfigError, match=words):
            editor_of(model, tokenizer, GATED.with_fields(change))
    with pytest.raises(StatisticsError, match="statistics are of keys of MLPs"):
        Editor(model, tokenizer, recipe=GATED, statistics=statistics_of(model, tokenizer)).edit(
            facts
        )
    editor = editor_of(model, tokenizer)
    editor.edit(facts[:1])
    editor.next_epoch(RECIPE, statistics=statistics_of(model, tokenizer))
    with pytest.raises(ConfigError, match="can't be in one run"):
        editor.edit(facts[1:])
    other = statistics_of(build_model("llama"), tokenizer, layers=(2,), inputs=True)
    editor.next_epoch(GATED.with_fields({"layers": [2]}), statistics=other)
    with pytest.raises(ConfigError, match="this one's are in 1, the recipe names 2"):
        editor.edit(facts[1:])
    with pytest.raises(ModelError, match="MLPs of 48, 49 units; expected one width"):
        editor_of(editor.model, tokenizer)


def keep(found, _module, _args, output):
    found.append(output.detach().clone())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_preservation_is_what_the_neurons_add_on_text(family, tokenizer, facts):
    editor = editor_of(build_model(family), tokenizer)
    editor.edit(facts)
    windows = [tokenizer(line)["input_ids"] for line in LINES]
    (found,) = preservation_report(editor, windows)
    out = editor.editable.mlp_out(1)
    moved = energy = 0.0
    for window in windows:
        given = []
        handle = out.register_forward_hook(
            lambda _m, _a, o, to=given: to.append(o.detach().clone())
        )
        editor.editable.run(editor.editable.collate([window]), last=1)
        with editor.base_weights():
            editor.editable.run(editor.editable.collate([window]), last=1)
        handle.remove()
        moved += float((given[0] - given[1]).square().sum())
        energy += float(given[1].square().sum())
    assert found.error == pytest.approx((moved / energy) ** 0.5)
    editor.restore()
    assert preservation_report(editor, windows)[0].error == 0


def test_a_checkpoint_has_the_neurons(tokenizer, facts, tmp_path):
    model = build_model("llama", dtype=torch.float32)
    editor = editor_of(model, tokenizer)
    editor.edit(facts)
    found = write_export(editor, tmp_path / "whole", "checkpoint")
    assert found.layers[0].shape == (16, 48 + len(facts))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    assert plain.config.intermediate_size == 64
    ids = torch.tensor([[3, 14, 15, 92, 65]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="gated edits are neurons"):
        editor.weights.exact(1)  # there is no update of W


def test_a_further_epoch_stands_on_the_one_before(tokenizer, facts, tmp_path):
    model = build_model("llama")
    before = bits(model)
    editor = editor_of(model, tokenizer)
    editor.edit(facts[:2])
    keys, _ = editor.weights.recorded(editor.history.active, 1)
    first = editor.weights.edit(1).answer(keys)
    one = bits(model)
    again = statistics_of(build_model("llama"), tokenizer, layers=(1,), inputs=True)
    editor.next_epoch(GATED.with_fields({"method.sharpness": 8}), statistics=again)
    editor.edit(facts[2:])
    torch.testing.assert_close(editor.weights.edit(1).answer(keys), first, rtol=0.2, atol=0.05)
    both = bits(model)
    editor.save(tmp_path)
    assert same_bits(bits(Editor.load(tmp_path).model), both)
    editor.undo(*(f.id for f in facts[2:]))
    assert same_bits(bits(model), one)
    editor.redo()
    assert same_bits(bits(model), both)
    editor.restore()
    assert same_bits(bits(model), before)


def test_gates_and_an_update_of_the_same_layer_are_compared(tokenizer, facts):
    """They have nothing in common: as far apart as both are long."""
    model = build_model("llama")
    gated = editor_of(model, tokenizer)
    gated.edit(facts[:1])
    keys = statistics_of(build_model("llama"), tokenizer, layers=(1,))
    updated = Editor(
        build_model("llama"), tokenizer, recipe=RECIPE.with_fields({"layers": [1]}), statistics=keys
    )
    updated.edit(facts[1:2])
    found = gated.diff(updated)
    (layer,) = found.layers
    assert layer.first > 0
    assert layer.second > 0
    assert layer.apart == pytest.approx(math.hypot(layer.first, layer.second))
    assert [(x.first is None, x.second is None) for x in found.facts] == [
        (False, True),
        (True, False),
    ]


def test_rebuilt_and_merged_facts_are_what_they_were(tokenizer, facts, tmp_path):
    def fresh():
        return editor_of(build_model("llama"), tokenizer, value_cache=tmp_path)

    inputs = torch.randn(16, 50, generator=torch.Generator().manual_seed(1)).double()
    whole, one, other = fresh(), fresh(), fresh()
    whole.edit(facts)
    expected = whole.weights.edit(1).answer(inputs)
    whole.rebuild()
    torch.testing.assert_close(whole.weights.edit(1).answer(inputs), expected)
    one.edit(facts[:2])
    other.edit(facts[2:])
    one.merge(other.history)
    assert {f.id for f in one.facts} == {f.id for f in facts}
    torch.testing.assert_close(one.weights.edit(1).answer(inputs), expected, rtol=1e-8, atol=1e-8)


def test_weights_that_had_gradients_have_them_after_an_edit(tokenizer, facts):
    model = build_model("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    editor = editor_of(model, tokenizer)
    editor.edit(facts[:2])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    editor.restore()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
