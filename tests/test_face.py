"""What users call from Python: each method gives what the command of its name gives."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from support.cli import RECORDS, done

import nulledit
from nulledit import Editor, Fact, Recipe, Run, read_facts
from nulledit.errors import ConfigError, LedgerError, NullEditError
from nulledit.models.load import load_model
from nulledit.runs.limits import Limits

PROMPT = "The mother tongue of Ada Byron is"
ROOT = Path(__file__).parents[1]
MORE = {"id": "new", "subject": "Velm", "prompt": "{} is a", "target": "town"}


def said_by(*words):
    return json.loads(done(*words, "--json", "--quiet").stdout)


def plain(value):
    """As it comes back from JSON, numbers to nine digits: files differ in the order of sums."""

    def short(x):
        if isinstance(x, dict):
            return {str(k): short(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [short(v) for v in x]
        if isinstance(x, float):
            return float(f"{x:.6g}") if math.isfinite(x) else None
        return x

    return short(value)


@pytest.fixture(scope="module")
def run(place, tmp_path_factory):
    """A run of all facts; tests only look at it."""
    folder = tmp_path_factory.mktemp("face") / "run"
    options = ("--recipe", place / "recipe.yaml", "--stats", place / "stats", "--quiet")
    edit = ("edit", place / "facts.json", "--model", place / "model", *options)
    done(*edit, "--no-shuffle", "--no-evaluate", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def editor(run):
    """The run's editor; tests leave it as it was."""
    return Editor.load(run)


@pytest.fixture
def fresh(place):
    def make():
        recipe = Recipe.from_dict(nulledit.load_recipe(place / "recipe.yaml").to_dict())
        return Editor.from_pretrained(
            str(place / "model"), recipe=recipe, statistics=place / "stats"
        )

    return make


# -- each method beside its command ----------------------------------------------------------


def test_ask(editor, run):
    assert editor.ask(PROMPT).to_dict() == said_by("ask", run, PROMPT)
    answer = editor.ask(PROMPT, target="Velmish", max_tokens=3)
    found = editor.evaluate([f for f in editor.facts if f.id == "ada"])
    for side, p in (
        (found.before, answer.base_probability),
        (found.after, answer.edited_probability),
    ):
        nll = next(s.answer_nll for s in side.scores if s.query.kind == "efficacy")
        assert p == pytest.approx(math.exp(-nll))
    with pytest.raises(NullEditError, match="chat template"):
        editor.ask(PROMPT, chat=True)


def test_evaluate(editor, run, place):
    told = said_by("evaluate", run)
    found = editor.evaluate()
    assert plain(found.before.summary()) == plain(told["base"])
    assert plain(found.after.summary()) == plain(told["edited"])
    assert plain(found.after.rows()) == plain(told["results"]["edited"])
    assert [p.layer for p in found.preservation] == [p["layer"] for p in told["preservation"]]
    one = editor.evaluate(RECORDS[0], text=place / "corpus.txt")
    assert list(one.after.answers) == ["ada"]
    assert one.text == "corpus.txt"
    assert editor.evaluate([], base=False).before is None


def test_what_changed_comes_with_intervals(editor):
    found = editor.evaluate()
    for name, (mean, low, high) in found.changes().items():
        then, now = found.before.values()[name], found.after.values()[name]
        shared = [now[i] - then[i] for i in now if i in then]
        assert mean == pytest.approx(sum(shared) / len(shared))
        assert low <= mean <= high
    assert "efficacy_strict" in found.changes()


def test_check(editor, run, tmp_path):
    limits = tmp_path / "limits.yaml"
    limits.write_text("efficacy_strict: {at_least: 0}\nkl: {at_most: 1.0e-9}\n")
    report = editor.check(limits)
    words = ("check", run, "--limits", limits, "--json", "--quiet")
    from support.cli import invoke

    told = json.loads(invoke(*words).stdout)
    assert (report.passed, report.failed) == (False, ("kl",))
    assert plain(report.to_dict()["rows"]) == plain(told["rows"])
    assert editor.check(Limits.from_dict({"norm_growth": {"at_most": 1e9}}, source="x")).passed
    assert {row.name for row in editor.check().rows} >= {"efficacy_strict", "perplexity_growth"}


def test_preview_writes_nothing(editor, run, tmp_path, monkeypatch):
    before, files = editor.history.state_id, sorted(p for p in run.rglob("*"))
    (tmp_path / "more.json").write_text(json.dumps([MORE]))
    told = said_by("preview", run, tmp_path / "more.json", "--undo", "zola")
    found = editor.preview(MORE, undo=["zola"])
    assert plain({"run": str(run), **found.to_dict()}) == plain(told)
    assert [f.id for f in found.facts] == ["new", "zola"]
    assert editor.history.state_id == before
    assert sorted(p for p in run.rglob("*")) == files
    with pytest.raises(ConfigError, match="nothing to preview"):
        editor.preview()
    with monkeypatch.context() as now:
        now.setattr("nulledit.runs.preview.base_reading", None)  # before anything is measured
        with pytest.raises(LedgerError, match="no fact 'nobody'"):
            editor.preview(MORE, undo=["nobody"])


@pytest.mark.parametrize("kind", ["lora", "delta", "checkpoint"])
def test_export(editor, run, tmp_path, kind):
    told = said_by("export", run, "--as", kind, "--out", tmp_path / "told")
    found = editor.export(tmp_path / "found", kind)
    assert plain(found.to_dict() | {"folder": ""}) == plain(told | {"folder": ""})
    names = sorted(p.name for p in (tmp_path / "told").iterdir())
    assert sorted(p.name for p in (tmp_path / "found").iterdir()) == names
    for name in names:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "told" / name).read_bytes()


def test_an_export_of_a_wrong_kind_is_refused(editor, tmp_path):
    with pytest.raises(ConfigError, match="rank can't be given for kind 'checkpoint'"):
        editor.export(tmp_path / "x", "checkpoint", rank=3)
    with pytest.raises(ConfigError, match="unknown kind 'onnx' of export"):
        editor.export(tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_log_and_show(editor, run):
    assert editor.log() == said_by("log", run)["events"]
    assert editor.show() == said_by("show", run)["facts"]
    assert plain({"run": str(run), **editor.show("ada")}) == plain(said_by("show", run, "ada"))
    with pytest.raises(LedgerError, match="no fact 'adda' in the ledger"):
        editor.show("adda")


def test_diff(editor, run):
    told = said_by("diff", f"{run}@0", run)
    for found in (
        editor.diff(len(editor.log()), at=0),
        editor.diff(run, at=0),
        editor.diff(editor, at=0),
        editor.diff(editor.history, at=0),
    ):
        assert (len(found.facts), found.common) == (len(told["facts"]), told["common"])
        assert plain([vars(x) for x in found.layers]) == plain(told["layers"])
    back = editor.diff(f"{run}@1")
    assert [fact.second.id for fact in back.facts if fact.second] == []
    with pytest.raises(ConfigError, match="the ledger has 2 events"):
        editor.diff(7)


def test_verify(editor, fresh):
    assert editor.verify().passed
    assert fresh().folder is None
    with pytest.raises(LedgerError, match="in memory alone"):
        fresh().verify()


def test_a_run_gives_and_takes_this_editor(run, fresh, tmp_path):
    opened = Run.open(run)
    assert type(opened.editor) is Editor
    assert opened.editor.folder == run
    assert opened.editor.ask(PROMPT).edited
    assert type(Run.create(tmp_path / "new", fresh()).editor) is Editor


def test_the_revision_is_kept_for_a_base_that_is_loaded_again(place, tmp_path):
    editor = Editor.from_pretrained(
        str(place / "model"),
        recipe=nulledit.load_recipe(place / "recipe.yaml"),
        statistics=place / "stats",
        revision="v2",
        device_map="sequential",
    )
    editor.edit(RECORDS[0])
    editor.attach(tmp_path / "run")  # the ledger alone, as an interrupted first run leaves it
    asked = []

    def loading(source, **given):
        asked.append((source, given["revision"], given["device_map"]))
        return load_model(source, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nulledit.editing.saved.load_model", loading)
        again = Editor.load(tmp_path / "run", device_map="cpu")
    assert asked == [(str(place / "model"), "v2", "cpu")]
    assert again.history.state_id == editor.history.state_id
    assert again.history.base.revision == "v2"


def test_a_base_without_a_revision_is_recorded_as_before(editor):
    assert editor.history.base.revision == ""
    assert "revision" not in editor.history.base.to_dict()


# -- what edit takes -------------------------------------------------------------------------


def test_every_way_to_give_facts_is_one_edit(fresh, place):
    file = place / "facts.json"
    ways = [
        file,
        str(file),
        read_facts(file),
        RECORDS,
        [Fact.from_dict(r) for r in RECORDS],
        [RECORDS[0], *map(Fact.from_dict, RECORDS[1:])],
        (record for record in RECORDS),
    ]
    states = set()
    for given in ways:
        editor = fresh()
        editor.edit(given)
        states.add(editor.history.state_id)
    assert len(states) == 1
    one = fresh()
    one.edit(RECORDS[0])
    other = fresh()
    other.edit(Fact.from_dict(RECORDS[0]))
    assert one.history.state_id == other.history.state_id
    with pytest.raises(NullEditError, match="expected facts, mappings"):
        one.edit(3)


def first_block(page, kind):
    """The first block of code of a kind in a page of the project."""
    return (ROOT / page).read_text(encoding="utf-8").split(f"```{kind}\n")[1].split("```")[0]


def test_every_line_of_the_readme_runs(fresh, tmp_path, monkeypatch):
    """With a tiny model in the place of the embedded one (`test_embedded` has that one)."""
    monkeypatch.chdir(tmp_path)
    made = fresh()
    monkeypatch.setattr(Editor, "from_pretrained", classmethod(lambda cls, name: made))
    names = {}
    exec(first_block("README.md", "python"), names)
    assert not names["editor"].facts, "it was undone"
    assert names["found"].after.rates["efficacy_strict"].n == 1
    assert (tmp_path / "run" / "model").is_dir()


def test_every_line_of_the_page_on_python_runs(fresh, tmp_path, monkeypatch):
    code = first_block("docs/python.md", "python")
    (tmp_path / "facts.yaml").write_text(first_block("docs/commands.md", "yaml"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    made = [fresh(), fresh()]
    monkeypatch.setattr(Editor, "from_pretrained", classmethod(lambda cls, name: made.pop()))
    names = {}
    exec(code, names)
    assert [fact.id for fact in names["editor"].facts] == ["france", "sushi"]
    assert [line["id"] for line in names["result"].lines] == ["capital-of-france"]


# -- how it shows ----------------------------------------------------------------------------


def results(editor, run, tmp_path):
    """One of everything that a user gets to see."""
    report = editor.edit(MORE | {"subject": "<b>Velm</b>", "id": "<script>"})
    change = editor.undo("<script>")
    found = editor.evaluate()
    return [
        *(editor, editor.recipe, editor.facts[0], editor.history, editor.history.base),
        *(editor.history.columns[0], editor.history.epochs[0], report, report.layers[0], change),
        *(found, found.after, found.after.reading, editor.ask("<i>a</i> is"), editor.check()),
        *(editor.preview(undo=["zola"]), editor.diff(0), editor.verify(), Run.open(run)),
        *(editor.export(tmp_path / "x"), editor._session.statistics),
    ]


def test_reprs_are_one_short_line_and_pages_are_escaped(fresh, place, tmp_path):
    run = tmp_path / "run"
    editor = fresh()
    editor.edit(place / "facts.json")
    editor.save(run)
    shown = results(editor, run, tmp_path)
    for value in shown:
        text = repr(value)
        assert "\n" not in text, text
        assert len(text) < 400, text
        assert "tensor" not in text
        assert "array" not in text
    pages = [v._repr_html_() for v in shown if hasattr(v, "_repr_html_")]
    assert len(pages) >= 7
    for page in pages:
        assert page.count("<table>") == page.count("</table>") == 1
        assert "<script" not in page
        assert "<b>" not in page
        assert "<i>" not in page


def test_a_long_table_is_cut():
    from nulledit.io.notebook import MOST_ROWS, html_table

    page = html_table("t", ["a"], [[i] for i in range(MOST_ROWS + 7)])
    assert "and 7 more" in page
    assert page.count("<td>") == MOST_ROWS


class Frame:
    """As much of pandas' frame as is used."""

    def __init__(self, rows, index):
        self.rows, self.index = rows, types.SimpleNamespace(names=index)

    def set_index(self, columns):
        self.columns = columns
        return self


def test_frames_hold_the_rows(editor, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=Frame))
    found = editor.evaluate()
    frame = found.after.to_frame()
    assert frame.rows == list(found.after.rows().values())
    assert frame.index.names == list(found.after.rows())
    both = found.to_frame()
    assert both.columns == ["id", "side"]
    assert [row["side"] for row in both.rows] == ["before"] * 4 + ["after"] * 4


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="needs pandas")
def test_real_frames(fresh, place):
    editor = fresh()
    frame = editor.edit(place / "facts.json").to_frame()
    assert list(frame.index) == [c.fact.id for c in editor.history.columns]
    assert frame.index.name == "fact"
    both = editor.evaluate().to_frame()
    assert set(both.index.get_level_values("side")) == {"before", "after"}


def test_without_pandas_the_extra_is_named(editor, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pip install 'nulledit\[pandas\]'"):
        editor.evaluate(base=False).after.to_frame()


# -- names and types -------------------------------------------------------------------------


def test_every_name_is_there_and_listed():
    assert set(nulledit.__all__) <= set(dir(nulledit))
    for name in nulledit.__all__:
        assert getattr(nulledit, name) is not None
    results = {"ChangeReport", "Column", "EditReport", "Evaluation", "LayerReport", "Statistics"}
    assert results <= set(nulledit.__all__)


def test_importing_it_needs_no_torch():
    script = "import sys, nulledit; dir(nulledit); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


GOOD = """
from typing import assert_type

from nulledit import Column, Editor, EditReport, Evaluation, Fact, Run, Statistics, load_limits
from nulledit import ChangeReport, Comparison, LayerReport, read_facts

editor = Editor.from_pretrained("smollm2-135m", revision="main", device_map="auto")
editor = Editor.load("run", device="cpu")
fact = Fact(subject="France", prompt="The capital of {} is", target="Madrid")
for given in (fact, [fact], {"subject": "France"}, "facts.yaml", read_facts("facts.yaml")):
    report: EditReport = editor.edit(given)
column: Column = report.columns[0]
layer: LayerReport = report.layers[0]
assert_type(editor.ask("Paris is in", target="Spain").edited_probability, float | None)
found: Comparison = editor.evaluate()
after: Evaluation = found.after
assert_type(editor.check(load_limits()).passed, bool)
assert_type(editor.verify().passed, bool)
editor.export("adapter", "lora", rank=8)
editor.preview([fact], undo=["x"])
editor.diff("run@3")
kinds: list[str] = [event["kind"] for event in editor.log()]
answer: str = editor.show("x")["fact"]["target"]
change: ChangeReport = editor.undo("x")
run = Run.create("new", editor)
assert_type(run.editor, Editor)
assert_type(Run.open("new").editor, Editor)
"""
BAD = """
from nulledit import Editor

editor = Editor.load("run")
editor.ask(3)
editor.export("x", kind="onnx")
editor.evalute()
"""


def test_a_users_program_is_checked_by_our_types(tmp_path):
    """What comes from torch is Any here: to read its types takes a minute."""
    assert (ROOT / "src" / "nulledit" / "py.typed").is_file()
    words = [sys.executable, "-m", "mypy", "--no-site-packages", "--ignore-missing-imports"]
    words += ["--follow-imports", "silent", "--strict", "--allow-untyped-calls"]
    env = os.environ | {"MYPYPATH": str(ROOT / "src")}
    found = {}
    for name, source in (("good", GOOD), ("bad", BAD)):
        (tmp_path / f"{name}.py").write_text(source)
        done = subprocess.run(
            [*words, "--cache-dir", str(tmp_path / "cache"), f"{name}.py"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        found[name] = done.stdout
    assert found["good"].startswith("Success"), found["good"]
    for line in (5, 6, 7):
        assert f"bad.py:{line}: error" in found["bad"], found["bad"]
