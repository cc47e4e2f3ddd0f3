"""The tutorial, by its own blocks, on the embedded model."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nulledit import Editor, read_facts

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "tutorial.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(console|yaml)\n(.*?)```", re.S)


def test_there_are_thirty_facts_with_keys_of_their_own():
    facts = read_facts(DOCS / "tutorial.csv").facts
    assert len(facts) == 30
    before = {(f.prompt.partition("{}")[0], f.subject) for f in facts}
    assert len(before) == 30, "facts on one key would share a value"


@pytest.mark.slow
def test_every_block_of_the_tutorial_runs(tmp_path):
    (tmp_path / "docs").symlink_to(DOCS)
    for kind, block in BLOCK.findall(PAGE):
        if kind == "yaml":
            name = block.split("\n", 1)[0].removeprefix("# ").strip()
            (tmp_path / name).write_text(block, encoding="utf-8")
            continue
        for line in block.strip().splitlines():
            words = shlex.split(line.removeprefix("$ nulledit "), comments=True)
            command = [sys.executable, "-m", "nulledit", *words]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            allowed = (0, 1) if words[0] == "check" else (0,)  # 1: a limit is broken
            assert done.returncode in allowed, f"{line}\n{done.stderr}"
    for name in ("adapter/adapter_config.json", "released/model.safetensors"):
        assert (tmp_path / name).is_file(), name
    editor = Editor.load(tmp_path / "run")
    assert not editor.facts, "the base was restored"
    assert len(editor.history.columns) >= 31
