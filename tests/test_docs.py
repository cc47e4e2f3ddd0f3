"""What README and docs show can be typed and imported."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from nulledit.cli.main import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^(?:\$ )?(?:torchrun .*?-m )?(nulledit .*?)(?:\s+#.*)?$")


def commands():
    """Every command line of a console block, continued lines joined."""
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if found := COMMAND.match(line.strip()):
                    yield page.name, found[1]


def snippets():
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            yield page.name, block


def test_there_are_some_of_both():
    assert len(list(commands())) > 40
    assert len(list(snippets())) > 5


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_a_command_line_has_a_command_and_options_that_exist(page, line):
    words, found, names = shlex.split(line)[1:], cli, []
    while isinstance(found, click.Group) and words:
        part = found.get_command(click.Context(found), words[0])
        if part is None:
            break
        names.append(words.pop(0))
        found = part
    assert not isinstance(found, click.Group) or not words or words[0].startswith("-"), line
    known = {o for p in found.params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
    if isinstance(found, click.Group):
        known |= {"--version", "--debug"}
    used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert used <= known, f"{page}: {line}"


@pytest.mark.parametrize(("page", "source"), list(snippets()))
def test_what_a_snippet_imports_is_there(page, source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nulledit"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"
