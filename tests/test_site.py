"""The documentation: its links lead somewhere, and its reference is of the code as it is."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
docs_site = importlib.import_module("docs_site")

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


def anchors(page):
    """The ends of links to a page's headings, as sites make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    found = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        words = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", heading).lower()
        words = re.sub(r"[^\w\- ]", "", words)
        found.add(words.strip().replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for match in LINK.finditer(text):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {target}#{anchor}"


def test_the_reference_is_of_the_code(tmp_path):
    docs_site.write(tmp_path / "docs")
    commands = (tmp_path / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    for name in ("edit", "stats make", "compare", "run", "ui", "mcp", "chat"):
        assert f"### `nulledit {name}`" in commands
    settings = (tmp_path / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    for name in ("learning_rate", "old_answer", "exports"):
        assert f"| `{name}` |" in settings
    python = (tmp_path / "docs" / "reference" / "python.md").read_text(encoding="utf-8")
    for name in ("Editor.edit", "Run.open", "Fact"):
        assert f"`{name}`" in python
    index = (tmp_path / "docs" / "index.md").read_text(encoding="utf-8")
    assert "](docs/" not in index
    assert "](CITATION.cff)" not in index, "what the site has no place for is no link"
