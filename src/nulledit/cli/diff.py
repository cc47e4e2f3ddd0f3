"""`nulledit diff`: two states of one base model side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, arg

if TYPE_CHECKING:
    from nulledit.report.document import Part, StudyTable
    from nulledit.runs.diff import Difference, FactDifference

SHOWN = 50  # facts in the table


@command(
    "Two runs, or two states of one.",
    arg("first", "RUN[@EVENT]"),
    arg("second", "RUN[@EVENT]"),
    PLACED,
)
def diff(call: Call) -> None:
    """What differs between two runs on one base model, or between two states of one run.

    RUN@N is the model after event N of `nulledit log RUN`, RUN@0 the base. The table shows facts
    that only one has or that they answer differently, with the probability of each answer in both.

    \b
    $ nulledit diff run other
    $ nulledit diff run@3 run
    """
    call.prepare()
    from nulledit.ledger.store import Store
    from nulledit.runs.diff import columns_at, difference, read_state

    first, second = call.first, call.second
    (a, at_a), (b, at_b) = read_state(first), read_state(second)
    other, run = Store(b / "ledger").load(), call.open(a)
    found = difference(
        run.editor,
        other,
        first=columns_at(run.history, at_a, first),
        second=columns_at(other, at_b, second),
    )
    call.show(
        lambda: {"first": first, "second": second, **found.to_dict()},
        lambda: _page(found, first, second),
    )


def _page(found: Difference, first: str, second: str) -> list[str | Part]:
    from nulledit.report.document import StudyTable

    parts: list[str | Part] = []
    if found.facts:
        parts.append(_facts_table(found, first, second))
        if len(found.facts) > SHOWN:
            parts.append(f"and {len(found.facts) - SHOWN} more, with --json")
    parts.append(f"{len(found.facts)} facts differ, {found.common} are in both.")
    if found.layers:
        rows: list[Sequence[str]] = [
            [str(x.layer), f"{x.first:.4f}", f"{x.second:.4f}", f"{x.apart:.4f}"]
            for x in found.layers
        ]
        head = ["layer", f"‖Δ‖/‖W₀‖, {first}", second, "apart"]
        parts.append(StudyTable.of("norms", "", head, rows))
    return parts


def _facts_table(found: Difference, first: str, second: str) -> StudyTable:
    from nulledit.report.document import StudyTable

    rows: list[Sequence[str]] = []
    for item in found.facts[:SHOWN]:
        fact = item.first or item.second
        assert fact is not None
        for i, (answer, (p, q)) in enumerate(item.probabilities.items()):
            rows.append(
                [
                    "" if i else fact.render(fact.prompt),
                    answer,
                    _taught(item, answer, first, second),
                    f"{p:.3f}",
                    f"{q:.3f}",
                ]
            )
    head = ["prompt", "answer", "taught in", f"p, {first}", f"p, {second}"]
    return StudyTable.of("facts", "", head, rows)


def _taught(item: FactDifference, answer: str, first: str, second: str) -> str:
    names = [
        f"{name}{' (to forget)' if fact.forget else ''}"
        for name, fact in ((first, item.first), (second, item.second))
        if fact and fact.target == answer
    ]
    return ", ".join(names)
