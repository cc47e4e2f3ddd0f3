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
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / room) for room in ("src", "tests", "benchmarks"))]

import torch  # noqa: E402
import transformers  # noqa: E402
from architecture_trial import NOT_SAVED, Row, tried  # noqa: E402
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


def rows(wanted: Sequence[str], jobs: int, *, quick: bool = False) -> Iterator[Row]:
    """Rows as they are done, `jobs` at a time."""
    context = multiprocessing.get_context("fork")  # what is imported is imported once
    waiting, running = list(wanted), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            found = context.Queue()
            process = context.Process(target=_try, args=(name, quick, found))
            process.start()
            running[name] = process, found
        name, (process, found) = next(iter(running.items()))
        row = _awaited(name, process, found)
        process.kill()
        process.join()
        del running[name]
        yield row


def _awaited(name: str, process: BaseProcess, found: multiprocessing.Queue) -> Row:
    """What a process finds, or how it ended."""
    deadline, ended = time.monotonic() + SECONDS, False
    while True:
        try:
            return Row(**found.get(timeout=0.5))
        except queue.Empty:
            if ended:
                return Row(name, refused=f"crashed: the process ended with {process.exitcode}")
            if time.monotonic() > deadline:
                return Row(name, refused=f"hangs: nothing came in {SECONDS:g} s")
            ended = not process.is_alive()  # what it found may still be on its way


def _try(name: str, quick: bool, found: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found.put(asdict(tried(name, quick=quick)))


def outcome(row: Row) -> str:
    """The first column."""
    if row.refused:
        return "refused"
    if row.wrong:
        return "wrong"
    return "edited" if row.checked else "taken up"


TOLD = {
    "edited": "and these held: keys equal whole runs of the plain model, one row at a time without "
    "padding, and values the published algorithm, written plainly; a value that is written moves "
    "the stream by exactly what was asked for, in float64 and bfloat16; only the chosen matrices "
    "change, and undo brings back every bit; a run saved in bfloat16 is loaded as it was, edited "
    "further, and undone to the bit (xlstm in float32: its own code does not run in bfloat16)",
    "taken up": "its layout was found, its blocks run a span at a time as in the whole model, with "
    "another row beside, and W's output enters the stream as the table below says; no edit was "
    "tried when this page was made",
    "wrong": "a check did not hold: do not edit it",
    "refused": 'in one line, by `nulledit` itself; "not built": no tiny model could be made here; '
    '"does not run": the tiny model fails in its own code, without nulledit',
}
"""What the outcomes mean."""
HEAD = """# Every architecture of transformers

Made by `python tools/architectures.py`; not to be edited by hand. transformers {version} has {n}
model types with a causal language model. Each was built tiny and random from its default
configuration, some in other forms, too ({forms} rows), and taken up as
`nulledit edit` takes up a model.
"""
EDITED = """
How W's output enters the stream (plain, scaled, normed) is explained in
[add-an-architecture.md](add-an-architecture.md). *Rows*: whether rows that begin alike share their
beginning's run; whole rows, and those run from the blocks below, take longer and give the same.
*Gated*: whether a fact can have a neuron of its own. *Blocks*: those of the tiny model that can be
edited.

## Edited and taken up

| model type | outcome | W | output | found by | gated | rows | blocks |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def page(found: Sequence[Row]) -> str:
    """The page in Markdown."""
    counts = Counter(map(outcome, found))
    head = HEAD.format(
        version=transformers.__version__,
        n=len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        forms=len(VARIANTS),
    )
    gated = sum(not row.refused and not row.gated for row in found)
    summary = [
        *(f"| {kind} | {counts[kind]} | {what} |" for kind, what in TOLD.items() if counts[kind]),
        f"| gated | {gated} | of those not refused: a fact can have a neuron of its own |",
    ]
    refused = [f"| {row.name} | {_cell(row.refused)} |" for row in found if row.refused]
    return "\n".join(
        [
            head,
            "| outcome | rows | what |\n| --- | --- | --- |",
            *summary,
            EDITED + "\n".join(_edited(row) for row in found if not row.refused),
            "\n## Refused\n\n| model type | why |\n| --- | --- |",
            *refused,
            "",
        ]
    )


def _edited(row: Row) -> str:
    """A line of the table of those that are not refused."""
    cells = (
        row.name,
        _cell(f"{outcome(row)}: {'; '.join(row.wrong)}" if row.wrong else outcome(row)),
        f"`{row.path}`",
        row.output + (", experts" if row.experts else ""),
        "tracing" if row.traced else "table",
        _cell(_short(row.gated)) if row.gated else "yes",
        row.runs,
        f"{row.layers} of {row.depth}" if row.layers else "all",
    )
    return f"| {' | '.join(cells)} |"


def _short(reason: str) -> str:
    """Why a block can't be given neurons, in a cell."""
    if NOT_SAVED in reason:
        return "in memory, and in the base's shape"
    return "no: experts" if "mixture of experts" in reason else "no: no known form of MLP"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "\\<")


def main() -> None:
    """Write the page, or print single rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all, if none is given")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="take models up, and don't edit them")
    parser.add_argument("--keep", type=Path, help="rows in JSON: read, renewed, and written again")
    given = parser.parse_args()
    found: dict[str, Row] = {}
    if given.keep and given.keep.exists():
        found = {row["name"]: Row(**row) for row in json.loads(given.keep.read_text())}
    for row in rows(given.names or names(), given.jobs, quick=given.quick):
        if given.quick and row.name in found and found[row.name].checked and not row.refused:
            continue
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
