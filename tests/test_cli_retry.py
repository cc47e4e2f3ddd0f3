"""`nulledit retry` and `edit --retry`: what they refuse, and what an interruption leaves."""

import json
import re
import shutil

import pytest
from support.cli import done, edit_all, invoke, refused, results, state

from nulledit import Editor
from nulledit.editing.batch import BatchWriter
from nulledit.evaluation import retry


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """A run of all facts in two batches, made once."""
    return edit_all(place, tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "my run")


@pytest.fixture
def found(monkeypatch):
    """Sets which facts, by id, each look at the model finds failing; returns those looked at."""

    def set_found(*failing):
        looks, asked = iter(failing), []

        def look(_editor, facts, _progress):
            asked.append([f.id for f in facts])
            names = next(looks)
            return [f for f in facts if f.id in names]

        monkeypatch.setattr(retry, "failing_facts", look)
        return asked

    return set_found


def stop(monkeypatch, place, error):
    def stops(*_words, **_options):
        raise error

    monkeypatch.setattr(place, stops)


def events(run):
    return [event.kind for event in Editor.load(run).history.events]


def test_an_interrupted_round_leaves_the_run_and_the_command_goes_on(run, found, monkeypatch):
    held, told = state(run), (run / "results.jsonl").read_bytes()
    found(["ada", "zola"])
    stop(monkeypatch, "nulledit.editing.batch_values.optimise_values", KeyboardInterrupt())
    result = invoke("retry", run, "--times", 2, "-q")
    assert result.exit_code == 130
    (line,) = result.stderr.splitlines()
    assert line == (
        f"Error: interrupted: no batch was finished; go on with: nulledit retry '{run}' "
        "--times 2 --quiet"
    )
    assert (state(run), (run / "results.jsonl").read_bytes()) == (held, told)
    assert events(run) == ["edit", "edit"]


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)]
)
def test_what_was_cut_off_after_a_round_is_made_up_for(run, found, monkeypatch, error, code):
    """Model and pages follow, though by then every fact may hold."""
    held = state(run)
    with monkeypatch.context() as patch:
        found(["ada"], [])
        stop(patch, "nulledit.editing.engine.EditEngine.keep_model", error)
        result = invoke("retry", run, "-q")
    assert result.exit_code == code
    assert f"1 finished batch is kept in {run}; go on with: nulledit retry" in result.stderr
    assert events(run) == ["edit", "edit", "retry"]
    assert state(run) == held, "the model is an event behind"
    found([])
    assert re.search(r"1 fact in this call, \d in the run", done("retry", run, "-q").stdout)
    assert state(run) == Editor.load(run).history.state_id
    assert [line["id"] for line in results(run) if line["run"] == 2] == ["ada"]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["runs"][-1]["layers"]
    found([])
    assert "every fact holds: nothing was written" in done("retry", run, "-q").stdout


def test_an_edit_that_goes_on_tries_again_what_was_written_before(run, place, found):
    """As after an interruption between the edit and its retry."""
    asked = found([])
    done("edit", place / "facts.json", "--limit", 3, "--continue", run, "--retry", 1, "-q")
    assert asked == [["ada", "zola", "velm"]]


def test_nothing_to_write_again_is_said_as_such(run, place):
    done("forget", run, place / "facts.json", "-q")
    held = state(run)
    said = "no fact in the model has an answer to write: nothing was written"
    assert said in done("retry", run, "-q").stdout
    assert json.loads(done("retry", run, "-q", "--json").stdout)["notice"] == said
    done("restore", run, "-q")
    assert said in done("retry", run, "-q").stdout
    assert state(run) != held


@pytest.mark.parametrize("page", ["results.jsonl", "summary.json", "environment.json"])
@pytest.mark.parametrize("command", ["retry", "edit"])
def test_a_page_that_can_not_be_read_is_told_before_anything_is_written(
    run, place, tmp_path, page, command
):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / page).write_text('{"id": 3}\n')
    ledger = (copy / "ledger" / "ledger.db").read_bytes()
    fact = {"subject": "Dun", "prompt": "{} is a", "target": "river"}
    (tmp_path / "more.json").write_text(json.dumps([fact]))
    words = {"retry": (copy,), "edit": (tmp_path / "more.json", "--continue", copy)}[command]
    assert page in refused(command, *words, "-q")
    assert (copy / "ledger" / "ledger.db").read_bytes() == ledger


def test_retry_refuses_before_it_asks_anything(run, place, options, tmp_path, monkeypatch):
    monkeypatch.setattr(BatchWriter, "write", None)
    assert "no run here" in refused("retry", tmp_path, "-q")
    assert "--capability belongs to --gate" in refused("retry", run, "--capability", tmp_path)
    assert "no limits" in refused("retry", run, "--gate", tmp_path / "none.yaml", "-q")
    assert "no such file" in refused("retry", run, "--text", tmp_path / "none.txt", "-q")
    monkeypatch.undo()
    out = tmp_path / "ft"
    words = ("--limit", 1, "--method", "ft", "--no-evaluate")
    done("edit", place / "facts.json", *options, *words, "--out", out)
    held = state(out)
    stop(monkeypatch, "nulledit.evaluation.retry.evaluate", AssertionError("asked"))
    assert "ft optimises none" in refused("retry", out, "-q")
    assert state(out) == held
