"""Imports go down the floors of docs/design.md, and never between rooms of one floor.

Nor between test files: what several use is in `support`.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "nulledit"
LAYERS = {
    "ground": (("_lazy", "_version", "errors"), ("io", "parallel"), ("config", "data")),
    "numbers": (("linalg",), ("methods",)),
    "model": (("models",), ("statistics",)),
    "editing": (("ledger",), ("editing",)),
    "using": (
        ("evaluation", "report"),
        ("baselines", "runs", "tracing", "tuning"),
        ("export",),
    ),
    "face": (("api",),),
    "leaves": (("studies", "ui"), ("cli",), ("__main__",)),
}
"""Layers from the ground up; in each, floors of rooms that do not know each other."""
FLOORS = [floor for floors in LAYERS.values() for floor in floors]
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
TESTS = sorted(Path(__file__).parent.rglob("*.py"))
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.parent != SOURCE or p.name != "__init__.py")


def room(file):
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def modules(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def imports(file):
    yield from (m for m in modules(file) if m.split(".")[0] == "nulledit")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_a_room_imports_only_from_floors_below(file):
    own = room(file)
    for module in imports(file):
        other = module.partition(".")[2].partition(".")[0]
        assert other, f"{file}: import what is meant from its own module, not from the face"
        assert other == own or FLOOR[other] < FLOOR[own], f"{own} may not know {module}"


def test_every_room_is_on_a_floor():
    assert {room(f) for f in FILES} == set(FLOOR)


def test_no_floor_is_there_for_its_own_sake():
    """The longest chain of imports from room to room."""
    below = {}
    for file in FILES:
        below.setdefault(room(file), set()).update(m.split(".")[1] for m in imports(file))

    def height(own):
        return 1 + max((height(other) for other in below[own] - {own}), default=0)

    assert max(map(height, below)) <= 13  # __main__, cli, ui, api and nine below


def test_no_test_file_imports_from_another():
    """Nor from conftest, where pytest alone finds its fixtures."""
    assert len(TESTS) > 60, "found where they are"
    for file in TESTS:
        for module in modules(file):
            owner = module.split(".")[0]
            assert not owner.startswith("test_"), f"{file.name}: put it into tests/support"
            assert owner != "conftest", f"{file.name}: import it from tests/support"


def test_help_needs_no_torch():
    script = (
        "import sys; sys.argv = ['nulledit', '--help']\n"
        "from nulledit.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage: nulledit" in done.stdout
