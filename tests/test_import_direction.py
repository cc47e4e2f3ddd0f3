"""Imports go one way, down the list in docs/design.md."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "nulledit"
ORDER = [
    "errors",
    "launch",
    "distributed",
    "files",
    "reading",
    "config",
    "linalg",
    "data",
    "models",
    "editing",
    "methods",
    "ledger",
    "batch",
    "changes",
    "replay",
    "editor",
    "evaluation",
    "locating",
    "tuning",
    "gates",
    "baselines",
    "report",
    "export",
    "studies",
    "cli",
    "__main__",
]
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.name != "__init__.py")


def place(module):
    """Rank of `nulledit.X...` in the order; -1 for the package itself."""
    parts = module.split(".")
    return ORDER.index(parts[1]) if len(parts) > 1 else -1


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "nulledit")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nulledit":
            yield node.module


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_go_one_way(file):
    own = ORDER.index(file.relative_to(SOURCE).parts[0].removesuffix(".py"))
    for module in imports(file):
        assert place(module) <= own, f"{module} stands later than {ORDER[own]}"


def test_every_room_is_in_the_order():
    rooms = {f.relative_to(SOURCE).parts[0].removesuffix(".py") for f in FILES}
    assert rooms == set(ORDER)


def test_help_needs_no_torch():
    script = (
        "import sys; sys.argv = ['nulledit', '--help']\n"
        "from nulledit.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: nulledit" in done.stdout
