"""What gates report: how often they open on text, rivals, and what crowded gates do not hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import LINES, RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.api.run import Run
from nulledit.editing.gates import CROWDED, fact_gates, recorded_gates
from nulledit.evaluation import evaluate, gates_of, read
from nulledit.evaluation.diagnosis import diagnose
from nulledit.evaluation.opening import OPEN
from nulledit.linalg.neurons import ACTIVATIONS, Neurons, UnitForm
from nulledit.methods.gates import GateSettings, TextInputs, gated_neurons, rivals
from nulledit.runs.folder import read_run
from nulledit.runs.gate import check
from nulledit.runs.history import story_text
from nulledit.runs.limits import Limits
from nulledit.runs.tables import of_text, rates_tables

GATED = RECIPE.with_fields({"method.name": "gated", "layers": [1]})
FAMILIES = ["llama", "gpt2", "gemma2", "phi3", "opt", "granite"]


def editor_of(model, tokenizer, recipe=GATED):
    statistics = statistics_of(model, tokenizer, layers=(1,), inputs=True)
    return Editor(model, tokenizer, recipe=recipe, statistics=statistics)


def windows_of(tokenizer):
    return [tokenizer(line)["input_ids"][: 5 + 4 * i] for i, line in enumerate(LINES)]


def slowly_opened(editor, window):
    """Which gates are open [tokens, n] at the tokens of one window that predict, one at a time."""
    layer, update = editor.editable.form(1), editor.weights.edit(1)
    keys, _ = editor.weights.recorded(editor.history.active, 1)
    seen = []
    handle = layer.driven.module.register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].detach().reshape(-1, args[0].shape[-1])[-1].clone())
    )
    opened = []
    for end in range(1, len(window)):
        seen.clear()
        editor.editable.run(editor.editable.collate([window[:end]]), last=1)
        x, row = seen[-1].double(), []
        for i, key in enumerate(keys.mT.double()):
            one = update.neurons.map(lambda t, i=i: t[:, i : i + 1] if t is update.neurons.columns
                                     else t[i : i + 1])  # fmt: skip
            here, own = (float(one.units(v[:, None], update.activation)) for v in (x, key))
            row.append(here > OPEN * own)
        opened.append(row)
    handle.remove()
    return np.array(opened)


@pytest.mark.parametrize("family", FAMILIES)
def test_opening_is_what_a_slow_count_says(family, tokenizer, facts):
    editor = editor_of(build_model(family), tokenizer, GATED.with_fields({"method.threshold": 0.0}))
    editor.edit(facts)
    windows = windows_of(tokenizer)
    found = read(editor.editable, windows, gates=gates_of(editor.weights)).opening
    slow = [slowly_opened(editor, window) for window in windows]
    whole = np.concatenate(slow)
    assert 0 < whole.mean() < 1  # there was something to count
    assert found.value == pytest.approx(whole.mean())
    assert found.worst == pytest.approx(whole.mean(0).max())
    assert found.any == pytest.approx(whole.any(1).mean())
    ids = [c.fact.id for c in editor.history.active]
    assert whole.mean(0)[ids.index(found.worst_fact)] == whole.mean(0).max()
    assert (found.gates, found.units) == (len(facts), editor.editable.width(1))
    assert found.tokens == len(whole) == sum(len(window) - 1 for window in windows)
    sums, n = np.array([part.any(1).sum() for part in slow]), np.array([len(p) for p in slow])
    error = np.sqrt(5 / 4 * np.square(sums - whole.any(1).mean() * n).sum()) / n.sum()
    assert found.any_standard_error == pytest.approx(error)


def test_opening_does_not_hang_on_batches_padding_or_order(tokenizer, facts, monkeypatch):
    editor = editor_of(build_model("llama"), tokenizer)
    editor.edit(facts)
    windows, gates = windows_of(tokenizer), gates_of(editor.weights)
    together = read(editor.editable, windows, gates=gates).opening
    backwards = read(editor.editable, windows[::-1], gates=gates).opening
    monkeypatch.setitem(read.__globals__, "POSITIONS", 1)
    alone = read(editor.editable, windows, gates=gates).opening
    for other in (alone, backwards):
        assert other.worst_fact == together.worst_fact
        for name in ("value", "standard_error", "worst", "any", "any_standard_error"):
            assert getattr(other, name) == pytest.approx(getattr(together, name), rel=1e-12)


def test_watching_gates_changes_nothing_else(tokenizer, facts):
    editor = editor_of(build_model("llama"), tokenizer)
    editor.edit(facts)
    windows = windows_of(tokenizer)
    with editor.base_weights():
        assert gates_of(editor.weights) is None
        base = read(editor.editable, windows, keep=True)
    found = read(editor.editable, windows, base=base, gates=gates_of(editor.weights))
    plain = read(editor.editable, windows, base=base)
    assert plain.opening is None
    assert found.kl == plain.kl
    assert found.perplexity == plain.perplexity
    gates = gates_of(editor.weights)
    editor.undo(facts[0].id)
    with pytest.raises(ValueError, match=f"{len(facts) - 1} gates, expected {len(facts)}"):
        read(editor.editable, windows, gates=gates)


def test_both_sides_say_it_of_gated_edits_alone(tokenizer, facts, make_statistics, tmp_path):
    model = build_model("llama")
    editor = editor_of(model, tokenizer)
    editor.edit(facts)
    both = editor.evaluate()
    told = both.summary()
    assert "opening_rate" not in told["before"]
    mine = told["after"]["opening_rate"]
    assert (mine["gates"], mine["units"]) == (len(facts), 48)
    assert "tokens that open a gate" in repr(both._repr_html_())
    (table,) = (t for t in rates_tables(told, text="a text") if t.name.startswith("text"))
    row = next(r for r in table.rows if "any gate" in str(r["measure"]))
    assert row["after"].mean == pytest.approx(10_000 * mine["any"])
    assert row["before"] is None
    assert of_text(told["after"], "opening_worst") == pytest.approx(10_000 * mine["worst"])
    assert editor.weights.reports()[0].to_dict()["neurons"] == len(facts)
    model = build_model("llama")
    other = Editor(model, tokenizer, recipe=RECIPE, statistics=make_statistics(model))
    other.edit(facts[:2])
    assert "opening_rate" not in other.evaluate().summary()["after"]
    assert "neurons" not in other.weights.reports()[0].to_dict()


def test_limits_on_openings(tokenizer, facts, make_statistics):
    editor = editor_of(
        build_model("llama"), tokenizer, GATED.with_fields({"method.threshold": 0.0})
    )
    editor.edit(facts)
    windows = windows_of(tokenizer)
    names = ("opening_rate", "opening_worst", "opening_any")
    found = read(editor.editable, windows, gates=gates_of(editor.weights)).opening
    limits = Limits.from_dict({name: {"at_most": 10_000} for name in names})
    rate, worst, some = check(editor, limits, windows=windows).rows
    assert rate.found == pytest.approx(10_000 * found.value)
    assert rate.error == pytest.approx(10_000 * found.standard_error)
    assert worst.found == pytest.approx(10_000 * found.worst)
    assert worst.note == f"gate of {found.worst_fact}"
    assert some.found == pytest.approx(10_000 * found.any)
    assert some.note == f"{len(facts)} neurons beside 48"
    assert {row.unit for row in (rate, worst, some)} == {"of 10,000"}
    tight = Limits.from_dict({"opening_any": {"at_most": some.found / 2}})
    assert not check(editor, tight, windows=windows).passed
    editor.restore()
    assert "no gated edits" in check(editor, tight, windows=windows).rows[0].note


def test_a_limit_on_openings_alone_reads_the_base_not(tokenizer, facts, monkeypatch):
    editor = editor_of(build_model("llama"), tokenizer)
    editor.edit(facts)
    windows = windows_of(tokenizer)
    limits = Limits.from_dict({"opening_any": {"at_most": 10_000}})
    monkeypatch.setattr(type(editor), "base_weights", None)
    assert check(editor, limits, windows=windows).passed


# -- rivals ------------------------------------------------------------------------------------


def drawn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("gated", [True, False])
def test_rivals_are_the_dense_formula(gated):
    text = drawn(9, 400)
    text[0] = 3.0  # a constant direction
    text_inputs = TextInputs(text @ text.T / 400, text.mean(1))
    form, settings = UnitForm("silu" if gated else "gelu", not gated, gated), GateSettings(4.0, 0.2)
    inputs = text[:, :7] + 0.3 * text[:, [0, 0, 2, 2, 4, 4, 6]]
    made, _ = gated_neurons(inputs, drawn(5, 7, seed=1), text_inputs, form, settings)
    owners = torch.tensor([0, 1, 2, 3, 4, 4, 5])
    nearest, shares = rivals(made.units(inputs, form.activation).mT, owners)
    phi = ACTIVATIONS[form.activation]

    def gives(j, x):
        driven = phi(made.rows[j] @ x + (made.biases[j] if made.biases is not None else 0.0))
        return driven * (made.factors[j] @ x) if gated else driven

    own = [gives(j, inputs[:, j]) for j in range(7)]
    for i in range(7):
        found = {
            j: max(gives(j, inputs[:, i]) / own[j], gives(i, inputs[:, j]) / own[i])
            for j in range(7)
            if owners[j] != owners[i]
        }
        best = max(found, key=found.get)
        assert int(nearest[i]) == best
        assert float(shares[i]) == pytest.approx(float(found[best]))


def test_one_fact_has_no_rival(tokenizer, facts):
    editor = editor_of(build_model("llama"), tokenizer)
    assert fact_gates(editor.weights) == []
    editor.edit(facts[:1])
    (gate,) = fact_gates(editor.weights)
    assert (gate.rival, gate.share, gate.crowded) == (None, 0.0, False)
    assert gate.missed == pytest.approx(1 - 1 / 1.05, abs=0.01)  # the ridge alone


SUBJECTS = ("Ada Byron", "Émile Zola", "Karo Dun", "Velm", "Ostrel", "Paris", "London", "the sea")
RELATIONS = ("{} lives in", "{} speaks", "{} works as a")
ANSWERS = ("Velm", "English", "baker", "Paris", "Ostrel", "winter", "sea", "town")


def of_one_subject(subjects=SUBJECTS, relations=RELATIONS):
    """Facts of each subject by several relations, each with an answer of its own."""
    return [
        Fact(
            id=f"{i}-{j}", subject=subject, prompt=f"Then, {relation}",
            target=ANSWERS[(3 * i + j) % len(ANSWERS)],
        )
        for i, subject in enumerate(subjects)
        for j, relation in enumerate(relations)
    ]  # fmt: skip


def test_relations_of_one_subject_share_a_value_and_are_no_rivals(tokenizer):
    facts = of_one_subject()
    editor = editor_of(build_model("llama"), tokenizer)
    editor.edit(facts[::2], shuffle=False)
    editor.edit(facts[1::2], shuffle=False)
    gates = fact_gates(editor.weights)
    assert len(gates) == len(facts) == 24
    for gate in gates:
        assert gate.fact_id.split("-")[0] != gate.rival.split("-")[0]
    groups = {}
    for column in editor.history.active:
        groups.setdefault((column.batch, column.group), set()).add(column.fact.id)
    by_subject = [{f"{i}-{j}" for j in range(3)} for i in range(8)]
    assert sorted(groups.values(), key=min) == by_subject  # whatever call they came in
    keys, targets = editor.weights.recorded(editor.history.active, 1)
    given = editor.weights.edit(1).answer(keys)
    sizes = targets.norm(dim=0)  # of some the model says already they are nought
    missed = (given - targets).norm(dim=0) / sizes.clamp_min(0.1 * float(sizes.median()))
    assert [gate.missed for gate in gates] == pytest.approx(missed.tolist(), abs=1e-6)


def test_crowded_facts_are_named_with_their_rivals(tokenizer):
    facts = of_one_subject()
    apart = GATED.with_fields({"same_key": 1.0})  # only rounding has two facts share a value
    editor = editor_of(build_model("llama"), tokenizer, apart)
    report = editor.edit(facts, shuffle=False)
    gates = fact_gates(editor.weights)
    twins = [gate for gate in gates if gate.share > 0.99]
    assert len(twins) > 12
    assert all(gate.fact_id.split("-")[0] == gate.rival.split("-")[0] for gate in twins)
    crowded = [gate for gate in gates if gate.crowded]
    assert crowded == [gate for gate in twins if gate.missed > CROWDED]
    assert len(crowded) > 12  # two values or more at one key, of which none is held
    worst = max(crowded, key=lambda gate: gate.missed)
    (notice,) = (n for n in report.notices if "open on each other's facts" in n)
    assert f"{worst.fact_id} beside {worst.rival} (share 1.00" in notice
    assert f"and {len(crowded) - 5} more" in notice
    assert "nulledit locate --by cost" in notice
    after = evaluate(editor.editable, facts)
    found = {d.fact_id: d for d in diagnose(editor, facts, after)}
    told = found[worst.fact_id]
    (cause,) = (c for c in told.causes if c.name == "gate")
    assert worst.rival in cause.text
    assert told.remedy in notice
    others = editor_of(build_model("llama"), tokenizer).edit(facts, shuffle=False)
    assert not any("open on each other's" in notice for notice in others.notices)


@pytest.mark.parametrize("near", [1e-3, 0.1, 2.0])
def test_dozens_of_pairs_are_held_as_far_as_gates_tell_them_apart(near):
    d, pairs = 96, 40
    text = drawn(d, 4000)
    text[0] = 3.0
    text_inputs = TextInputs(text @ text.T / 4000, text.mean(1))
    first = drawn(d, pairs, seed=1)
    second = first + near * drawn(d, pairs, seed=2)
    inputs = torch.stack([first, second], dim=2).reshape(d, 2 * pairs)
    inputs[0] = 3.0
    form, targets = UnitForm("silu", False, True), drawn(32, 2 * pairs, seed=3)
    made, _ = gated_neurons(inputs, targets, text_inputs, form, GateSettings())
    activations = made.units(inputs, form.activation).mT
    nearest, shares = rivals(activations, torch.arange(2 * pairs))
    twin = torch.arange(2 * pairs).reshape(pairs, 2).flip(1).reshape(-1)
    missed = (made.columns @ activations.mT - targets).norm(dim=0) / targets.norm(dim=0)
    if near < 1:
        assert torch.equal(nearest, twin)
    if near == 1e-3:  # one key, two values: the mean of both, at neither
        assert float(shares.min()) > 0.98
        assert CROWDED < float(missed.median())
        mean = targets.reshape(-1, pairs, 2).mean(2).repeat_interleave(2, dim=1)
        torch.testing.assert_close(made.columns @ activations.mT, mean, rtol=0.05, atol=0.15)
    if near > 1:
        assert float(missed.max()) < CROWDED


def test_rivals_do_not_hang_on_order_or_batches(tokenizer, tmp_path):
    within = tuple(subject.split()[-1] for subject in SUBJECTS if " " in subject)  # contained
    facts = of_one_subject((*SUBJECTS, *within), RELATIONS[:1])
    facts += [replace(f, id=f"{f.id}-first", prompt="{} is") for f in facts]  # the first token
    found = []
    for batches in ([facts], [facts[5:], facts[:5]], [[f] for f in reversed(facts)]):
        model = build_model("llama")
        statistics = statistics_of(model, tokenizer, layers=(1,), inputs=True)
        editor = Editor(model, tokenizer, recipe=GATED, statistics=statistics, value_cache=tmp_path)
        for batch in batches:
            editor.edit(batch, shuffle=False)
        gates = sorted(fact_gates(editor.weights), key=lambda gate: gate.fact_id)
        found.append(gates)
    for other in found[1:]:
        assert [gate.rival for gate in other] == [gate.rival for gate in found[0]]
        for name in ("share", "missed"):
            values = [getattr(gate, name) for gate in other]
            assert values == pytest.approx([getattr(g, name) for g in found[0]], rel=1e-4)


def test_the_ledger_alone_tells_a_fact_of_its_rival(tokenizer, tmp_path):
    facts = of_one_subject(relations=RELATIONS[:1])
    editor = editor_of(build_model("llama"), tokenizer)
    assert recorded_gates(editor.history) == []
    editor.edit(facts)
    editor.save(tmp_path)
    mine = {gate.fact_id: gate for gate in fact_gates(editor.weights)}
    for fact in facts[:3]:
        told = editor.show(fact.id)["gate"]
        assert told["rival"] == mine[fact.id].rival
        assert told["share"] == pytest.approx(mine[fact.id].share, rel=1e-6)
        assert told["missed"] == pytest.approx(mine[fact.id].missed, rel=1e-6)
        assert f"nearest rival {told['rival']} (share" in story_text(editor.show(fact.id))
    editor.undo(facts[0].id)
    assert "gate" not in editor.show(facts[0].id)


def test_each_at_its_own_input_is_the_diagonal():
    for gated, biased in ((True, False), (False, True), (True, True)):
        biases = drawn(6, seed=1) if biased else None
        factors = drawn(6, 4, seed=2) if gated else None
        made = Neurons(drawn(6, 4), biases, factors, drawn(3, 6, seed=3))
        inputs = drawn(4, 6, seed=4)
        found = made.at_own(inputs, "silu")
        torch.testing.assert_close(found, made.units(inputs, "silu").diagonal())


def test_a_run_has_it_on_its_pages(tokenizer, facts, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(LINES * 8), encoding="utf-8")
    folder = tmp_path / "run"
    run = Run(folder, editor_of(build_model("llama"), tokenizer))
    run.edit(facts[:3], text=str(text))
    (call,) = read_run(folder, "run").summary["runs"]
    told = call["after"]["opening_rate"]
    assert (told["gates"], told["units"]) == (3, 48)
    assert told["worst_fact"] in {fact.id for fact in facts[:3]}
    assert "opening_rate" not in call["before"]
    assert call["layers"][0]["neurons"] == 3
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert "3 beside 48" in page
    assert "tokens that open any gate (of 10,000)" in page
    assert "tokens that open any gate" in run.report().read_text(encoding="utf-8")
    seen = run.preview(facts[3:], text=str(text)).to_dict()
    assert seen["asked"]["before"]["opening_rate"]["gates"] == 3
    assert seen["asked"]["after"]["opening_rate"]["gates"] == len(facts)
    assert [layer["neurons"] for layer in seen["layers"]["after"]] == [len(facts)]
