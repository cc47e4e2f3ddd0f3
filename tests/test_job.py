"""`nulledit run`: what a job's file says is what the commands of it would do."""

import json
import shutil

import pytest
import yaml
from support.cli import RECORDS, done, invoke, refused

from nulledit import Editor
from nulledit.api.job import load_job
from nulledit.cli.run import job_schema
from nulledit.errors import ConfigError

GATED = {"set": {"method.name": "gated"}}


@pytest.fixture
def write(place, tmp_path):
    """Writes a job's file with changes, beside its facts."""
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS[:2]))
    (tmp_path / "more.json").write_text(json.dumps(RECORDS[2:3]))
    (tmp_path / "model").symlink_to(place / "model")

    def make(**changes):
        job = {
            "model": "model",
            "facts": ["facts.json"],
            "out": "run",
            "recipe": str(place / "recipe.yaml"),
            "stats": str(place / "stats"),
            "text": str(place / "corpus.txt"),
            **changes,
        }
        file = tmp_path / "job.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in job.items() if v is not None}))
        return file

    return make


def test_a_job_is_its_commands(write, place, tmp_path):
    limits = {"efficacy_strict": {"at_least": 0}}
    (tmp_path / "limits.yaml").write_text(yaml.safe_dump(limits))
    file = write(
        gate="limits.yaml",
        exports=[{"kind": "lora", "out": "adapter", "options": {"rank": 4}}],
        report="page.html",
        set={"values.steps": 3},
    )
    shown = done("run", file, "--quiet").stdout
    for said in ("adapter", "page.html", "hold"):
        assert said in shown, said
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "page.html").is_file()
    edit = ("edit", tmp_path / "facts.json", "--model", place / "model", "--quiet")
    options = ("--recipe", place / "recipe.yaml", "--stats", place / "stats", "--steps", "3")
    done(*edit, *options, "--text", place / "corpus.txt", "--out", tmp_path / "by-hand")
    states = [Editor.load(tmp_path / name).history.state_id for name in ("run", "by-hand")]
    assert states[0] == states[1]


def test_the_same_job_goes_on_with_what_is_new(write, tmp_path):
    done("run", write(), "--quiet")
    first = Editor.load(tmp_path / "run").history.state_id
    again = invoke("run", write())
    assert again.exit_code == 0
    assert "every fact is in the run already" in again.stderr
    assert Editor.load(tmp_path / "run").history.state_id == first
    told = json.loads(done("run", write(facts=["facts.json", "more.json"]), "--json").stdout)
    assert told["edit"]["runs"][-1]["facts"] == 1
    assert len(Editor.load(tmp_path / "run").facts) == 3


def test_the_same_job_goes_on_after_an_export_that_failed(write, tmp_path, monkeypatch):
    """And what it made of this very state is left as it is; of another state it is in the way."""
    file = write(exports=[{"kind": "delta", "out": "one"}, {"kind": "lora", "out": "two"}])

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as now:
        now.setattr("nulledit.export.lora.write_lora", full)
        assert invoke("run", file, "--quiet").exit_code != 0
    made = (tmp_path / "one" / "manifest.json").stat().st_mtime_ns
    again = invoke("run", file)
    assert again.exit_code == 0, again.stderr
    assert "one is there, of this very state" in again.stderr
    assert (tmp_path / "one" / "manifest.json").stat().st_mtime_ns == made
    assert (tmp_path / "two" / "adapter_config.json").is_file()
    told = json.loads(done("run", file, "--json").stdout)
    assert told == {"edit": None, "exports": [], "report": None}
    exports = [{"kind": "delta", "out": "one"}]
    assert "one: exists already" in refused(
        "run", write(facts=["facts.json", "more.json"], exports=exports), "--dry-run"
    )


@pytest.mark.parametrize("facts", [["facts.json"], ["facts.json", "more.json"]])
def test_a_retry_that_was_interrupted_is_made_by_the_same_job(facts, write, tmp_path, monkeypatch):
    """Of the facts that were in the run as well, and of no other than the job's."""

    def stops(*_words, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr("nulledit.api.run.retry_failing", stops)
        assert invoke("run", write(retry=1), "--quiet").exit_code == 130
    asked = []

    def look(_editor, told, _progress):
        asked.append([fact.id for fact in told])
        return told[:1] if len(asked) == 1 else []

    monkeypatch.setattr("nulledit.evaluation.retry.failing_facts", look)
    exports = [{"kind": "delta", "out": "delta"}]
    file = write(retry=1, facts=facts, exports=exports)
    told = json.loads(done("run", file, "--json").stdout)
    assert set(asked[0]) == {"ada", "zola", "velm"} - ({"velm"} if len(facts) == 1 else set())
    assert told["edit"]["facts"] == len(asked[0])
    history = Editor.load(tmp_path / "run").history
    assert [event.kind for event in history.events][-1] == "retry"
    asked.clear()
    assert "of this very state" in done("run", file).stderr
    assert not asked


def test_a_job_says_why_a_retry_wrote_nothing(write, tmp_path, monkeypatch):
    monkeypatch.setattr("nulledit.evaluation.retry.failing_facts", lambda *_: [])
    done("run", write(), "--quiet")
    done("edit", tmp_path / "more.json", "--continue", tmp_path / "run", "--quiet")
    assert "every fact holds: nothing was written" in done("run", write(retry=2)).stderr


def test_an_export_with_other_options_is_in_the_way(write, tmp_path):
    def job(**options):
        return write(exports=[{"kind": "lora", "out": "adapter", "options": options}])

    done("run", job(rank=4), "--quiet")
    assert "is there, of this very state" in invoke("run", job(rank=4, text=None)).stderr
    assert str(tmp_path) not in (tmp_path / "adapter" / "nulledit-export.json").read_text()
    for options in ({}, {"rank": 8}, {"rank": 4, "dtype": "bfloat16"}):
        assert "exists already" in refused("run", job(**options), "--quiet")


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry"])
def test_a_run_of_another_model_is_refused(more, write, place, tmp_path):
    done("run", write(), "--quiet")
    other = shutil.copytree(place / "model", tmp_path / "other")
    exports = [{"kind": "delta", "out": "delta"}]
    said = refused("run", write(model="other", exports=exports), *more)
    for named in (str(other), str(place / "model")):
        assert named in said
    assert not (tmp_path / "delta").exists()


def test_a_run_goes_on_where_its_folder_and_model_were_moved(write, place, tmp_path):
    (tmp_path / "model").unlink()
    (tmp_path / "first").mkdir()
    shutil.copytree(place / "model", tmp_path / "first" / "model")
    done("run", write(model="first/model"), "--quiet")
    (tmp_path / "first").rename(tmp_path / "then")
    job = write(model="then/model", facts=["facts.json", "more.json"], seed=3, dtype="bfloat16")
    said = done("run", job).stderr
    assert "its own recipe, statistics, seed 0 (the job's: 3) and dtype float32" in said
    assert len(Editor.load(tmp_path / "run").facts) == 3


def test_a_job_killed_in_its_first_batch_begins_again(write, tmp_path):
    job = load_job(write())
    editor = Editor.from_pretrained(job.model, recipe=job.recipe, statistics=job.stats)
    editor.attach(job.out)  # what a kill leaves: a ledger without an event
    done("run", write(), "--quiet")
    assert len(Editor.load(tmp_path / "run").facts) == 2


def test_a_broken_limit_writes_nothing_and_exits_with_1(write, tmp_path):
    (tmp_path / "limits.yaml").write_text("kl: {at_most: 1.0e-12}\n")
    exports = [{"kind": "delta", "out": "delta"}]
    ended = invoke("run", write(gate="limits.yaml", exports=exports, report="page.html"), "--quiet")
    assert ended.exit_code == 1
    assert "kl" in ended.stdout
    for name in ("run", "delta", "page.html"):
        assert not (tmp_path / name).exists(), name


def test_limits_hold_for_a_run_that_has_every_fact_already(write, tmp_path):
    done("run", write(), "--quiet")
    (tmp_path / "limits.yaml").write_text(
        "efficacy_strict: {at_least: 100}\nkl: {at_most: 1e-12}\n"
    )
    exports = [{"kind": "delta", "out": "delta"}]
    ended = invoke("run", write(gate="limits.yaml", exports=exports), "--quiet")
    assert ended.exit_code == 1
    assert "kl" in ended.stdout
    assert not (tmp_path / "delta").exists()


def test_a_dry_run_edits_nothing(write, tmp_path):
    told = json.loads(done("run", write(), "--dry-run", "--json").stdout)
    assert told["facts"] == 2
    assert not (tmp_path / "run").exists()
    assert "2 facts in 1 batch: at most" in done("run", write(), "--dry-run").stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modle": "x"}, "modle"),
        ({"facts": None}, "facts is missing"),
        ({"facts": ["nowhere.json"]}, "nowhere.json"),
        ({"retry": -1}, "retry is -1"),
        ({"exports": [{"kind": "onnx", "out": "x"}]}, "expected one of"),
        ({"exports": [{"kind": "delta", "out": "x", "options": {"text": "t"}}]}, "text can't be"),
        ({"exports": [{"kind": "delta", "out": "facts.json"}]}, "exists already"),
        ({"exports": [{"kind": "delta", "out": "x"}, {"kind": "lora", "out": "x"}]}, "of its own"),
        ({"exports": [{"kind": "lora", "out": "x", "options": {"rank": "8"}}]}, "rank: expected a"),
        ({"exports": [{"kind": "lora", "out": "x", "options": {"rank": 0}}]}, "rank: expected a"),
        ({"exports": [{"kind": "lora", "out": "x", "options": {"rank": True}}]}, "at least 1"),
        ({"exports": [{"kind": "lora", "out": "x", "options": {"rank": 4000}}]}, "1 to 512"),
        ({"exports": [{"kind": "delta", "out": "run/model"}]}, "is where the run lies"),
        ({"exports": [{"kind": "delta", "out": "run/ledger/x"}]}, "is where the run lies"),
        ({"exports": [{"kind": "delta", "out": "run"}]}, "is where the run lies"),
        ({"exports": [{"kind": "delta", "out": "."}]}, "is where the run lies"),
        ({"facts": ["facts.json", "other.json"]}, "contradict each other"),
        ({"facts": ["facts.json", "same_id.json"]}, "names two facts"),
        ({"exports": [{"kind": "lora", "out": "x", "options": {"experts": "Each"}}]}, "or each"),
        ({"exports": [{"kind": "gguf", "out": "x", "options": {"same_shape": 1}}]}, "or false"),
        ({"gate": "nowhere.yaml"}, "nowhere.yaml"),
        ({"set": {"values.stepz": 3}}, "stepz"),
        ({"facts": []}, "facts: there are none"),
        ({"stats": "nowhere"}, "nowhere"),
        ({"text": "nowhere.txt"}, "nowhere.txt is not there"),
        ({"capability": "tasks"}, "tasks is not there"),
        ({"out": "facts.json"}, "is a file"),
        ({"report": "."}, "is a folder"),
        ({"report": "facts.json"}, "not made by `nulledit report`"),
        ({"exports": [{"kind": "gguf", "out": "x"}]}, "give a GGUF file of the base"),
        (
            {"exports": [{"kind": "gguf", "out": "x", "options": {"gguf": "b.gguf"}}]},
            "no such file",
        ),
        ({"exports": [{"kind": "delta", "out": "facts.json/x"}]}, "facts.json is no folder"),
        ({"exports": [{"kind": "delta", "out": "x", "options": {"dtype": "int3"}}]}, "int3"),
        ({"exports": [{"kind": "gguf", "out": "x", "options": {"tensor_type": "q9"}}]}, "q9"),
        (
            {"exports": [{"kind": "lora", "out": "x", "options": {"text": "no.txt"}}]},
            "is not there",
        ),
        (
            {"exports": [{"kind": "checkpoint", "out": "x", "options": {"same_shape": True}}]},
            "exports: same_shape is for gated edits",
        ),
        (
            {"exports": [{"kind": "checkpoint", "out": "x", "options": {"text": "facts.json"}}]},
            "text goes with same_shape",
        ),
        (
            {"exports": [{"kind": "lora", "out": "x", "options": {"text": "facts.json"}}]},
            "text is for gated edits",
        ),
        (
            GATED | {"exports": [{"kind": "delta", "out": "x", "options": {"rank": 2}}]},
            "exports: rank can't be given for gated edits",
        ),
        (
            GATED | {"exports": [{"kind": "lora", "out": "x", "options": {"rank": 2}}]},
            "exports: rank can't be given for gated edits",
        ),
        ({"retry": 1, "set": {"method.name": "ft"}}, "ft optimises none"),
    ],
)
def test_what_cannot_be_is_one_line_before_a_model_is_loaded(
    changes, said, write, tmp_path, monkeypatch
):
    for name, other in (("other", {"id": "b", "target": "Otrin"}), ("same_id", RECORDS[2])):
        record = RECORDS[0] | other | ({"id": RECORDS[0]["id"]} if name == "same_id" else {})
        (tmp_path / f"{name}.json").write_text(json.dumps([record]))

    def load(*_args, **_kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(Editor, "from_pretrained", load)
    assert said in refused("run", write(**changes), "--quiet")
    assert said in refused("run", write(**changes), "--dry-run")


def test_paths_are_those_of_the_files_folder(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    exports = [{"kind": "lora", "out": "a", "options": {"text": "t.txt", "rank": 4}}]
    job = load_job(write(exports=exports, report="r.html", recipe=None))
    assert job.exports[0].options == {"text": str(tmp_path / "t.txt"), "rank": 4}
    assert job.out == str(tmp_path / "run")
    assert job.model == str((tmp_path / "model").resolve())
    assert job.exports[0].out == str(tmp_path / "a")
    assert job.recipe is None
    assert load_job(write(model="an/id")).model == "an/id"
    with pytest.raises(ConfigError, match="no-such-job"):
        load_job("no-such-job")


def test_broken_yaml_is_told_with_its_place_once(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("model: [a\n")
    said = refused("run", file)
    assert "broken YAML" in said
    assert said.count(str(file)) == 1


def test_the_schema_names_every_field():
    schema = job_schema()
    assert json.loads(done("run", "--schema").stdout) == schema
    assert set(schema["required"]) == {"model", "facts", "out"}
    assert schema["properties"]["gate"]["description"]
    assert "give a job's file" in refused("run")
