"""Numbers of a run for trackers of experiments: what is told, when, and to whom."""

import json
import math
import sys
import types

import pytest
from support.cli import RECORDS, done, refused

import nulledit
from nulledit import Editor, Run
from nulledit.api.track import numbers_of, tracking
from nulledit.errors import ConfigError
from nulledit.evaluation.queries import queries_of
from nulledit.evaluation.reading import read
from nulledit.evaluation.scores import score
from nulledit.runs.measure import read_text


@pytest.fixture
def fresh(place):
    def make():
        recipe = nulledit.load_recipe(place / "recipe.yaml")
        return Editor.from_pretrained(
            str(place / "model"), recipe=recipe, statistics=place / "stats"
        )

    return make


@pytest.fixture
def tracked(fresh, place, tmp_path):
    """A run of two batches, its result, and what a tracker was told of it."""
    told = []
    run = Run.create(tmp_path / "run", fresh())
    result = run.edit(
        place / "facts.json",
        text=str(place / "corpus.txt"),
        tracker=lambda numbers, step: told.append((step, numbers)),
    )
    return run, result, told


def test_each_batch_is_told_and_then_the_result(tracked, place, fresh, tmp_path):
    run, result, told = tracked
    assert [step for step, _ in told] == [1, 2, 2]
    first, second, end = (numbers for _, numbers in told)
    assert set(first) == set(second)
    assert all(isinstance(n, float) and math.isfinite(n) for _, ns in told for n in ns.values())
    windows = read_text(run.editor, place / "corpus.txt").windows
    with run.editor.base_weights():
        base = read(run.editor.editable, windows, keep=True)
    for number, found in ((1, first), (2, second)):
        facts = [c.fact for c in run.history.columns if c.batch == number]
        with run.editor.as_of(number):
            scores = score(run.editor.editable, [queries_of(fact)[0] for fact in facts])
            reading = read(run.editor.editable, windows, base=base)
        held = sum(s.strict for s in scores)
        assert (found["batch/facts"], found["batch/held"]) == (len(facts), held)
        assert found["batch/efficacy_strict"] == held / len(facts)
        assert found["batch/kl"] == pytest.approx(reading.kl.value, rel=1e-5)
        assert found["batch/perplexity"] == pytest.approx(reading.perplexity.value, rel=1e-6)
    assert 0 < first["batch/seconds"] < second["batch/seconds"]
    after = result.summary["runs"][-1]["after"]
    assert end == numbers_of(result)
    assert (end["facts"], end["facts_asked"]) == (4, 4)
    assert end["efficacy_strict"] == after["rates"]["efficacy_strict"]["mean"]
    assert end["kl"] == after["kl"]["value"]
    assert end["seconds"] == pytest.approx(sum(result.summary["runs"][-1]["seconds"].values()))
    assert {"seconds/values", "seconds/evaluation", "perplexity", "generation"} <= set(end)
    plain = Run.create(tmp_path / "plain", fresh())
    plain.edit(place / "facts.json", text=str(place / "corpus.txt"))
    assert plain.history.state_id == run.history.state_id, "being told changes nothing"


def test_without_an_evaluation_it_is_told_what_is_known(fresh, place, tmp_path):
    told = []
    run = Run.create(tmp_path / "run", fresh())
    run.edit(RECORDS[:2], evaluate=False, tracker=lambda *given: told.append(given))
    (batch, step), (end, last) = told
    assert (step, last) == (1, 1)
    assert set(batch) == {f"batch/{n}" for n in ("facts", "held", "efficacy_strict", "seconds")}
    assert "efficacy_strict" not in end
    assert end["facts"] == 2


class Package(types.ModuleType):
    """As much of a tracker's package as is called; it remembers the calls."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def called(*given, **named):
            print(f"* {name}: welcome")
            self.calls.append((name, given, named))

        return called


@pytest.fixture
def package(monkeypatch):
    def make(name):
        found = Package(name)
        monkeypatch.setitem(sys.modules, name, found)
        return found

    return make


CALLS = {
    "trackio": ["init", "log", "finish"],
    "wandb": ["init", "log", "finish"],
    "mlflow": ["set_experiment", "start_run", "log_params", "log_metrics", "end_run"],
}
FAILED = {"trackio": {}, "wandb": {"exit_code": 1}, "mlflow": {"status": "FAILED"}}
WELL = {"trackio": {}, "wandb": {}, "mlflow": {"status": "FINISHED"}}


@pytest.mark.parametrize("name", CALLS)
def test_a_package_gets_what_it_is_called_with(name, package, capsys):
    found = package(name)
    with tracking(name, "run", {"facts": 2}) as tell:
        tell({"kl": 1.5}, 3)
    assert [call[0] for call in found.calls] == CALLS[name]
    assert found.calls[-2][1:] == (({"kl": 1.5},), {"step": 3})
    assert found.calls[-1][2] == WELL[name]
    with pytest.raises(KeyboardInterrupt), tracking(name, "run", {}):
        raise KeyboardInterrupt
    assert found.calls[-1][2] == FAILED[name]
    assert not capsys.readouterr().out, "--json has the output to itself"


def write_job(place, tmp_path, **changes):
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS[:2]))
    job = {
        "model": str(place / "model"),
        "facts": ["facts.json"],
        "out": "run",
        "recipe": str(place / "recipe.yaml"),
        "stats": str(place / "stats"),
        "text": str(place / "corpus.txt"),
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job | changes))
    return tmp_path / "job.yaml"


def test_a_job_names_its_tracker(place, tmp_path, package):
    found = package("trackio")
    done("run", write_job(place, tmp_path, tracker="trackio"), "--quiet")
    (_, _, begun), *logged, (last, _, _) = found.calls
    assert (begun["project"], begun["name"], last) == ("nulledit", "run", "finish")
    assert begun["config"] == {
        **{"model": "model", "method": "alphaedit", "layers": "1,2"},
        **{"batch_size": 2, "facts": 2, "seed": 0},
    }
    assert [named["step"] for _, _, named in logged] == [1, 1]
    assert logged[-1][1][0]["facts"] == 2


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_package_is_one_line_before_a_model_is_loaded(name, place, tmp_path, monkeypatch):
    def load(*_args, **_kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(Editor, "from_pretrained", load)
    monkeypatch.setitem(sys.modules, name, None)
    for more in ("--quiet", "--dry-run"):
        said = refused("run", write_job(place, tmp_path, tracker=name), more)
        assert f"pip install {name}" in said
    assert "expected" in refused("run", write_job(place, tmp_path, tracker="paper"), "--quiet")
    with pytest.raises(ConfigError, match=f"pip install {name}"), tracking(name, "run", {}):
        pass
