"""A run folder that version 0.1.0 wrote still opens, verifies, and goes on."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from support.cli import RECORDS, done

from nulledit import Editor, Fact
from nulledit.api.run import Run

OLD = Path(__file__).parent / "data" / "run-0.1.0.tar.xz"
STATE = "dab74face25c354f3d1058bcfaac4fa8e3c9eb950e45f52e27c5d12d77deb47f"


@pytest.fixture
def run(tmp_path):
    """Four facts in two batches by AlphaEdit, the second one undone."""
    with tarfile.open(OLD) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_it_has_the_state_it_had_and_passes_every_check(run):
    editor = Editor.load(run)
    assert editor.history.state_id == STATE
    assert json.loads((run / "model" / "nulledit.json").read_text())["state"] == STATE
    assert [f.id for f in editor.facts] == ["ada", "velm", "karo"]
    assert Run.open(run).verify().passed
    assert editor.recipe.values.stop_margin is None, "the rule of then"
    assert editor.recipe.values.rounds == 1


def test_its_undo_is_taken_back_and_done_again_to_the_bit(run):
    editor = Editor.load(run)
    before = {n: p.clone() for n, p in editor.model.state_dict().items()}
    editor.redo()
    assert len(editor.facts) == 4
    assert any(not torch.equal(p, before[n]) for n, p in editor.model.state_dict().items())
    editor.undo("zola")
    assert editor.history.state_id == STATE
    assert all(torch.equal(p, before[n]) for n, p in editor.model.state_dict().items())


def test_it_goes_on(run):
    more = Fact(id="lyra", subject="Lyra Holm", prompt="{} plays the", target="flute")
    result = Run.open(run).edit([more])
    assert [line["id"] for line in result.lines] == ["lyra"]
    assert result.summary["runs"][-1]["run"] == 2
    again = Editor.load(run)
    assert [f.id for f in again.facts] == ["ada", "velm", "karo", "lyra"]
    assert again.history.epochs[0].stored["values"]["stop_when_likeliest"] is False, "as stored"


def test_its_story_is_told(run):
    story = json.loads(done("show", run, "zola", "--json").stdout)
    assert not story["in_the_model"]
    assert story["versions"][0]["outcome"]["steps"] == 2
    log = json.loads(done("log", run, "--json").stdout)
    assert [event["kind"] for event in log["events"]] == ["edit", "edit", "undo"]
    assert story["fact"]["subject"] == RECORDS[1]["subject"]


@pytest.mark.parametrize("command", ["log", "show"])
def test_the_ledger_is_read_without_torch_and_pydantic(run, command):
    script = (
        f"import sys; sys.argv = ['nulledit', {command!r}, {str(run)!r}]\n"
        "from nulledit.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "ada" in found.stdout
