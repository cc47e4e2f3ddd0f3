"""Where the command line is added to: an option of `edit` in one place, an export in two.

And how it tells of its progress.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from support.cli import done, with_line

from nulledit.cli import common
from nulledit.cli.common import Lines, Terminal
from nulledit.cli.going_on import edit_again
from nulledit.config import load_recipe
from nulledit.export.write import EXPORTS, ExportKind

edit_module = importlib.import_module("nulledit.cli.edit")
export_module = importlib.import_module("nulledit.cli.export")
ROW = '    opt("--kl-weight X", "Of the drift.", float, field="values.kl_weight"),'


@pytest.fixture
def edit():
    """`nulledit edit` with one more option."""
    return with_line(edit_module, '    "Recipe:",', ROW).edit


def run(command, *words):
    return CliRunner().invoke(command, [str(word) for word in words])


def test_an_option_of_edit_is_one_row(edit, place, options, tmp_path):
    """Its help, what it sets, where it is refused, and the advice after an interruption."""
    shown = run(edit, "--help").stdout
    recipe = shown[shown.index("Recipe:") : shown.index("Evaluation:")]
    assert "--kl-weight X" in recipe
    folder, words = tmp_path / "run", (place / "facts.json", "--no-evaluate", "--quiet")
    made = run(edit, *words, *options, "--kl-weight", 0.25, "--out", folder)
    assert made.exit_code == 0, made.exception
    assert load_recipe(folder / "recipe.yaml").values.kl_weight == 0.25
    refused = run(edit, *words, "--continue", folder, "--kl-weight", 0.5)
    assert "--kl-weight can't be given with --continue" in str(refused.exception)
    again = ["f.yaml", "--continue", "run", "--new-epoch", "--kl-weight", "0.5"]
    with edit.make_context("edit", again).scope():
        assert "--kl-weight 0.5" in edit_again("run", 0)
        assert "--kl-weight" not in edit_again("run", 1), "the epoch has it by then"


def test_an_export_is_a_file_and_a_row(edited, tmp_path, monkeypatch):
    from nulledit.export.updates import Export

    def write_names(editor, folder, *, run):
        folder = Path(folder)
        folder.mkdir()
        (folder / "facts.txt").write_text(f"{run}: " + ", ".join(f.id for f in editor.facts))
        return Export("names", folder, (), "text", 1)

    module = types.ModuleType("nulledit.export.names")
    module.write_names = write_names
    monkeypatch.setitem(sys.modules, module.__name__, module)
    kind = ExportKind("nulledit.export.names:write_names", (), "Names of facts as {dtype}")
    monkeypatch.setitem(EXPORTS, "names", kind)
    export = with_line(export_module, "", "").export
    out = tmp_path / "names"
    found = run(export, edited, "--as", "names", "--out", out, "--quiet")
    assert found.exit_code == 0, found.exception
    assert "Names of facts as text: " in found.stdout
    assert (out / "facts.txt").read_text() == "run: ada, zola, velm, karo"
    refused = run(export, edited, "--as", "names", "--out", tmp_path / "x", "--rank", 3)
    assert "--rank can't be given with --as names" in str(refused.exception)


def test_progress_is_lines_where_stderr_is_no_terminal(place, tmp_path):
    words = ("edit", place / "facts.json", "--model", place / "model", "--recipe")
    words += (place / "recipe.yaml", "--stats", place / "stats", "--json", "--out")
    told = done(*words, tmp_path / "told")
    json.loads(told.stdout)
    lines = told.stderr.splitlines()
    assert "\r" not in told.stderr
    assert sum(line.startswith("facts: ") for line in lines) == 1, "once a stage, not a batch"
    assert any(line.startswith("before: ") for line in lines)
    quiet = done(*words, tmp_path / "quiet", "--quiet")
    assert quiet.stderr == ""


def test_lines_of_progress_are_ten_seconds_apart(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(common.time, "monotonic", lambda: now)
    lines = Lines()
    for number in range(60):
        lines("tokens", number, 60)
        now += 1
    lines("other", 5, 0)
    lines("tokens", 60, 60)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["tokens: 0 of 60, 0 s", "tokens: 10 of 60, 10 s"]
    assert said[-1] == "other: 5, 60 s"
    assert len(said) == 7


def test_a_terminal_has_bars_that_are_taken_away(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Terminal(quiet=False).progress("before: ") as tell:
        tell("batches", 2, 4)
        tell("values", 1, 2)
        tell("queries", 1, 3)
    said = capsys.readouterr().err
    assert "facts:" in said
    assert "3/4" in said
    assert "before: queries" in said
    assert said.endswith("\r")


def test_a_command_has_json_and_quiet_once():
    from nulledit.cli.main import cli

    for name, command in cli.commands.items():
        flags = [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
        assert len(flags) == len(set(flags)), name
