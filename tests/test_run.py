"""`Run` from Python: what the command line does, without it."""

import json
from dataclasses import replace

import pytest
from support.cli import RECORDS, refused, results

from nulledit import Editor, Fact, NullEditError, Run
from nulledit.api.run import Refused
from nulledit.config import load_recipe
from nulledit.report.document import Items
from nulledit.runs.limits import Limits
from nulledit.runs.preview import preview_page
from nulledit.runs.talk import Talk

IMPOSSIBLE = Limits.from_dict({"efficacy_strict": {"at_least": 100}}, source="never.yaml")
EASY = Limits.from_dict({"efficacy_strict": {"at_least": 0}}, source="always.yaml")


class Heard(Talk):
    def __init__(self):
        self.lines = []

    def say(self, message):
        self.lines.append(message)


@pytest.fixture
def editor(place):
    return Editor.from_pretrained(
        str(place / "model"),
        recipe=load_recipe(place / "recipe.yaml"),
        statistics=place / "stats",
    )


def test_a_run_is_made_evaluated_and_taken_up_again(editor, place, tmp_path):
    talk = Heard()
    run = Run.create(tmp_path / "run", editor, talk=talk)
    assert not (tmp_path / "run").exists(), "nothing is written before the first edit"
    result = run.edit(place / "facts.json", shuffle=False)
    assert "Editing 4 facts in 2 batches" in talk.lines
    assert json.loads(json.dumps(result.lines)) == results(tmp_path / "run")
    assert [line["id"] for line in result.lines] == [record["id"] for record in RECORDS]
    assert {"keys", "values", "solve", "save", "evaluation"} <= set(
        result.summary["runs"][0]["seconds"]
    )
    again = Run.open(tmp_path / "run")
    assert again.history.state_id == run.history.state_id
    assert again.edit(place / "facts.json").lines == [], "all are in the model already"
    assert again.verify().passed


@pytest.mark.parametrize("limits", [None, EASY])
def test_a_new_run_is_edited_again(limits, editor, tmp_path):
    run = Run.create(tmp_path / "run", editor)
    run.edit(RECORDS[:1], evaluate=False, limits=limits)
    again = run.edit(RECORDS[1:2], evaluate=False, limits=limits)
    assert [line["id"] for line in again.lines] == ["zola"]
    assert [fact.id for fact in Run.open(run.folder).editor.facts] == ["ada", "zola"]


def test_a_broken_limit_leaves_nothing_and_the_next_call_goes_on(editor, place, tmp_path):
    run = Run.create(tmp_path / "run", editor)
    with pytest.raises(Refused, match="efficacy_strict failed; no model was written") as caught:
        run.edit(place / "facts.json", limits=IMPOSSIBLE)
    assert caught.value.report.failed == ("efficacy_strict",)
    assert not (tmp_path / "run").exists()
    assert not editor.history.events
    assert run.seconds == {}, "what it took is no part of the next result"
    assert len(run.edit(place / "facts.json", limits=EASY).lines) == len(RECORDS)


def test_changes_reach_model_and_pages(editor, place, tmp_path):
    run = Run.create(tmp_path / "run", editor)
    run.edit(place / "facts.json", evaluate=False)
    full = run.history.state_id
    assert run.undo("zola").removed == ("zola",)
    assert [line["id"] for line in results(tmp_path / "run") if not line["active"]] == ["zola"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["facts"] == 3
    assert run.redo().restored == ("zola",)
    assert run.history.state_id == full
    run.restore()
    assert Editor.load(tmp_path / "run").facts == []
    run.redo()
    run.rebuild()
    assert len(Run.open(tmp_path / "run").editor.facts) == 4
    assert run.verify().passed


def test_an_error_in_the_first_batch_leaves_no_folder(editor, tmp_path, monkeypatch):
    run = Run.create(tmp_path / "run", editor)

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("nulledit.editing.batch_values.optimise_values", stop)
    with pytest.raises(KeyboardInterrupt):
        run.edit(Fact(id="velm", subject="Velm", prompt="{} is a", target="town"))
    assert not (tmp_path / "run").exists()
    assert run.batches == 0


def test_a_folder_that_holds_something_is_refused_before_anything_is_edited(editor, tmp_path):
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(NullEditError, match="is not empty"):
        Run.create(tmp_path, editor)
    with pytest.raises(NullEditError, match="no run here"):
        Run.open(tmp_path)


def test_a_run_is_looked_at_without_a_trace(editor, place, tmp_path):
    run = Run.create(tmp_path / "run", editor)
    run.edit(place / "facts.json", evaluate=False)
    before = {p: p.read_bytes() for p in sorted(run.folder.rglob("*")) if p.is_file()}
    looked = Run.open(run.folder, writing=False)
    found = looked.evaluate(text=str(place / "corpus.txt"))
    assert set(found.sides) == {"base", "edited"}
    mine = looked.editor.evaluate(text=place / "corpus.txt")
    assert (found.summary(), found.changes()) == (mine.summary(), mine.changes())
    assert found.to_dict(relations=True)["facts"] == len(RECORDS)
    assert set(looked.evaluate(base=False).sides) == {"edited"}
    would = looked.preview(undo=["zola"])
    assert [fact.id for fact in would.facts] == ["zola"]
    assert set(would.held.summary()) == {"before", "after"}
    old = looked.preview(undo=["ada"])
    assert old.asked.moved() == []
    assert "Of 1 neighbour none changes its answer." in preview_page(old)
    turned = [replace(s, strict=not s.strict) for s in old.asked.after.scores]
    asked = replace(old.asked, after=replace(old.asked.after, scores=turned))
    ((query, _),) = asked.moved()
    assert query.prompt == "The mother tongue of Karo Dun is"
    (named,) = [p for p in preview_page(replace(old, asked=asked)) if isinstance(p, Items)]
    assert query.prompt in dict(named.shown())
    assert looked.check(EASY).passed
    assert not looked.check(IMPOSSIBLE).passed
    said = looked.ask("The mother tongue of Ada Byron is", target="Velmish")
    assert said == looked.editor.ask(said.prompt, "Velmish")
    assert looked.history.state_id == run.history.state_id
    assert {p: p.read_bytes() for p in sorted(run.folder.rglob("*")) if p.is_file()} == before


def test_two_runs_become_a_third_and_stay(editor, place, tmp_path):
    run = Run.create(tmp_path / "run", editor)
    run.edit(place / "facts.json", evaluate=False)
    states = run.history.state_id
    other = Editor.from_pretrained(
        str(place / "model"),
        recipe=load_recipe(place / "recipe.yaml"),
        statistics=place / "stats",
    )
    more = Run.create(tmp_path / "other", other)
    more.edit(Fact("Lyra Holm", "{} plays the", "flute", id="lyra"), evaluate=False)
    with pytest.raises(NullEditError, match="holds a run already"):
        run.merge(more.history, tmp_path / "other")
    run.merge(more.history, tmp_path / "both")
    assert run.folder == tmp_path / "both"
    assert Run.open(tmp_path / "run").history.state_id == states
    both = Run.open(tmp_path / "both")
    assert [fact.id for fact in both.editor.facts][-1] == "lyra"
    assert both.verify().passed
    assert "<html" in Run.open(tmp_path / "run").report().read_text(encoding="utf-8")


@pytest.mark.parametrize("words", [("undo", "zola"), ("restore",), ("rebuild",)])
def test_broken_pages_are_refused_before_the_ledger_is_touched(words, edited):
    held = {p: p.read_bytes() for p in (edited / "ledger").rglob("*") if p.is_file()}
    (edited / "summary.json").write_text("{", encoding="utf-8")
    assert "summary.json" in refused(words[0], edited, *words[1:], "--quiet")
    assert {p: p.read_bytes() for p in (edited / "ledger").rglob("*") if p.is_file()} == held
