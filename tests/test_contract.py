"""What scripts rest on: options, keys of --json, a run folder's files and keys, and weights.

    pytest tests/test_contract.py --write-contract

writes `contract.json` anew after a change that users are told of.
"""

import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.cli import RECORDS, done
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.cli.main import cli

CONTRACT = Path(__file__).with_name("contract.json")
OTHERS = [{"id": "lyra", "subject": "Lyra Holm", "prompt": "{} plays the", "target": "flute"}]
NAMES = {r["id"] for r in RECORDS + OTHERS}
METHODS = ("alphaedit", "memit", "rome")


def commands(command=cli, name="nulledit"):
    """Every command and its options, as a user writes them."""
    if isinstance(command, click.Group):
        for part in command.list_commands(click.Context(command)):
            found = command.get_command(click.Context(command), part)
            yield from commands(found, f"{name} {part}")
    else:
        yield name, sorted(o for p in command.params for o in [*p.opts, *p.secondary_opts])


def keys(value):
    """The keys of a JSON value, at any depth: names of facts and numbers of layers are one key."""
    if isinstance(value, list):
        found = {}
        for item in value:
            found = joined(found, keys(item))
        return found
    if not isinstance(value, dict):
        return {}
    found = {}
    for name, item in value.items():
        key = "*" if re.fullmatch(r"\d+", name) or name in NAMES else name
        found[key] = joined(found.get(key, {}), keys(item))
    return found


def joined(first, second):
    return first | {k: joined(first.get(k, {}), v) for k, v in second.items()}


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
    """`info` lists what the cache holds, which is each user's own; what runs once meets none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NULLEDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def said(place):
    """The JSON of each command, in one life of a run."""
    model, run, text = place / "model", place / "run", ("--text", place / "corpus.txt")
    given = ("--model", model, "--recipe", place / "recipe.yaml", "--stats", place / "made-here")
    (place / "others.json").write_text(json.dumps(OTHERS), encoding="utf-8")
    (place / "gate.yaml").write_text("efficacy: {at_least: 0}\n", encoding="utf-8")
    found = {}

    def say(name, *words):
        result = CliRunner().invoke(cli, [*name.split(), *map(str, words), "--json"])
        assert result.exit_code in (0, 3), (name, result.stderr, result.exception)
        found[name] = keys(json.loads(result.stdout))

    layers = ("--keys", "--layers", "1-2", "--window", "64")
    say("stats make", model, *text, *layers, "--out", place / "made-here")
    say("stats show", place / "made-here")
    say("facts check", place / "facts.json", "--model", model)
    say("info")
    say("methods")
    say("edit", place / "facts.json", *given, *text, "--out", run, "--gate", place / "gate.yaml")
    found["edit --dry-run"] = keys(
        json.loads(
            done("edit", place / "facts.json", *given, "--dry-run", "--json", "--out", "x").stdout
        )
    )
    say("evaluate", run, *text, "--fluency", "--by-relation", "--distract")
    say("check", run, "--limits", place / "gate.yaml", *text)
    say("ask", run, "The mother tongue of Ada Byron is")
    (place / "prompts.txt").write_text("The mother tongue of Ada Byron is\n", encoding="utf-8")
    say("chat", run, "--plain", "--prompts", place / "prompts.txt")
    say("log", run)
    say("show", run)
    say("show", run, "ada")
    say("preview", run, place / "others.json", *text)
    say("undo", run, "zola")
    say("redo", run, "zola")
    say("verify", run)
    say("retry", run, *text)
    say("forget", run, "--subject", "Karo Dun", "--prompt", "{} lives in", "--target", "Ostrel")
    done("edit", place / "others.json", *given, "--out", place / "other", "--quiet")
    say("diff", run, place / "other")
    say("merge", run, place / "other", "--out", place / "merged")
    say("rebuild", place / "other")
    say("report", run, place / "other", "--out", place / "compared")
    say("export", run, "--as", "delta", "--out", place / "delta")
    say("apply", place / "delta", model, "--out", place / "applied")
    say("restore", run)
    return found


def folder_of(run):
    """Files of a run folder, with the keys of those that hold JSON."""
    found = {}
    for file in sorted(run.rglob("*")):
        name = re.sub(r"[0-9a-f]{16,}", "HASH", str(file.relative_to(run)))
        if file.suffix == ".jsonl":
            found[name] = keys([json.loads(line) for line in file.read_text().splitlines()])
        elif file.suffix == ".json":
            found[name] = keys(json.loads(file.read_text()))
        elif file.is_file():
            found[name] = {}
    return found


def story(method, tokenizer):
    """The change of each layer's weights after an edit, a correction and an undo: norm and trace.

    All in float64 on random weights, with few steps: no rounding grows to a thousandth here.
    """
    editor = Editor(
        build_model("llama"),
        tokenizer,
        recipe=RECIPE.with_fields({"values.steps": 4, "method.name": method}),
        statistics=statistics_of(build_model("llama"), tokenizer),
    )
    facts = [Fact.from_dict(r) for r in RECORDS]
    editor.edit(facts[:2])
    editor.edit(facts[2:])
    editor.edit([Fact.from_dict(RECORDS[0] | {"id": "ada-2", "target": "Ostrelish"})])
    editor.undo("zola")
    found = {}
    for layer in editor.recipe.layers:
        after = editor.model.model.layers[layer].mlp.down_proj.weight.detach().clone()
        with editor.base_weights():
            before = editor.model.model.layers[layer].mlp.down_proj.weight.detach().clone()
            change = after - before
        found[str(layer)] = [float(change.norm()), float(change.diagonal().sum())]
    return found


@pytest.fixture(scope="module")
def contract(pytestconfig, said, place, tokenizer):
    """What is written down."""
    if pytestconfig.getoption("--write-contract"):
        now = {
            "options": dict(commands()),
            "json": said,
            "run": folder_of(place / "run"),
            "story": {method: story(method, tokenizer) for method in METHODS},
        }
        CONTRACT.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return json.loads(CONTRACT.read_text(encoding="utf-8"))


def test_every_command_has_the_options_it_had(contract):
    assert dict(commands()) == contract["options"]


def test_the_json_of_every_command_has_the_keys_it_had(contract, said):
    assert said == contract["json"]


def test_a_run_folder_has_the_files_and_keys_it_had(contract, said, place):
    assert folder_of(place / "run") == contract["run"]


@pytest.mark.parametrize("method", METHODS)
def test_a_story_of_edits_leaves_the_weights_it_left(contract, method, tokenizer):
    for layer, numbers in story(method, tokenizer).items():
        assert numbers == pytest.approx(contract["story"][method][layer], rel=1e-3, abs=1e-6)
