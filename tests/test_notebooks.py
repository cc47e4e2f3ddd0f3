"""The notebooks of examples/: their cells run, one after the other, and show what they promise."""

import itertools
import json
import re

import notebooks
import pytest
import torch
from support.cli import done
from support.models import LINES, build_model

from nulledit import config
from nulledit.io.files import cache_folder
from nulledit.models import load
from nulledit.models.embedded import embedded_folder

NAMES = sorted(file.stem for file in notebooks.EXAMPLES.glob("*.ipynb"))
WARNED = re.compile(r"Warning|Traceback|/(home|root|tmp|Users|work|mnt|usr)/")


def told(name):
    return notebooks.read(notebooks.EXAMPLES / f"{name}.ipynb")


def run(name):
    """The names that a notebook's cells leave, and what each shows."""
    names, shown = {}, []
    with notebooks.place():
        for cell in notebooks.code_cells(told(name)):
            shown.append(notebooks.run("".join(cell["source"]), names))
    return names, shown


def check_edit_and_undo(names, shown):
    editor, values = names["editor"], [value for _, value in shown]
    assert [fact.id for fact in editor.facts] == ["seat", "founder"], "one was undone"
    assert ["seat", "founder", "france"] in values, "a preview writes nothing"
    exports = {value.kind for value in values if hasattr(value, "same_as_run")}
    assert exports == {"delta", "lora"}
    assert "2 facts" in shown[-1][0], "the card"


def check_compare_methods(names, shown):
    methods = [row["arm"] for row in names["methods"].rows][1:]
    assert methods == ["gated", "alphaedit", "memit", "local"]
    assert len(names["answers"].rows) == len(names["facts"])
    assert len(names["differences"].rows) == 3
    assert not names["study"].notices, "every method had what it needs"


CHECKS = {"edit_and_undo": check_edit_and_undo, "compare_methods": check_compare_methods}


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    """A tiny model in a folder that has the blocks that the embedded one's recipe edits."""
    folder = tmp_path_factory.mktemp("small") / "model"
    build_model("llama", dtype=torch.float32, layers=7).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parent / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    return folder


@pytest.fixture
def in_its_place(small, monkeypatch):
    """The embedded model's name loads the tiny one, and its recipe takes few steps."""
    given = ("--layers", "3-5", "--window", "64", "--inputs", "--quiet")
    done("stats", "make", small, "--text", small.parent / "corpus.txt", *given)
    source_of, load_recipe = load.source_of, config.load_recipe
    fewer = {"values.steps": 4, "values.rounds": 1}  # random weights come to hold no fact
    monkeypatch.setattr(config, "load_recipe", lambda name: load_recipe(name).with_fields(fewer))
    monkeypatch.setattr(
        load, "source_of", lambda name: str(small) if name == "smollm2-135m" else source_of(name)
    )


def test_every_notebook_is_checked():
    assert set(NAMES) == set(CHECKS)


@pytest.mark.few("edit_and_undo", of="name")
@pytest.mark.parametrize("name", NAMES)
def test_the_cells_run_with_a_tiny_model(name, in_its_place):
    CHECKS[name](*run(name))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_short_cells_each_after_a_sentence(name):
    cells = told(name)["cells"]
    kinds = [cell["cell_type"] for cell in cells]
    for before, here in itertools.pairwise(kinds):
        assert not before == here == "code", "a sentence comes first"
    for cell in notebooks.code_cells(told(name)):
        lines = [line for line in cell["source"] if line.strip()]
        assert len(lines) <= 40
        assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_a_run_is_of_all_cells_and_names_no_place(name):
    cells = notebooks.code_cells(told(name))
    counts = [cell["execution_count"] for cell in cells]
    if any(cell["outputs"] for cell in cells):
        assert counts == list(range(1, len(cells) + 1))
        assert any("text/html" in out.get("data", {}) for cell in cells for out in cell["outputs"])
    else:
        assert set(counts) == {None}
    assert not WARNED.search(json.dumps(told(name), ensure_ascii=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_as_it_is(name, monkeypatch, tmp_path):
    monkeypatch.delenv("NULLEDIT_CACHE")
    embedded_folder("smollm2-135m")  # large, and kept where users keep it; statistics are not
    (tmp_path / "models").symlink_to(cache_folder() / "models")
    monkeypatch.setenv("NULLEDIT_CACHE", str(tmp_path))
    names, shown = run(name)
    CHECKS[name](names, shown)
    if name == "edit_and_undo":
        said = [value for _, value in shown if hasattr(value, "edited")]
        assert [answer.edited.startswith("Lisbon") for answer in said[:2]] == [False, True]
        assert "Paris" in said[-1].edited
    else:
        held = {row["arm"]: row["held"] for row in names["methods"].rows}
        assert held["gated"] == "4 of 4"
