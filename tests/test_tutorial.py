"""The tutorial, by its own blocks, on the embedded model."""

import pytest
from tutorial import DOCS, Step, do, steps

from nulledit import Editor, read_facts

PAGE = (DOCS / "tutorial.md").read_text(encoding="utf-8")


def test_there_are_thirty_facts_with_keys_of_their_own():
    facts = read_facts(DOCS / "tutorial.csv").facts
    assert len(facts) == 30
    before = {(f.prompt.partition("{}")[0], f.subject) for f in facts}
    assert len(before) == 30, "facts on one key would share a value"


def test_every_block_is_a_step():
    found = list(steps(PAGE))
    commands = sum(line.startswith("$ ") for line in PAGE.splitlines())
    assert len(found) == commands + PAGE.count("```yaml")
    assert found[0] == Step("1. A table of facts", "nulledit facts check docs/tutorial.csv")
    assert [step.file for step in found if step.file] == ["price.yaml"]
    assert found[-1].heading == "9. Take it back"


@pytest.mark.slow
def test_every_block_of_the_tutorial_runs(tmp_path):
    (tmp_path / "docs").symlink_to(DOCS)
    for step in steps(PAGE):
        do(step, tmp_path)
    for name in ("adapter/adapter_config.json", "released/model.safetensors"):
        assert (tmp_path / name).is_file(), name
    editor = Editor.load(tmp_path / "run")
    assert not editor.facts, "the base was restored"
    assert len(editor.history.columns) >= 31
