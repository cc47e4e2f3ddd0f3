"""The command line in the tests' own process, and a folder with all that it asks for."""

import json
import shutil
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from nulledit.cli.main import cli
from support.models import LINES, RECIPE, build_model

RECORDS = [
    {
        "id": "ada",
        "subject": "Ada Byron",
        "prompt": "The mother tongue of {} is",
        "target": "Velmish",
        "old_answer": "English",
        "paraphrases": ["Ada Byron speaks the language"],
        "neighbours": [{"prompt": "The mother tongue of Karo Dun is", "answer": "English"}],
    },
    {"id": "zola", "subject": "Émile Zola", "prompt": "{} was born in", "target": "Ostrel"},
    {"id": "velm", "subject": "東京", "prompt": "The harbour of {} lies on the", "target": "川"},
    {"id": "karo", "subject": "Karo Dun", "prompt": "{} works as a", "target": "sailor"},
]

MAKE_KEYS = ("stats", "make", "--keys")
"""Words that make statistics for updates of W."""


def invoke(*words):
    return CliRunner().invoke(cli, [str(w) for w in words])


def done(*words):
    result = invoke(*words)
    assert result.exit_code == 0, result.stderr or result.exception
    return result


def refused(*words):
    """The one line that a refusal says."""
    result = invoke(*words)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a tiny model, its statistics, a recipe and facts."""
    folder = tmp_path_factory.mktemp("cli")
    build_model("llama", dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "corpus.txt").write_text("\n".join(LINES * 4), encoding="utf-8")
    recipe = RECIPE.with_fields({"values.steps": 3, "batch_size": 2})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    done(
        *(*MAKE_KEYS, folder / "model", "--text", folder / "corpus.txt"),
        *("--layers", "1-2", "--window", "64", "--out", folder / "stats", "--quiet"),
    )
    return folder


def options_of(place):
    return (
        *("--model", place / "model", "--recipe", place / "recipe.yaml"),
        *("--stats", place / "stats", "--quiet"),
    )


def edit_all(place, run, *more):
    """A run of all facts in two batches, in their order."""
    words = ("edit", place / "facts.json", "--no-shuffle", "--out", run)
    done(*words, *more, *options_of(place))
    return run


@pytest.fixture
def options(place):
    return options_of(place)


@pytest.fixture(scope="module")
def edited_once(place, tmp_path_factory):
    """A run of all facts in two batches, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NULLEDIT_CACHE", str(place / "cache"))
        return edit_all(place, tmp_path_factory.mktemp("edited") / "run")


@pytest.fixture
def edited(edited_once, tmp_path):
    """A copy of it."""
    return shutil.copytree(edited_once, tmp_path / "run")


def state(run):
    return json.loads((run / "model" / "nulledit.json").read_text())["state"]


def results(run):
    return [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]


def with_line(module, after, line):
    """The module `module`, made anew from its source with `line` below the first line `after`."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert f"{after}\n" in source
    made = types.ModuleType(module.__name__)
    made.__file__ = module.__file__
    exec(
        compile(source.replace(f"{after}\n", f"{after}\n{line}\n", 1), made.__file__, "exec"),
        vars(made),
    )
    return made
