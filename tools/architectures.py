"""Write docs/architectures.md: what happens to every causal language model of transformers.

    python tools/architectures.py                   # the whole page, about 15 minutes on one core
    python tools/architectures.py lfm2 falcon_h1    # these alone, in the terminal
    python tools/architectures.py --keep rows.json lfm2    # the page, with these anew

Each architecture is tried by a process of its own: a crash or a hang is a line of the page.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / room) for room in ("src", "tests", "benchmarks"))]

import torch  # noqa: E402
import transformers  # noqa: E402
from architecture_trial import Row, tried  # noqa: E402
from tiny_models import VARIANTS  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

PAGE = HERE.parent / "docs" / "architectures.md"
SECONDS = 240.0
"""For one architecture."""


def names() -> list[str]:
    """Of every architecture that has a causal language model."""
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS])


def rows(wanted: Sequence[str], jobs: int) -> Iterator[Row]:
    """Rows as they are done, `jobs` at a time."""
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    waiting, running = list(wanted), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            found = context.Queue()
            process = context.Process(target=_try, args=(name, found))
            process.start()
            running[name] = process, found
        name, (process, found) = next(iter(running.items()))
        try:
            row = Row(**found.get(timeout=SECONDS))
        except queue.Empty:
            ended = process.exitcode
            row = Row(name, refused=f"the process ended with {ended}" if ended else "hangs")
            process.kill()
        process.join()
        del running[name]
        yield row


def _try(name: str, found: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found.put(asdict(tried(name)))


def outcome(row: Row) -> str:
    """The first column."""
    if row.wrong:
        return "wrong"
    if row.refused:
        return "refused"
    return "experts" if row.experts else "edited"


def page(found: Sequence[Row]) -> str:
    """The page in Markdown."""
    counts = Counter(map(outcome, found))
    gated = sum(not row.refused and not row.gated for row in found)
    told = {
        "edited": "W of an MLP, by AlphaEdit and every other method of matrices",
        "experts": "the experts of a layer as one W, by the same methods",
        "refused": "in one line, below",
        "wrong": "taken up, and a check did not hold",
    }
    lines = [
        "# Every architecture of transformers",
        "",
        "Made by `python tools/architectures.py`; not to be edited by hand. "
        f"transformers {transformers.__version__} has {len(found)} model types with a causal "
        "language model. Each was built tiny and random from its default configuration, taken up "
        "as `nulledit edit` takes up a model, and, where it is not refused, edited. For every row "
        "that is edited these held: keys and values equal whole runs of the plain model, one row "
        "at a time; a value that is written moves the stream by exactly what was asked for; only "
        "the chosen matrices change, and undo brings back every bit, in float64 and bfloat16; a "
        "run that is saved, loaded and gone on with is the run that was not.",
        "",
        "| outcome | model types | what |",
        "| --- | --- | --- |",
        *(f"| {kind} | {counts[kind]} | {what} |" for kind, what in told.items() if counts[kind]),
        f"| gated | {gated} | of those edited: a neuron of its own for a fact, too |",
        "",
        "How W's output enters the stream (plain, scaled, normed) is explained in "
        "[add-an-architecture.md](add-an-architecture.md). *Beginnings*: whether rows that begin "
        "alike share their beginning's run; without it edits take longer and give the same.",
        "",
        "## Edited",
        "",
        "| model type | W | output | found by | gated | beginnings | blocks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found:
        if not row.refused:
            cells = (
                row.name,
                f"`{row.path}`",
                row.output + (", experts" if row.experts else ""),
                "tracing" if row.traced else "table",
                _cell(_short(row.gated)) if row.gated else "yes",
                row.runs,
                f"{row.layers} of {row.depth}" if row.layers else "all",
            )
            wrong = f" **{_cell('; '.join(row.wrong))}**" if row.wrong else ""
            lines.append(f"| {' | '.join(cells)}{wrong} |")
    lines += ["", "## Refused", "", "| model type | why |", "| --- | --- |"]
    lines += [f"| {row.name} | {_cell(row.refused)} |" for row in found if row.refused]
    return "\n".join(lines) + "\n"


def _short(reason: str) -> str:
    return "no: experts" if "mixture of experts" in reason else "no: " + reason.split(": ", 1)[-1]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def main() -> None:
    """Write the page, or print single rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all, if none is given")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="rows in JSON: read, renewed, and written again")
    given = parser.parse_args()
    found: dict[str, Row] = {}
    if given.keep and given.keep.exists():
        found = {row["name"]: Row(**row) for row in json.loads(given.keep.read_text())}
    for row in rows(given.names or names(), given.jobs):
        found[row.name] = row
        why = row.refused or "; ".join(row.wrong) or row.gated
        told = f"{outcome(row):8} {row.name:28} {row.path} {row.output} {why}"
        sys.stdout.write(f"{told}\n")
        sys.stdout.flush()
        if given.keep:
            given.keep.write_text(json.dumps([asdict(r) for r in found.values()], indent=1))
    if set(names()) <= set(found):
        PAGE.write_text(page([found[name] for name in names()]), encoding="utf-8")


if __name__ == "__main__":
    main()
