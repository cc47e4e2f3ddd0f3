"""Runs the tutorial's own blocks, as a newcomer would, and says how long each takes.

    python tools/tutorial.py [--folder FOLDER]

Nothing is taken from the user's cache: what is made once is made here, and counts. Installing is
not in it: it hangs on the network.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PART = re.compile(r"^## ([^\n]+)$|^```(console|yaml)\n(.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Step:
    """A command of the page, or a file that it writes."""

    heading: str
    text: str
    """The command, or the file's content."""
    file: str = ""
    """Name of the file; empty for a command."""


def steps(page):
    """What the page tells a reader to do, in its order."""
    heading = ""
    for title, kind, block in PART.findall(page):
        if title:
            heading = title
        elif kind == "yaml":
            yield Step(heading, block, block.split("\n", 1)[0].removeprefix("# ").strip())
        else:
            for line in block.strip().splitlines():
                yield Step(heading, line.removeprefix("$ "))


def do(step, folder, **given):
    """Do a step in `folder`, where docs/ is; a command's end, or None for a file."""
    if step.file:
        (folder / step.file).write_text(step.text, encoding="utf-8")
        return None
    words = shlex.split(step.text.removeprefix("nulledit "), comments=True)
    command = [sys.executable, "-m", "nulledit", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, **given)
    allowed = (0, 1) if words[0] == "check" else (0,)  # 1: a limit is broken
    if done.returncode not in allowed:
        raise AssertionError(f"{step.text}\n{done.stdout}\n{done.stderr}")
    return done


def timed(folder):
    """Minutes of wall and processor time by heading, told as they come."""
    environment = os.environ | {"NULLEDIT_CACHE": str(folder / "cache")}
    (folder / "docs").symlink_to(DOCS)
    print("| block | minutes | of a processor |\n| --- | --- | --- |", flush=True)
    total = [0.0, 0.0]
    for step in steps((DOCS / "tutorial.md").read_text(encoding="utf-8")):
        wall, used = time.perf_counter(), processor()
        do(step, folder, env=environment)
        spent = ((time.perf_counter() - wall) / 60, (processor() - used) / 60)
        total = [a + b for a, b in zip(total, spent, strict=True)]
        if not step.file:
            print(f"| `{step.text}` | {spent[0]:.2f} | {spent[1]:.2f} |", flush=True)
    print(f"| all | {total[0]:.1f} | {total[1]:.1f} |")


def processor():
    """Seconds that commands have had so far, of all cores."""
    times = os.times()
    return times.children_user + times.children_system


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--folder", type=Path, help="empty folder to work in and to keep")
    given = parser.parse_args()
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
        return timed(given.folder.resolve())
    with tempfile.TemporaryDirectory() as folder:
        timed(Path(folder))


if __name__ == "__main__":
    main()
