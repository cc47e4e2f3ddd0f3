"""Every fact of several runs, side by side: what each run says of it, and where it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nulledit.io.text import count, shorten
from nulledit.report.document import Cell, Choice, Column, Listing, Status, StudyTable
from nulledit.runs.document import RunFolder
from nulledit.runs.fact_list import LONGEST
from nulledit.runs.holding import held, legend, mark, tone

SHOWN = 25  # facts on a terminal
SOME = "hold in one, not in another"
NOWHERE = Status("not in it")
FactKey = tuple[str, str, str]
"""Id, prompt and target."""


def by_fact(run: RunFolder) -> dict[FactKey, Mapping[str, Any]]:
    """The latest evaluated line of each fact in the model."""
    return {
        (line["id"], line["prompt"], line["target"]): line
        for line in run.lines
        if line["after"] and line.get("active", True)
    }


def compared_facts(runs: Sequence[RunFolder]) -> Listing:
    """The facts of all `runs`, with choices by where they hold."""
    found = [by_fact(run) for run in runs]
    keys = list(dict.fromkeys(key for lines in found for key in lines))
    columns = [Column("prompt", "fact"), Column("target", "target")]
    for i, run in enumerate(runs, 1):
        columns += [Column(f"says_{i}", f"{run.name} says"), Column(f"holds_{i}", run.name)]
    rows = tuple(_row(key, [lines.get(key) for lines in found]) for key in keys)
    said = legend([line for lines in found for line in lines.values()])
    table = StudyTable("facts", "Every fact, side by side", said, tuple(columns), rows)
    return Listing(table, (("Show", _choices([run.name for run in runs], found, keys)),))


def parted(facts: Listing) -> StudyTable | None:
    """The first few facts that hold in one run and not in another; None if there are none."""
    table = facts.only(SOME)
    if not table.rows:
        return None
    n = len(table.rows)
    few = f", the first {SHOWN} of {n}" if n > SHOWN else ""
    return replace(table, title=f"Hold in one run, not in another{few}", rows=table.rows[:SHOWN])


def verdict(facts: Listing) -> str:
    """How many facts hold where, in one sentence."""
    (_, choices), *_ = facts.choices
    told = [f"{len(c.rows)} {c.title}" for c in choices if c.rows is not None and c.title != SOME]
    return f"Of {count(len(facts.items), 'fact')}: {', '.join(told)}." if told else ""


def _choices(
    names: Sequence[str],
    found: Sequence[Mapping[FactKey, Mapping[str, Any]]],
    keys: Sequence[FactKey],
) -> tuple[Choice, ...]:
    shared = [i for i, key in enumerate(keys) if all(key in lines for lines in found)]
    holds = {i: [held(lines[keys[i]]) for lines in found] for i in shared}

    def where(title: str, *wanted: bool) -> Choice:
        return Choice(title, tuple(i for i in shared if tuple(holds[i]) == wanted))

    n = len(names)
    choices = [
        where("hold in both" if n == 2 else "hold in all", *[True] * n),
        Choice(SOME, tuple(i for i in shared if len(set(holds[i])) == 2)),
    ]
    if n == 2:
        first, second = names
        choices += [
            where(f"hold in {first}, not in {second}", True, False),
            where(f"hold in {second}, not in {first}", False, True),
        ]
    choices.append(where("hold in neither" if n == 2 else "hold in none", *[False] * n))
    alone = tuple(sorted(set(range(len(keys))) - set(shared)))
    if alone:
        choices.append(Choice("not in every run", alone))
    return Choice("all"), *choices


def _row(key: FactKey, lines: Sequence[Mapping[str, Any] | None]) -> dict[str, Cell]:
    id_, prompt, target = key
    row: dict[str, Cell] = {
        "prompt": Status(shorten(prompt, LONGEST), "", id_),
        "target": shorten(target, LONGEST),
    }
    for i, line in enumerate(lines, 1):
        said = str(line["after"].get("answer") or "") if line else ""
        row[f"says_{i}"] = shorten(said, LONGEST)
        row[f"holds_{i}"] = Status(mark(line), tone(line)) if line else NOWHERE
    return row
