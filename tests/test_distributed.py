"""Several processes: the same numbers as one, and a clear end when one of them is gone."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.cli import MAKE_KEYS, RECORDS, done, refused
from support.models import LINES, RECIPE, build_model
from support.ranks import STUCK, free_port, launch

from nulledit.errors import ConfigError
from nulledit.ledger.store import Store
from nulledit.parallel.launch import Launch
from nulledit.parallel.ranks import Ranks, shares

OFTEN = {  # windows that run together are few, so that there is much to share and to save
    "nulledit.statistics.collect:ROUND": 1,
    "nulledit.statistics.collect:SAVE_EVERY": 0.0,
    "nulledit.statistics.collect:SORTED_TOKENS": 512,
}
ADD = "nulledit.statistics.collect:_add"
VALUES = "nulledit.editing.batch_values:optimise_values"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with two models in float64, a text, statistics, a recipe and facts."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, seed in (("model", 0), ("other", 1)):
        build_model("llama", seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n".join(LINES * 40), encoding="utf-8")
    recipe = RECIPE.with_fields({"values.steps": 4, "batch_size": 2})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    (folder / "fewer.json").write_text(json.dumps(RECORDS[:3]), encoding="utf-8")
    return folder


@pytest.fixture
def make(place):
    """The words of `stats make`."""

    def make(out, *, model="model", text="text.txt"):
        return (
            *(*MAKE_KEYS, place / model, "--text", place / text, "--layers", "1-2"),
            *("--window", "16", "--out", out),
        )

    return make


@pytest.fixture(scope="module")
def statistics(place):
    """Made by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nulledit.statistics.collect.SORTED_TOKENS", 512)
        done(
            *(*MAKE_KEYS, place / "model", "--text", place / "text.txt"),
            *("--layers", "1-2", "--window", "16", "--out", place / "stats", "-q"),
        )
    return place / "stats"


@pytest.fixture
def edit(place, statistics):
    """The words of `edit`."""

    def edit(*more, facts="facts.json"):
        return (
            *("edit", place / facts, "--model", place / "model", "--stats", statistics),
            *("--recipe", place / "recipe.yaml", "--no-evaluate", *more),
        )

    return edit


@pytest.fixture(scope="module")
def alone(place, statistics):
    """The run that one process makes."""
    done(
        *("edit", place / "facts.json", "--model", place / "model", "--stats", statistics),
        *("--recipe", place / "recipe.yaml", "--no-evaluate", "--out", place / "alone"),
    )
    return place / "alone"


def same_moments(found, expected):
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (found, expected)]
    for manifest in manifests:
        del manifest["sha256"]  # sums in another order
    assert manifests[0] == manifests[1]
    a, b = (load_file(folder / "moments.safetensors") for folder in (found, expected))
    assert set(a) == set(b) == {"sum.1", "sum.2"}
    for name in a:
        assert (a[name] - b[name]).norm() / b[name].norm() < 1e-12


def same_run(found, expected):
    """The edited matrices, and every column's key, target and value."""
    a, b = (load_file(run / "model/model.safetensors") for run in (found, expected))
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-10 * b[name].norm(), name
    first, second = (Store(run / "ledger").load() for run in (found, expected))
    assert [c.fact.id for c in first.active] == [c.fact.id for c in second.active]
    assert len(first.active) == 4
    for name in ("z", "keys.1", "targets.2"):
        x, y = (h.column_tensor(h.active, name) for h in (first, second))
        assert (x - y).norm() < 1e-10 * y.norm(), name
    for x, y in zip(first.active, second.active, strict=True):
        assert x.outcome.steps == y.outcome.steps


def said_once(ranks, speaker, *words):
    """Each rank that is left ended with code 2, and only `speaker` said why, in one line."""
    for number, rank in enumerate(ranks):
        if rank.code >= 0:  # those below were killed
            assert rank.code == 2, rank
            assert len(rank.errors) == (number == speaker), rank
            assert "Traceback" not in rank.err
    for word in words:
        assert word in ranks[speaker].errors[0]
    assert all(rank.out == "" for rank in ranks)


@pytest.mark.slow
def test_statistics_of_two_ranks_are_those_of_one(place, statistics, make, tmp_path):
    """The text is shared out, summed now and then, and both see the same windows."""
    first, second = launch(place, *[make(tmp_path / "out")] * 2, before=OFTEN)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "layer" in first.out
    assert (second.out, second.err) == ("", "")
    same_moments(tmp_path / "out", statistics)


@pytest.mark.parametrize("dead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_statistics_go_on_after_a_rank_was_killed(place, statistics, make, tmp_path, dead):
    command = make(tmp_path / "out")
    ranks = launch(place, command, command, dies=(dead, ADD, 3), before=OFTEN)
    assert ranks[dead].code == -9
    said_once(ranks, 1 - dead, f"rank {dead} is gone", "start the same command again")
    assert (tmp_path / "out/partial.safetensors").is_file()
    assert not (tmp_path / "out/manifest.json").exists()
    # what was saved is not run again: from the start, each would come to a fifth of ten batches
    ranks = launch(place, command, command, dies=(1 - dead, ADD, 5), before=OFTEN)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    same_moments(tmp_path / "out", statistics)


def test_values_of_two_ranks_are_those_of_one(place, alone, edit, tmp_path):
    first, second = launch(place, *[edit("--out", tmp_path / "run")] * 2)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "4 facts in this run" in first.out
    assert (second.out, second.err) == ("", "")
    same_run(tmp_path / "run", alone)


@pytest.mark.few(("--set", "values.at=each", "--gate", "GATE"), of="more")
@pytest.mark.parametrize(
    "more",
    [
        ("--method", "ft"),
        ("--set", "values.at=each", "--gate", "GATE"),
        ("--set", "values.at=joint"),
    ],
    ids=["by gradient", "values per layer, with a gate", "joint values"],
)
def test_other_ways_to_write_are_the_same_too(place, edit, tmp_path, more):
    (tmp_path / "gate.yaml").write_text("efficacy_strict: {at_least: 0}\n")
    more = [str(tmp_path / "gate.yaml") if word == "GATE" else word for word in more]
    done(*edit("--out", tmp_path / "one", *more))
    ranks = launch(place, *[edit("--out", tmp_path / "two", *more)] * 2)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    a, b = (load_file(tmp_path / f / "model/model.safetensors") for f in ("one", "two"))
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-10 * b[name].norm(), name


@pytest.mark.parametrize(
    "again", ["same command", pytest.param("continue", marks=pytest.mark.slow)]
)
def test_an_edit_goes_on_after_a_rank_was_killed(place, alone, edit, tmp_path, again):
    """Stopped by the launcher, as torchrun does; started anew by it, or by hand."""
    command, run = edit("--out", tmp_path / "run"), tmp_path / "run"
    ranks = launch(place, command, command, dies=(1, VALUES, 2), stop=True)
    assert ranks[1].code == -9
    said_once(ranks, 0, "rank 1 is gone", "1 finished batch is kept", f"--continue {run}")
    if again == "same command":
        ranks = launch(place, command, command, attempt=1)
    else:
        words = ("edit", place / "facts.json", "--continue", run, "--no-evaluate")
        ranks = launch(place, words, words)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    same_run(run, alone)


WRITES = "nulledit.api.run:finish"
ENDS = "nulledit.cli.main:_end_with_others"


@pytest.mark.parametrize(
    ("dies", "stopped"),
    [
        pytest.param(
            (1, "nulledit.cli.edit:own_device", 1), [], id="while both load", marks=pytest.mark.slow
        ),
        pytest.param((1, VALUES, 1), [], id="in the first batch"),
        pytest.param((0, WRITES, 1), [], id="while one waits for the end", marks=pytest.mark.slow),
        pytest.param((1, VALUES, 2), [(0, ENDS, 1)], id="when the other knows already"),
    ],
)
def test_what_a_launcher_stops_is_not_interrupted(place, edit, tmp_path, dies, stopped):
    """Wherever a rank was killed, and whenever the launcher stops the one that is left."""
    command = edit("--out", tmp_path / "run")
    ranks = launch(place, command, command, dies=dies, stopped=stopped, stop=not stopped)
    assert ranks[dies[0]].code == -9
    said_once(ranks, 1 - dies[0], f"rank {dies[0]} is gone")
    assert dies[1] == WRITES or "with: " in ranks[0].err or "same command again" in ranks[0].err


def test_ranks_that_are_all_stopped_were_interrupted(place, edit, tmp_path):
    command, run = edit("--out", tmp_path / "run"), tmp_path / "run"
    ranks = launch(place, command, command, stopped=[(0, VALUES, 2), (1, VALUES, 2)])
    assert [rank.code for rank in ranks] == [130, 130], ranks
    assert [len(rank.errors) for rank in ranks] == [1, 0], ranks
    assert f"interrupted: 1 finished batch is kept in {run}" in ranks[0].err


def test_a_rank_zero_that_is_killed_is_named_by_the_next(place, edit, tmp_path):
    command = edit("--out", tmp_path / "run")
    ranks = launch(place, command, command, dies=(0, VALUES, 1))
    said_once(ranks, 1, "rank 0 is gone", "no batch was finished: start the same command again")
    assert launch(place, command, command)[0].code == 0


def test_ranks_with_other_data_are_refused(place, make, edit, tmp_path):
    out = tmp_path / "out"
    for others, words in (
        ([make(out), make(out, model="other")], ["rank 1 has another model than rank 0"]),
        ([make(out), make(out, text="gone.txt")], ["rank 1: ", "gone.txt: no such file"]),
        ([make(out, text="gone.txt")] * 2, ["gone.txt: no such file"]),
        (
            [edit("--out", out), edit("--out", out, facts="fewer.json")],
            ["rank 1 has another list of facts than rank 0"],
        ),
    ):
        said_once(launch(place, *others), 0, *words)
        assert not out.exists()


def test_torchrun(place, statistics, make, tmp_path):
    """The real launcher, and `python -m nulledit`."""
    words = [str(w) for w in make(tmp_path / "out")]
    started = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port())
    command = [sys.executable, "-m", *map(str, started), "-m", "nulledit", *words, "-q"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=STUCK)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("largest eigenvalues") == 1
    a, b = (load_file(f / "moments.safetensors") for f in (tmp_path / "out", statistics))
    for name in a:
        assert (a[name] - b[name]).norm() / b[name].norm() < 1e-12


def test_other_commands_are_for_one_process(monkeypatch, alone):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    for words in (("log", alone), ("stats", "show", alone)):
        assert "start it without torchrun" in refused(*words)


def test_a_launch_is_read_from_the_environment():
    given = {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "host", "MASTER_PORT": "99"}
    assert Launch.of(given | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}) == Launch(
        3, 4, 1, 2, "host", 99
    )
    assert Launch.of({}) == Launch.of({"WORLD_SIZE": "1"}) == Launch()
    for broken in ({"RANK": "4"}, {"RANK": "x"}, {"MASTER_ADDR": ""}, {"WORLD_SIZE": "-2"}):
        with pytest.raises(ConfigError):
            Launch.of(given | broken)


def test_shares_are_even_and_lose_nothing():
    costs = [5.0, 1, 1, 1, 9, 2, 2, 0]
    dealt = shares(costs, 3)
    assert sorted(i for share in dealt for i in share) == list(range(8))
    assert max(sum(costs[i] for i in share) for share in dealt) == 9
    assert shares([], 2) == [[], []]
    assert shares(costs, 1) == [list(range(8))]


def test_each_rank_takes_the_accelerator_of_its_number(monkeypatch):
    monkeypatch.setattr("nulledit.parallel.ranks.accelerators", lambda: ("cuda", 2))
    second = Ranks(Launch(1, 4, 1, 4, "host", 1))
    last = Ranks(Launch(3, 4, 3, 4, "host", 1))
    assert (second.device(None), second.device("cuda")) == ("cuda:1", "cuda:1")
    assert (second.device("cpu"), last.device("cuda")) == ("cpu", "cuda:1")
    assert Ranks().device("auto") == "auto"
    assert second.device("auto") == "cuda:1"
    with pytest.raises(ConfigError, match="can't be given to several ranks"):
        second.device("cuda:0")
    monkeypatch.setattr("nulledit.parallel.ranks.accelerators", lambda: None)
    assert second.device(None) is second.device("auto") is None


def test_one_process_shares_nothing():
    ranks = Ranks()
    tensors = {"x": torch.ones(2)}
    assert ranks.from_first([1], tensors) == ([1], tensors)
    assert ranks.gather("a") == [("a", {})]
    ranks.sum_at_first(tensors["x"])
    assert tensors["x"].tolist() == [1, 1]
    assert ranks.end(2, "no such file").line == "no such file"
