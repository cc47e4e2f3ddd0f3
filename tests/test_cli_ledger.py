"""The commands to live with edits, as a user types them."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from support.cli import RECORDS, done, edit_all, invoke, refused, results, state

from nulledit import Editor
from nulledit.cli.change import change_text
from nulledit.editing.reports import ChangeReport


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """A run of all facts in two batches, made once."""
    return edit_all(place, tmp_path_factory.mktemp("made") / "run", "--no-evaluate")


@pytest.fixture
def run(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "run")


def model_of(run):
    return (run / "model" / "model.safetensors").read_bytes()


def content(run):
    """Every file but the lock, which names the last writer."""
    return {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}


def log_of(run):
    return json.loads(done("log", run, "--json").stdout)["events"]


# -- one run ---------------------------------------------------------------------------------


def test_undo_redo_and_restore_by_id_batch_and_field(run, place):
    whole, before = model_of(run), state(run)
    said = done("undo", run, "ada", "--quiet").stdout
    assert "out: ada" in said
    assert "the others moved by" in said
    assert "3 in the model" in said
    assert state(run) != before
    assert [line["active"] for line in results(run)] == [False, True, True, True]
    done("undo", run, "--batch", "2", "--quiet")
    done("undo", run, "--where", "subject=Émile Zola", "--where", "target=Ostrel", "--quiet")
    base = Editor.load(run)
    assert base.facts == []
    assert base.history.base.hash == Editor.from_pretrained(str(place / "model")).history.base.hash
    for _ in range(3):
        done("redo", run, "--quiet")
    assert model_of(run) == whole
    assert state(run) == before
    assert "base, bit for bit" in done("restore", run, "--quiet").stdout
    told = json.loads(done("redo", run, "--json", "--quiet").stdout)
    assert (told["kind"], told["facts"]) == ("redo", 4)
    assert set(told["restored"]) == {"ada", "zola", "velm", "karo"}
    assert model_of(run) == whole
    kinds = [event["kind"] for event in log_of(run)]
    assert kinds == ["edit"] * 2 + ["undo"] * 3 + ["redo"] * 3 + ["restore", "redo"]


def test_the_log_and_the_story_of_a_fact(run):
    done("undo", run, "zola", "--quiet")
    events = log_of(run)
    assert [(e["in"], e["out"], e["facts"]) for e in events] == [
        (["ada", "zola"], [], 2),
        (["velm", "karo"], [], 4),
        ([], ["zola"], 3),
    ]
    table = done("log", run).stdout
    assert "+ ada, zola" in table
    assert "− zola" in table
    assert len(done("log", run, "--limit", "1").stdout.splitlines()) == 3
    facts = json.loads(done("show", run, "--json").stdout)["facts"]
    assert [fact["id"] for fact in facts] == ["ada", "velm", "karo"]
    story = json.loads(done("show", run, "zola", "--json").stdout)
    assert story["in_the_model"] is False
    assert [(e["event"], e["change"]) for e in story["events"]] == [(1, "came in"), (3, "left")]
    (version,) = story["versions"]
    assert (version["batch"], version["method"], version["layers"]) == (1, "alphaedit", [1, 2])
    said = done("show", run, "zola").stdout
    assert "zola: taken out" in said
    assert "‖δ‖/‖h‖" in said
    assert "did you mean 'karo'" in refused("show", run, "karro")


def test_rebuild_leaves_no_trace_of_undone_facts(run, place, options, tmp_path):
    done("undo", run, "ada", "--quiet")
    left = model_of(run)
    said = done("rebuild", run, "--values", "--quiet").stdout
    assert "written anew: zola, velm, karo" in said
    assert model_of(run) != left
    records = tmp_path / "rest.json"
    records.write_text(json.dumps(RECORDS[1:2]), encoding="utf-8")
    fresh = tmp_path / "fresh"
    done("edit", records, *options, "--out", fresh, "--no-evaluate")
    records.write_text(json.dumps(RECORDS[2:]), encoding="utf-8")
    done("edit", records, "--continue", fresh, "--no-shuffle", "--no-evaluate", "--quiet")
    one, other = Editor.load(run), Editor.load(fresh)
    for layer in one.weights.layers:
        update = other.weights.exact(layer) - other.weights.base(layer)
        error = one.weights.exact(layer) - other.weights.exact(layer)
        assert float(error.norm() / update.norm()) < 1e-4  # float32 values, optimised apart


def test_a_new_epoch_changes_the_method_and_is_asked_for(run, place):
    more = (place / "facts.json", "--continue", run, "--quiet", "--no-evaluate")
    assert "add --new-epoch" in refused("edit", *more, "--method", "memit-history")
    assert "changes nothing" in refused("edit", *more, "--new-epoch")
    assert "belongs to --continue" in refused(
        *("edit", place / "facts.json", "--model", place / "model", "--out", run, "--new-epoch")
    )
    done("undo", run, "karo", "--quiet")
    other = ("edit", *more, "--new-epoch", "--method", "memit-history")
    assert "give full ones by --stats" in refused(*other)  # the run keeps what its filter needs
    done(*other, "--stats", place / "stats")
    assert [e["methods"] for e in log_of(run)] == [
        ["alphaedit"],
        ["alphaedit"],
        ["alphaedit"],
        ["memit-history"],
    ]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["method"]["name"] == "memit-history"
    assert Editor.load(run).recipe.method.name == "memit-history"
    done("undo", run, "ada", "--quiet")
    done("verify", run, "--quiet")


def test_preview_writes_nothing(run, place, tmp_path):
    files = content(run)
    more = tmp_path / "more.json"
    record = {"id": "new", "subject": "Velm", "prompt": "The people of {} speak", "target": "Greek"}
    more.write_text(json.dumps([record]), encoding="utf-8")
    said = done("preview", run, more, "--quiet").stdout
    assert "Greek" in said
    assert "The last 4 facts in the model" in said
    assert "room left" in said
    assert "Nothing was written" in said
    told = json.loads(done("preview", run, "--undo", "ada", "--json", "--quiet").stdout)
    assert [a["id"] for a in told["answers"]] == ["ada"]
    assert told["asked"]["before"]["rates"]["efficacy_strict"]["n"] == 1
    again = [{**RECORDS[0], "target": "Greek"}]
    more.write_text(json.dumps(again), encoding="utf-8")
    told = done("preview", run, more, "--undo", "ada", "--json", "--quiet").stdout
    assert [(a["id"], a["target"]) for a in json.loads(told)["answers"]] == [("ada", "Greek")]
    assert content(run) == files
    assert "give FACTS" in refused("preview", run)
    assert "no fact 'nobody'" in refused("preview", run, "--undo", "nobody", "--quiet")


def test_ids_and_events_that_are_not_there_are_told_before_a_model_is_loaded(run, monkeypatch):
    def load(*_words, **_options):
        raise AssertionError("loaded")

    monkeypatch.setattr(Editor, "load", load)
    assert "no fact 'nobody'" in refused("preview", run, "--undo", "nobody")
    for states in ((f"{run}@99", run), (run, f"{run}@99")):
        assert "@99: the ledger has 2 events" in refused("diff", *states)


# -- two runs --------------------------------------------------------------------------------


@pytest.fixture
def other(place, options, tmp_path):
    """Another run on the same base: one question answered differently, one fact of its own."""
    records = [
        {**RECORDS[0], "id": "ada-2", "target": "Latin"},
        {"id": "own", "subject": "Ostrel", "prompt": "The town of {} is in", "target": "London"},
    ]
    file = tmp_path / "other.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    done("edit", file, *options, "--out", tmp_path / "other", "--no-evaluate")
    return tmp_path / "other"


def probability(run, prompt, answer):
    """Geometric mean over the answer's tokens, by the whole model."""
    editor = Editor.load(run)
    row = editor.editable.encoder.encode(prompt, target=answer)
    logs = editor.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    at = range(row.target_start - 1, len(row.ids) - 1)
    return float(logs[at, list(row.target_ids)].mean().exp())


def test_diff_tells_facts_probabilities_and_norms(run, other):
    told = json.loads(done("diff", run, other, "--json", "--quiet").stdout)
    pairs = [
        (x["first"] and x["first"]["id"], x["second"] and x["second"]["id"]) for x in told["facts"]
    ]
    assert pairs == [
        ("ada", "ada-2"),
        ("zola", None),
        ("velm", None),
        ("karo", None),
        (None, "own"),
    ]
    answers = {p["answer"]: p for p in told["facts"][0]["probabilities"]}
    for side, folder in (("first", run), ("second", other)):
        for answer in ("Velmish", "Latin"):
            expected = probability(folder, "The mother tongue of Ada Byron is", answer)
            assert answers[answer][side] == pytest.approx(expected, rel=1e-4)
    for layer in told["layers"]:
        assert 0 < layer["apart"] <= layer["first"] + layer["second"]
    assert "3 facts" not in done("diff", run, run, "--quiet").stdout
    same = json.loads(done("diff", run, run, "--json", "--quiet").stdout)
    assert (same["facts"], same["common"]) == ([], 4)
    assert all(layer["apart"] == 0 for layer in same["layers"])
    first = json.loads(done("diff", f"{run}@1", run, "--json", "--quiet").stdout)
    assert [x["second"]["id"] for x in first["facts"]] == ["velm", "karo"]
    base = json.loads(done("diff", f"{run}@0", run, "--json", "--quiet").stdout)
    assert base["layers"][0]["first"] == 0
    assert "has 2 events" in refused("diff", f"{run}@7", run, "--quiet")
    assert "Velmish" in done("diff", run, other, "--quiet").stdout


def test_merge_lists_conflicts_until_they_are_decided(run, other, tmp_path):
    both = tmp_path / "both"
    result = invoke("merge", run, other, "--out", both, "--quiet")
    assert result.exit_code == 1
    assert "Velmish (ada)" in result.stdout
    assert "not decided" in result.stdout
    assert "--prefer or --decide" in result.stderr
    assert not both.exists()
    choices = tmp_path / "choices.yaml"
    choices.write_text("ada-2: second\n", encoding="utf-8")
    before = model_of(run), model_of(other)
    done("merge", run, other, "--out", both, "--decide", choices, "--quiet")
    facts = json.loads(done("show", both, "--json").stdout)["facts"]
    assert [f["id"] for f in facts] == ["zola", "velm", "karo", "ada-2", "own"]
    done("verify", both, "--quiet")
    assert (model_of(run), model_of(other)) == before
    assert "holds a run already" in refused("merge", run, other, "--out", both, "--quiet")
    choices.write_text("ada: perhaps\n", encoding="utf-8")
    said = refused("merge", run, other, "--out", tmp_path / "x", "--decide", choices, "--quiet")
    assert "expected first, second, neither" in said
    assert not (tmp_path / "x").exists()
    done("merge", run, other, "--out", tmp_path / "y", "--prefer", "newest", "--quiet")


# -- gates -----------------------------------------------------------------------------------


def test_a_gate_that_fails_leaves_everything_as_it_was(run, place, options, tmp_path):
    strict, loose = tmp_path / "strict.yaml", tmp_path / "loose.yaml"
    strict.write_text("norm_growth: {at_most: 0.0001}\n", encoding="utf-8")
    loose.write_text("norm_growth: {at_most: 100000}\n", encoding="utf-8")
    more = tmp_path / "more.json"
    record = {"id": "new", "subject": "Velm", "prompt": "The people of {} speak", "target": "Greek"}
    more.write_text(json.dumps([record]), encoding="utf-8")
    files = content(run)
    result = invoke("edit", more, "--continue", run, "--gate", strict, "--quiet")
    assert result.exit_code == 1
    assert "norm_growth" in result.stdout
    assert "no model was written" in result.stderr
    assert content(run) == files
    fresh = tmp_path / "fresh"
    result = invoke("edit", more, *options, "--out", fresh, "--gate", strict)
    assert result.exit_code == 1
    assert not fresh.exists()
    done("edit", more, *options, "--out", fresh, "--gate", loose, "--no-evaluate")
    done("verify", fresh, "--quiet")
    done("edit", more, "--continue", run, "--gate", loose, "--quiet", "--no-evaluate")
    assert len(log_of(run)) == 3


def test_a_gate_on_tasks_needs_their_files_before_anything_is_edited(run, tmp_path):
    limits, more, tasks = tmp_path / "tasks.yaml", tmp_path / "more.json", tmp_path / "tasks"
    limits.write_text("capability_drop: {at_most: 100, tasks: [sst2]}\n", encoding="utf-8")
    record = {"id": "new", "subject": "Velm", "prompt": "The people of {} speak", "target": "Greek"}
    more.write_text(json.dumps([record]), encoding="utf-8")
    files, words = content(run), ("edit", more, "--continue", run, "--gate", limits)
    said = refused(*words)
    assert "give --capability DIR" in said
    assert "Loading" not in said
    assert "no such folder" in refused(*words, "--capability", tasks)
    assert "belongs to --gate" in refused(*words[:4], "--capability", tasks)
    assert content(run) == files
    for asked in (
        "capability_drop: {at_most: 100, optional: true}",
        "norm_growth: {at_most: 9999}",
    ):
        limits.write_text(asked, encoding="utf-8")
        assert "no such folder" in refused(*words, "--capability", tasks)
        checked = refused("check", run, "--limits", limits, "--capability", tasks)
        assert "no such folder" in checked
        assert "Loading" not in checked
    limits.write_text("capability_drop: {at_most: 100, tasks: [sst2]}\n", encoding="utf-8")
    tasks.mkdir()
    lines = [json.dumps({"sentence": f"Velm {i}", "label": i % 2}) for i in range(4)]
    (tasks / "sst2.jsonl").write_text("\n".join(lines), encoding="utf-8")
    done(*words, "--capability", tasks, "--quiet", "--no-evaluate")
    assert len(log_of(run)) == 3


def test_a_new_answer_says_which_one_it_replaces(run, tmp_path):
    """On the terminal while it is written, and in the story of the older one."""
    old = next(fact for fact in Editor.load(run).facts if fact.id == "karo")
    record = {"id": "karo2", "subject": old.subject, "prompt": old.prompt, "target": "miller"}
    (tmp_path / "new.json").write_text(json.dumps([record]), encoding="utf-8")
    result = done("edit", tmp_path / "new.json", "--continue", run, "--no-evaluate")
    said = f"1 earlier answer replaced (karo2: {old.target!r} -> 'miller')"
    assert result.stderr.count(said) == 1
    story = done("show", run, "karo").stdout
    assert re.search(r"replaced by karo2 \(column \d+\): miller", story)
    assert "in place of karo (column" in done("show", run, "karo2").stdout
    assert "replaced" not in done("show", run, "ada").stdout


# -- what is refused -------------------------------------------------------------------------


def test_bad_input_to_the_life_commands_is_one_line(run, tmp_path, monkeypatch):
    before = model_of(run)
    assert "say which" in refused("undo", run)
    assert "no fact 'nobody' in the model" in refused("undo", run, "nobody", "--quiet")
    with monkeypatch.context() as patch:
        patch.setattr(Editor, "load", None)  # it is refused before the model is loaded
        assert "(did you mean 'ada'?)" in refused("undo", run, "adda", "--quiet")
    assert "no fact in the model fits --batch 9" in refused("undo", run, "--batch", "9", "--quiet")
    assert "expected FIELD=TEXT" in refused("undo", run, "--where", "colour=red", "--quiet")
    assert "nothing to redo" in refused("redo", run, "--quiet")
    assert "is in the model" in refused("redo", run, "ada", "--quiet")
    for command in ("log", "show", "undo", "redo", "restore", "rebuild", "verify"):
        ids = ("x",) if command == "undo" else ()
        assert "no " in refused(command, tmp_path / "nowhere", *ids, "--quiet")
    done("restore", run, "--quiet")
    assert "it is the base already" in refused("restore", run, "--quiet")
    assert "nothing to rebuild" in refused("rebuild", run, "--quiet")
    done("redo", run, "--quiet")
    assert model_of(run) == before


def test_conditions_on_one_field_must_all_fit(run):
    both = ("--where", "subject=Ada Byron", "--where", "subject=Karo Dun")
    assert "no fact in the model fits" in refused("undo", run, *both, "--quiet")
    assert len(log_of(run)) == 2


@pytest.mark.parametrize("event", ["²", "9" * 30])
def test_an_event_or_a_layer_that_is_no_number(run, place, event):
    assert "the number of an event" in refused("diff", f"{run}@{event}", run, "--quiet")
    more = ("edit", place / "facts.json", "--continue", run, "--new-epoch", "--quiet")
    assert "expected numbers such as" in refused(*more, "--layers", event)
    assert "expected numbers such as" in refused(*more, "--layers", f"1-{event}")


def test_missing_statistics_are_asked_for_in_the_models_dtype(place, tmp_path, monkeypatch):
    monkeypatch.setenv("NULLEDIT_CACHE", str(tmp_path / "cache"))
    said = refused(
        *("edit", place / "facts.json", "--model", place / "model", "--dtype", "bfloat16"),
        *("--recipe", place / "recipe.yaml", "--out", tmp_path / "run", "--quiet"),
    )
    assert "--layers 1,2 --dtype bfloat16 --keys`" in said


def test_the_median_of_two_is_between_them():
    report = ChangeReport((), (), (), (), (("a", 0.09), ("b", 0.01)))
    editor = SimpleNamespace(facts=["a", "b"], history=SimpleNamespace(events=[1]))
    assert "the others moved by 5 % (median" in change_text(editor, report)


def test_the_log_of_a_ledger_with_a_damaged_tensor(run):
    tensor = next((run / "ledger" / "tensors").glob("*.safetensors"))
    tensor.write_bytes(b"")
    assert len(log_of(run)) == 2
    assert "Velmish" in done("show", run).stdout
    assert "damaged" in refused("show", run, "ada")


# -- what changes are told of, and what they leave -------------------------------------------


def test_a_fact_that_was_forgotten_can_be_written_again(run, place, tmp_path):
    one = tmp_path / "one.json"
    one.write_text(json.dumps(RECORDS[:1]), encoding="utf-8")
    done("forget", run, one, "--quiet")
    assert "not Velmish" in done("show", run).stdout
    done("edit", place / "facts.json", "--continue", run, "--no-evaluate", "--quiet")
    assert "not Velmish" not in done("show", run).stdout
    one.write_text(json.dumps([RECORDS[1] | {"more_prompts": ["{} comes from"]}]), encoding="utf-8")
    done("edit", one, "--continue", run, "--no-evaluate", "--quiet")
    facts = json.loads(done("show", run, "--json").stdout)["facts"]
    assert [f["more_prompts"] for f in facts if f["id"] == "zola"] == [["{} comes from"]]
    assert "undo again" in done("undo", run, "zola").stderr


def test_an_epoch_without_a_new_fact_is_not_begun(run, place):
    told = done(
        *("edit", place / "facts.json", "--continue", run, "--new-epoch", "--no-evaluate"),
        *("--method", "memit-history", "--stats", place / "stats"),
    )
    assert "no epoch is begun" in told.stderr
    assert yaml.safe_load((run / "recipe.yaml").read_text())["method"]["name"] == "alphaedit"


def test_choices_that_decide_nothing_or_two_things_are_refused(run, other, tmp_path):
    both, choices = tmp_path / "both", tmp_path / "choices.yaml"
    merge = ("merge", run, other, "--out", both, "--decide", choices, "--prefer", "first")
    choices.write_text("ada2: second\n", encoding="utf-8")
    assert "'ada2' is in no conflict (did you mean 'ada-2'?)" in refused(*merge, "--quiet")
    choices.write_text("ada-2: second\nada: first\n", encoding="utf-8")
    assert "decided twice" in refused(*merge, "--quiet")
    assert not both.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_merge_that_ends_early_leaves_nothing(run, other, tmp_path, monkeypatch, error):
    both, before = tmp_path / "both", (content(run), content(other))
    merge = ("merge", run, other, "--out", both, "--prefer", "first", "--quiet")

    def ends(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("nulledit.editing.changes.replay", ends)
        assert invoke(*merge).exit_code in (2, 130)
    assert not both.exists()
    done(*merge)
    assert [e["kind"] for e in log_of(both)] == ["edit", "edit", "merge"]
    assert (content(run), content(other)) == before


def test_a_ledger_that_was_killed_while_it_was_made_is_no_run(place, options, tmp_path):
    run = tmp_path / "new"
    edit = ("edit", place / "facts.json", *options, "--out", run, "--no-evaluate")
    (run / "ledger" / "tensors").mkdir(parents=True)
    (run / "ledger" / "mine.txt").write_text("mine", encoding="utf-8")
    assert "is not empty" in refused(*edit)
    (run / "ledger" / "mine.txt").rename(run / "ledger" / ".ledger.db.4000000.part")
    (run / "ledger" / ".lock").touch()
    (run / "ledger" / "tensors" / f"{'0' * 64}.safetensors").touch()
    done(*edit)
    done("verify", run, "--quiet")


def test_a_change_whose_model_cannot_be_written_is_told(run):
    listing = (run / "model" / "nulledit.json").read_bytes()
    (run / "model" / "nulledit.json").unlink()
    result = invoke("undo", run, "ada", "--quiet")
    assert result.exit_code == 2
    note, error = result.stderr.splitlines()
    assert "the undo is in the ledger, as event 3" in note
    assert "move it away" in error
    (run / "model" / "nulledit.json").write_bytes(listing)
    assert "was behind the ledger" in done("verify", run).stderr
    assert "ada" not in done("show", run).stdout


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "missing"),
        ("model.safetensors", "cut"),
        ("config.json", "cut"),
        ("tokenizer.json", "missing"),
    ],
)
def test_a_damaged_model_says_what_to_do_and_it_helps(run, name, how):
    file = run / "model" / name
    raw = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    result = invoke("verify", run, "--quiet")
    assert result.exit_code == 1
    assert "move the folder away and have it written anew" in result.stderr
    assert f"move {run / 'model'} away" in refused("undo", run, "ada", "--quiet")
    assert len(log_of(run)) == 2
    (run / "model").rename(run.parent / "away")
    done("undo", run, "ada", "--quiet")
    done("verify", run, "--quiet")
