"""Gates: what they find is what slow evaluation finds, nothing more is run, and no doubt passes."""

import copy
import json
import math
import re
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from support import world
from support.models import statistics_of

from nulledit import Editor, Fact
from nulledit.cli.check import check as check_command
from nulledit.cli.main import Root
from nulledit.config import Recipe
from nulledit.editing.weights import LayerReport
from nulledit.errors import ConfigError
from nulledit.evaluation.capability import capability, compare
from nulledit.evaluation.hidden_norms import edit_rows, text_rows
from nulledit.evaluation.reading import perplexity
from nulledit.evaluation.runner import evaluate
from nulledit.evaluation.stats import Rate, perplexity_growth
from nulledit.evaluation.tasks import read_tasks
from nulledit.io.text import percent
from nulledit.models.layouts import as_out_in
from nulledit.runs import warnings as warn_module
from nulledit.runs.gate import Found, _judged, check
from nulledit.runs.gate_report import GateReport, Row, gate_table
from nulledit.runs.limits import KINDS, Limits, Most, load_limits
from nulledit.runs.warnings import warnings_of

RECIPE = Recipe.from_dict(
    {
        "layers": [0, 1],
        "values": {"steps": 8, "learning_rate": 0.2, "weight_decay": 1.0, "clamp": 3.0},
        "contexts": {"texts": ["{}", "then he said . {}"]},
        "null_space": {"rule": "leakage", "value": 0.05},
        "method": {"l2": 1e-3},
    }
)
FACTS = [world.fact(p, "job", world.another(p, "job")) for p in world.PEOPLE[:5]]


@pytest.fixture(scope="module")
def make_editor(worlds):
    known, words = worlds("llama")
    statistics = statistics_of(known, words, layers=(0, 1), lines=world.sentences())

    def make(facts=FACTS, **changes):
        recipe = RECIPE.with_fields(changes)
        editor = Editor(copy.deepcopy(known), words, recipe=recipe, statistics=statistics)
        if facts:
            editor.edit(facts, shuffle=False)
        return editor

    return make


@pytest.fixture(scope="module")
def editor(make_editor):
    return make_editor()


@pytest.fixture(scope="module")
def windows(worlds):
    words = worlds("llama")[1]
    ids = words(" ".join(world.sentences()))["input_ids"]
    return [ids[i * 40 : i * 40 + 40 - i % 3] for i in range(6)]  # of several lengths


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name in ("sst2", "cola"):
        pairs = [(f"{p} speaks Latin", i % 2) for i, p in enumerate(world.PEOPLE)]
        lines = [json.dumps({"sentence": s, "label": y}) for s, y in pairs]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def limits(**bounds):
    return Limits.from_dict(bounds)


def row_of(editor, name, bound, **given):
    (row,) = check(editor, limits(**{name: bound}), **given).rows
    return row


# -- what is found -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["efficacy", "generalization", "specificity"])
@pytest.mark.parametrize("way", ["", "_strict"])
def test_rates_are_those_of_an_evaluation(editor, kind, way):
    slow = evaluate(editor.editable, FACTS, generate=False).rates[kind + way]
    row = row_of(editor, kind + way, {"at_least": 0})
    assert (row.found, row.n, row.over) == (pytest.approx(100 * slow.mean), slow.n, "facts")
    assert row.error == pytest.approx(100 * slow.standard_error)


@pytest.mark.parametrize("way", ["", "_strict"])
def test_a_drop_is_paired_over_facts(editor, way):
    with editor.base_weights():
        before = evaluate(editor.editable, FACTS, generate=False).rows()
    after = evaluate(editor.editable, FACTS, generate=False).rows()
    moved = [before[f.id][f"specificity{way}"] - after[f.id][f"specificity{way}"] for f in FACTS]
    row = row_of(editor, f"specificity{way}_drop", {"at_most": 100})
    slow = Rate.of(moved)
    assert row.found == pytest.approx(100 * slow.mean)
    assert row.error == pytest.approx(100 * slow.standard_error)


def test_the_oldest_cohort_is_those_edited_first(editor):
    rows = evaluate(editor.editable, FACTS, generate=False).rows()
    for first in (1, 3, 50):
        row = row_of(editor, "oldest_cohort", {"at_least": 0, "first": first})
        held = [rows[f.id]["efficacy_strict"] for f in editor.facts[:first]]
        assert row.found == pytest.approx(100 * sum(held) / len(held))
        assert row.n == min(first, len(FACTS))


def test_facts_to_forget_are_no_cohort(make_editor):
    gone = FACTS[0].forgotten(FACTS[0].old_answer)
    editor = make_editor([gone, *FACTS[1:3]])
    row = row_of(editor, "oldest_cohort", {"at_least": 1.5, "first": 1})
    assert (row.n, editor.facts[0].forget) == (1, True)
    alone = make_editor([gone])
    for name in ("oldest_cohort", "efficacy", "generalization_strict"):
        row = row_of(alone, name, {"at_least": 1.5})
        assert row.note == "all facts are to be forgotten"


def test_growth_of_perplexity_is_the_ratio_with_a_paired_error(editor, windows):
    with editor.base_weights():
        before = perplexity(editor.editable, windows)
    after = perplexity(editor.editable, windows)
    row = row_of(editor, "perplexity_growth", {"at_most": 1e6}, windows=windows)
    assert row.found == pytest.approx(100 * (after.value / before.value - 1), rel=1e-4)
    assert (row.n, row.over) == (6, "windows")
    shares = [side.standard_error / side.value for side in (before, after)]
    apart = 100 * math.hypot(*shares) * after.value / before.value
    assert 0 < row.error < apart, "the same windows in both models"


def test_the_error_of_a_growth_is_that_of_its_mean_difference():
    draw = torch.Generator().manual_seed(0)
    before = torch.rand(12, generator=draw).double() + 3
    moved = 0.05 * torch.rand(12, generator=draw).double()
    losses = [[np.full(8, float(x)) for x in side] for side in (before, before + moved)]
    found = perplexity_growth(*losses)
    assert found.percent == pytest.approx(100 * (math.exp(moved.mean()) - 1))
    alone = float(moved.std() / 12**0.5)
    assert found.standard_error == pytest.approx(100 * math.exp(moved.mean()) * alone)


def test_kl_is_that_of_an_evaluation_and_holds_or_not(editor, windows):
    with editor.base_weights():
        before = evaluate(editor.editable, [], windows=windows)
    slow = evaluate(editor.editable, [], windows=windows, base=before).kl
    row = row_of(editor, "kl", {"at_most": 1.01 * slow.value}, windows=windows)
    assert (row.found, row.error) == (pytest.approx(slow.value), pytest.approx(slow.standard_error))
    assert (row.n, row.over, row.unit, row.verdict) == (6, "windows", "mnat", "ok")
    assert row.note == f"{100 * slow.worst_share:.0f} % of it in the worst 1 %"
    cells = list(gate_table(GateReport((row,))).rows[0].values())
    assert cells[2].endswith(" mnat")
    assert cells[4].endswith(" mnat")
    narrow = {"at_most": 1.01 * slow.value, "confident": True}
    assert row_of(editor, "kl", narrow, windows=windows).verdict == "FAILED"
    assert row_of(editor, "kl", {"at_most": 0.99 * slow.value}, windows=windows).verdict == "FAILED"
    assert row_of(editor, "kl", {"at_most": 5}, windows=[[3]]).verdict == "FAILED"


def test_a_task_s_drop_is_the_paired_loss_of_the_right_answer(editor, tasks):
    names = ("sst2", "cola")
    items = read_tasks(tasks, names=names, limit=6)
    with editor.base_weights():
        before = capability(editor.editable, items)
    after = capability(editor.editable, items)
    moved = compare(before, after)
    bound = {"at_most": 100, "tasks": list(names), "items": 6}
    report = check(editor, limits(capability_drop=bound), tasks=tasks)
    assert [row.name for row in report.rows] == ["capability_drop sst2", "capability_drop cola"]
    for row, name in zip(report.rows, names, strict=True):
        assert row.found == pytest.approx(-100 * moved[name][0])
        assert (row.n, row.over) == (6, "items")


def test_weights_are_told_of_their_worst_layer(editor):
    reports = editor.weights.reports()
    norm = row_of(editor, "norm_growth", {"at_most": 1e9})
    room = row_of(editor, "room_left", {"at_least": 0})
    leak = row_of(editor, "leakage", {"at_most": 100})
    shares = {
        layer: float(
            (editor.weights.exact(layer) - editor.weights.base(layer)).norm()
            / editor.weights.base(layer).norm()
        )
        for layer in (0, 1)
    }
    worst = max(shares, key=shares.get)
    assert (norm.found, norm.note) == (pytest.approx(100 * shares[worst]), f"layer {worst}")
    assert room.found == pytest.approx(100 * min(r.room for r in reports))
    assert 0 < leak.found <= 5.0 + 1e-6, "the recipe bounds it"
    assert (norm.error, norm.n) == (None, None), "no estimate"


def test_hidden_growth_is_that_of_the_whole_model_s_states(editor, windows):
    def norms(rows):
        found = []
        for ids in rows:
            with torch.no_grad():
                out = editor.model(torch.tensor([list(ids)]), output_hidden_states=True)
            found.append(out.hidden_states[2][0, -1].double().norm())  # after block 1
        return torch.stack(found)

    rows = edit_rows(editor.editable, FACTS)
    ends = [editor.tokenizer(f.prompt.split("{}")[0] + f.subject)["input_ids"] for f in FACTS]
    assert [list(row) for row in rows] == ends
    for name, asked in (("hidden_growth", rows), ("hidden_growth_text", text_rows(windows))):
        with editor.base_weights():
            before = norms(asked)
        slow = norms(asked) / before - 1
        row = row_of(editor, name, {"at_most": 1e9}, windows=windows)
        assert row.found == pytest.approx(100 * float(slow.mean()), rel=1e-3, abs=1e-3)
        assert row.n == len(asked)


def test_windows_are_cut_into_whole_pieces():
    assert text_rows([list(range(10)), [1, 2]], piece=4) == [(0, 1, 2, 3), (4, 5, 6, 7), (1, 2)]


# -- nothing more is run, nothing is changed -----------------------------------------------------


@pytest.fixture
def no_passes(editor, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a forward pass")

    for block in editor.model.modules():
        monkeypatch.setattr(block, "forward", refuse)


def test_limits_on_weights_take_no_forward_pass(editor, no_passes):
    asked = limits(
        norm_growth={"at_most": 1e9}, leakage={"at_most": 100}, room_left={"at_least": 0}
    )
    assert check(editor, asked).passed
    with pytest.raises(AssertionError, match="a forward pass"):
        row_of(editor, "efficacy", {"at_least": 0})


def test_only_the_kinds_asked_for_are_asked(editor, monkeypatch):
    asked = []
    real = check.__globals__["score"]

    def counting(model, queries, **more):
        asked.append([q.kind for q in queries])
        return real(model, queries, **more)

    monkeypatch.setitem(check.__globals__, "score", counting)
    row_of(editor, "efficacy_strict", {"at_least": 0})
    row_of(editor, "oldest_cohort", {"at_least": 0})
    assert [set(kinds) for kinds in asked] == [{"efficacy"}] * 2, "and of the base model nothing"
    asked.clear()
    check(editor, limits(specificity={"at_least": 0}, specificity_drop={"at_most": 100}))
    assert [set(kinds) for kinds in asked] == [{"specificity"}] * 2, "once in each model"


def test_a_folder_of_tasks_that_is_given_is_there(editor, tmp_path):
    """Also where no limit reads it, or one that is optional."""
    optional = {"at_most": 100, "optional": True}
    for bounds in (limits(leakage={"at_most": 100}), limits(capability_drop=optional)):
        with pytest.raises(ConfigError, match="typo: no such folder"):
            editor.check(bounds, tasks=tmp_path / "typo")


def test_a_check_changes_nothing(editor, windows, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {k: v.clone() for k, v in editor.model.state_dict().items()}
    events = len(editor.history.events)
    every = load_limits().to_dict() | {"efficacy": {"at_least": 0}}
    every["capability_drop"] = {"at_most": 100, "tasks": ["sst2"], "items": 2}
    check(editor, Limits.from_dict(every), windows=windows, tasks=tasks)
    assert all(v.equal(before[k]) for k, v in editor.model.state_dict().items())
    assert len(editor.history.events) == events
    assert list(tmp_path.iterdir()) == []


# -- verdicts ------------------------------------------------------------------------------------


def verdict(found, **bound):
    name = "efficacy" if "at_least" in bound else "specificity_drop"
    return _judged(name, limits(**{name: bound}).bounds[name], found).verdict


@pytest.mark.parametrize(
    ("found", "bound", "expected"),
    [
        (Found(80.0, 2.0, 50, "facts"), {"at_least": 80}, "ok"),
        (Found(79.9, 2.0, 50, "facts"), {"at_least": 80}, "FAILED"),
        (Found(5.0, 2.0, 50, "facts"), {"at_most": 5}, "ok"),
        (Found(5.1, 2.0, 50, "facts"), {"at_most": 5}, "FAILED"),
        (Found(84.0, 2.0, 50, "facts"), {"at_least": 80, "confident": True}, "ok"),
        (Found(83.0, 2.0, 50, "facts"), {"at_least": 80, "confident": True}, "FAILED"),
        (Found(1.0, 2.0, 50, "facts"), {"at_most": 5, "confident": True}, "ok"),
        (Found(2.0, 2.0, 50, "facts"), {"at_most": 5, "confident": True}, "FAILED"),
        (Found(math.nan, math.nan, 50, "facts"), {"at_least": 0}, "FAILED"),
        (Found(math.nan, math.nan, 50, "facts"), {"at_most": 1e9}, "FAILED"),
        (Found(math.inf, math.nan, 50, "facts"), {"at_most": 1e9}, "FAILED"),
        (Found(100.0, math.nan, 1, "facts"), {"at_least": 80}, "ok"),
        (Found(100.0, math.nan, 1, "facts"), {"at_least": 80, "confident": True}, "FAILED"),
    ],
)
def test_verdicts(found, bound, expected):
    assert verdict(found, **bound) == expected


@pytest.mark.parametrize(
    ("found", "limit", "text"),
    [
        (0.044, 0.04, "0.044"),
        (97.46, 90, "97.5"),
        (4.96, 5, "4.96"),
        (5, 5, "5.0"),
        (-0.01, 1, "0.0"),
    ],
)
def test_a_number_shows_on_which_side_of_its_limit_it_is(found, limit, text):
    row = _judged("kl", Most(at_most=limit), Found(found, 0.0, 9, "windows"), "%")
    (shown,) = gate_table(GateReport((row,), "limits")).rows
    assert text in " ".join(map(str, shown.values())).split()


def test_bounds_of_a_rate_are_within_its_ends_and_name_their_unit():
    few, ends = Rate.of([1.0, 0.0, 0.0]), (0.0, 100.0)
    least = limits(efficacy={"at_least": 80, "confident": True}).bounds["efficacy"]
    low = _judged("efficacy", least, Found.of(few, "facts", shares=True, ends=ends))
    assert low.note == "95 % bound 0.0 %"
    most = limits(kl={"at_most": 20, "confident": True}).bounds["kl"]
    kl = _judged("kl", most, Found(19.0, 2.0, 9, "windows"), "mnat")
    assert kl.note == "95 % bound 22.3 mnat"
    cells = " ".join(map(str, gate_table(GateReport((kl,), "limits")).rows[0].values()))
    assert "≤ 20 mnat at 95 %" in cells
    one = Rate.of([1.0])  # has no standard error
    alone = _judged("efficacy", least, Found.of(one, "facts", shares=True, ends=ends))
    assert alone.verdict == "FAILED"
    assert _judged("x", most, Found(60.0, 50.0, 2, "items", ends=(-100, 100))).note.endswith(
        "100.0 %"
    )


def test_shares_of_more_than_one_are_shown_whole():
    shown = [percent(share) for share in (1.13, 0.994, 0.0123, 12.0, 0.0)]
    assert shown == ["113 %", "99 %", "1.2 %", "1200 %", "0 %"]


@pytest.mark.parametrize("n", [2, 25, 500])
def test_agreement_of_few_is_not_certainty(n):
    margin = Found.of(Rate.of([1.0] * n), "facts", shares=True).margin / 100
    assert (1 - margin) ** n == pytest.approx(0.05), "so many in a row have one chance in twenty"


def test_what_cannot_be_measured_fails_unless_it_is_optional(make_editor):
    bare = [Fact(id=f.id, subject=f.subject, prompt=f.prompt, target=f.target) for f in FACTS[:2]]
    editor = make_editor(bare)
    for name, bound, why in (
        ("efficacy", {"at_least": 1.5}, "no fact has an old answer"),
        ("generalization", {"at_least": 1.5}, "paraphrase"),
        ("specificity_drop", {"at_most": 50}, "neighbour"),
        ("capability_drop", {"at_most": 50}, "no folder"),
    ):
        row = row_of(editor, name, bound)
        assert (row.verdict, row.found) == ("FAILED", None)
        assert why in row.note
        report = check(editor, limits(**{name: {**bound, "optional": True}}))
        assert report.passed
        assert [r.verdict for r in report.rows] == ["not measured"]


def test_a_model_without_edits_has_nothing_to_show(make_editor):
    editor = make_editor(facts=[])
    assert row_of(editor, "norm_growth", {"at_most": 0}).verdict == "ok"
    assert row_of(editor, "room_left", {"at_least": 100}).verdict == "ok"
    assert row_of(editor, "efficacy_strict", {"at_least": 50}).note == "no facts in the model"
    assert row_of(editor, "hidden_growth", {"at_most": 50}).verdict == "FAILED"
    assert row_of(editor, "hidden_growth", {"at_most": 50}, facts=FACTS).found == 0
    assert not check(editor, load_limits()).passed


def test_the_shipped_limits_refuse_a_wrecked_model(make_editor, windows):
    wrecked = make_editor(
        **{"values.clamp": 1000.0, "values.learning_rate": 50.0, "values.weight_decay": 0.0}
    )
    report = check(wrecked, load_limits(), windows=windows)
    assert {"perplexity_growth", "norm_growth", "hidden_growth"} <= set(report.failed)
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["passed"] is False
    assert plain["failed"] == list(report.failed)


def test_weights_that_are_not_numbers_fail(make_editor, windows):
    editor = make_editor()
    state = editor.weights._states[1]
    edit = replace(state.edit, delta=torch.full_like(state.weight, math.nan))
    editor.weights._set(1, replace(state, edit=edit))
    assert as_out_in(editor.editable.mlp_out(1)).isnan().all()
    asked = limits(
        perplexity_growth={"at_most": 1e9},
        norm_growth={"at_most": 1e9},
        hidden_growth={"at_most": 1e9},
    )
    assert len(check(editor, asked, windows=windows).failed) == 3


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"eficacy": {"at_least": 80}}, "did you mean 'efficacy'"),
        ({"efficacy": {"at_last": 80}}, "names no bound; expected at_least"),
        ({"efficacy": {"at_least": 80, "confidant": True}}, "did you mean 'confident'"),
        ({"efficacy": {"at_most": 80}}, "has at_most; expected at_least"),
        ({"norm_growth": {"at_least": 80}}, "has at_least; expected at_most"),
        ({"norm_growth": {"at_most": 80, "confident": True}}, "unknown setting 'confident'"),
        ({"efficacy": 80}, "expected `efficacy: {at_least: NUMBER}`"),
        ({"efficacy": {"at_least": "much"}}, "expected 0 to 100"),
        ({"efficacy": {"at_least": True}}, "expected 0 to 100"),
        ({"efficacy": {"at_least": math.nan}}, "expected 0 to 100"),
        ({"efficacy": {"at_least": 120}}, "expected 0 to 100"),
        ({"efficacy": {"at_least": 0.8}}, "write 80"),
        ({"perplexity_growth": {"at_most": math.inf}}, "expected a number"),
        ({"perplexity_growth": {"at_most": "nan"}}, "expected a number"),
        ({"kl": {"at_most": "9"}}, "kl: at_most is '9'; expected a number"),
        ({"kl": {"at_most": -1}}, "kl: at_most is -1; expected a number from 0, in mnat"),
        (
            {"leakage": {"at_most": -0.5}},
            "leakage: at_most is -0.5; expected a number from 0, in %",
        ),
        (
            {"oldest_cohort": {"at_least": 80, "first": 0}},
            "first is 0; expected a whole number from 1",
        ),
        ({"oldest_cohort": {"at_least": 80, "first": 2.5}}, "expected a whole number"),
        ({"capability_drop": {"at_most": 5, "tasks": ["sts2"]}}, "did you mean 'sst2'"),
        ({"capability_drop": {"at_most": 5, "tasks": []}}, "tasks is empty"),
        ({"capability_drop": {"at_most": 5, "tasks": "sst2"}}, "expected a list"),
        ({3: {"at_least": 80}}, "no limit 3"),
        ({}, "expected limits by name"),
        (["efficacy"], "expected limits by name"),
        (None, "expected limits by name"),
    ],
)
def test_bad_limits_are_refused_by_name(data, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        Limits.from_dict(data)


def test_what_may_fall_may_be_bound_to():
    below = {"perplexity_growth": -1, "specificity_drop": -2, "capability_drop": -0.5}
    found = Limits.from_dict({name: {"at_most": most} for name, most in below.items()})
    assert {name: bound.at_most for name, bound in found.bounds.items()} == below


def test_files_of_limits(tmp_path):
    file = tmp_path / "limits.yaml"
    file.write_text("efficacy: {at_least: 80}\nefficacy: {at_least: 8}\n")
    with pytest.raises(ConfigError, match="'efficacy' stands twice"):
        load_limits(file)
    file.write_text("efficacy: {at_least: 80")
    with pytest.raises(ConfigError, match="broken YAML"):
        load_limits(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_limits(file)
    file.write_text("norm_growth: {at_most: 1e2}  # YAML reads this as text\n")
    assert load_limits(file).bounds["norm_growth"].at_most == 100
    with pytest.raises(ConfigError, match="expected a YAML file, or default"):
        load_limits(tmp_path / "none.yaml")
    every = {
        name: {_side(kind): 5.0 if _side(kind) == "at_least" else 0.5}
        for name, kind in KINDS.items()
    }
    again = Limits.from_dict(every)
    assert Limits.from_dict(again.to_dict()) == again
    assert Limits.from_dict(yaml.safe_load(yaml.safe_dump(again.to_dict()))) == again


def _side(kind):
    fields = kind.settings.__dataclass_fields__
    return "at_least" if "at_least" in fields else "at_most"


def test_every_shipped_number_says_why():
    file = resources.files("nulledit") / "assets" / "limits" / "default.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()
    named = [i for i, line in enumerate(lines) if re.match(r"\w+:", line)]
    assert {lines[i].partition(":")[0] for i in named} == set(load_limits().bounds)
    assert all(lines[i - 1].startswith("#") for i in named)


# -- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(editor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saved = copy.copy(editor)
    saved.save(folder)
    return folder


def invoke(*words):
    group = Root(name="nulledit", commands={"check": check_command})
    return CliRunner().invoke(group, [str(w) for w in words])


def test_the_command_s_exit_code_and_where_things_go(run, tmp_path):
    file = tmp_path / "limits.yaml"
    file.write_text("norm_growth: {at_most: 1000}\nefficacy_strict: {at_least: 0}\n")
    held = invoke("check", run, "--limits", file, "--quiet")
    assert (held.exit_code, held.stderr) == (0, "")
    rows = held.stdout.splitlines()[2:]
    assert [line.split()[0] for line in rows] == ["norm_growth", "efficacy_strict"]
    assert all(re.search(r"\bok\b", line) for line in rows)
    assert "5 facts" in rows[1]
    file.write_text("norm_growth: {at_most: 0}\nroom_left: {at_least: 0}\n")
    broken = invoke("check", run, "--limits", file, "--quiet")
    assert broken.exit_code == 1
    assert "FAILED" in broken.stdout.splitlines()[2]
    (line,) = broken.stderr.splitlines()
    assert line == f"Error: {run}: 1 of 2 limits failed: norm_growth"
    as_json = invoke("check", run, "--limits", file, "--json", "--quiet")
    assert as_json.exit_code == 1
    assert json.loads(as_json.stdout)["failed"] == ["norm_growth"]


def test_nothing_is_shown_as_minus_nothing():
    row = Row("x", -0.04, 0.01, 3, "facts", "at_most", 5.0, False, "ok")
    cells = list(gate_table(GateReport((row,))).rows[0].values())
    assert cells[2] == "0.0 ± 0.0"


def test_what_was_not_measured_is_seen(run, tmp_path):
    file = tmp_path / "limits.yaml"
    file.write_text("capability_drop: {at_most: 5, optional: true}\n")
    shown = invoke("check", run, "--limits", file, "--quiet")
    assert shown.exit_code == 0
    assert "not measured" in shown.stdout
    file.write_text("capability_drop: {at_most: 5}\n")
    shown = invoke("check", run, "--limits", file, "--quiet")
    assert shown.exit_code == 1
    assert "no folder of tasks was given" in shown.stdout


def test_bad_limits_end_the_command_before_the_model_is_loaded(run, tmp_path):
    file = tmp_path / "limits.yaml"
    file.write_text("eficacy: {at_least: 80}\n")
    refused = invoke("check", tmp_path / "no-run", "--limits", file)
    assert refused.exit_code == 2
    assert refused.stdout == ""
    (line,) = refused.stderr.splitlines()
    assert "did you mean 'efficacy'" in line


# -- warnings ------------------------------------------------------------------------------------


def layer(number=3, room=1.0, update_share=0.1):
    return LayerReport(number, 4, 9, 0.5, 0.1, 5, update_share, 0.0, room)


def test_warnings_name_the_sign_and_the_layer():
    low, high = warn_module.ROOM_LOW, warn_module.NORM_HIGH
    grown = warn_module.TEXT_HIGH
    well = [layer(room=low, update_share=high), layer(4, room=math.nan)]
    assert warnings_of(well, grown) == []
    assert warnings_of([], None) == []
    (room,) = warnings_of([layer(room=low - 0.02), layer(5, room=low - 0.1)])
    assert "layer 5" in room
    (norm,) = warnings_of([layer(), layer(6, update_share=high + 0.1)])
    assert "layer 6" in norm
    (lost,) = warnings_of([layer(7, update_share=math.nan)])
    assert "layer 7" in lost
    (hidden,) = warnings_of([layer()], Rate(grown + 0.1, 0.0, 5))
    assert "hidden states" in hidden
    assert len(warnings_of([layer(room=0, update_share=9)], grown + 1)) == 3
