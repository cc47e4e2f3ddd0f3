"""Runs the notebooks in examples/ without Jupyter, and keeps what their cells show.

    python tools/notebooks.py [NAME ...]

Each runs in an empty folder beside docs/, as in examples/; its outputs are then written into the
file. The tests run the same cells (tests/test_notebooks.py).
"""

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def read(file):
    """A notebook, as plain data."""
    return json.loads(file.read_text(encoding="utf-8"))


def code_cells(notebook):
    """Those that run, in their order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(source, names):
    """Run a cell's lines with `names`; what it prints, and the value of its last expression."""
    *lines, last = ast.parse(source).body
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        if not isinstance(last, ast.Expr):
            lines.append(last)
        exec(compile(ast.Module(lines, []), "<cell>", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
    return printed.getvalue(), value


def shown(number, printed, value):
    """A cell's outputs, as Jupyter writes them."""
    found = []
    if printed:
        lines = printed.splitlines(keepends=True)
        found.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = value._repr_html_().splitlines(keepends=True)
        about = {"execution_count": number, "metadata": {}, "output_type": "execute_result"}
        found.append({**about, "data": data})
    return found


@contextlib.contextmanager
def place():
    """An empty folder with the project's docs/ beside it, to run in."""
    with tempfile.TemporaryDirectory() as above:
        (Path(above) / "docs").symlink_to(ROOT / "docs")
        folder = Path(above) / "examples"
        folder.mkdir()
        with contextlib.chdir(folder):
            yield folder


def refresh(file):
    """Run a notebook and write what it shows into it."""
    notebook, names = read(file), {}
    with place():
        for number, cell in enumerate(code_cells(notebook), 1):
            print(f"{file.name}: {number} of {len(code_cells(notebook))}", file=sys.stderr)
            outputs = shown(number, *run("".join(cell["source"]), names))
            cell |= {"execution_count": number, "outputs": outputs}
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")


def main():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in sys.argv[1:] or sorted(file.stem for file in EXAMPLES.glob("*.ipynb")):
        refresh(EXAMPLES / f"{Path(name).stem}.ipynb")


if __name__ == "__main__":
    main()
