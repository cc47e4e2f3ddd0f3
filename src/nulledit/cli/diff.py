"""`nulledit diff`: two states of one base model side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, arg
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.ledger.records import Column, History
    from nulledit.runs.diff import Difference, FactDifference

SHOWN = 50  # facts in the table
MOST_DIGITS = 18  # of an event's number


@command(
    "Two runs, or two states of one.",
    arg("first", "RUN[@EVENT]"),
    arg("second", "RUN[@EVENT]"),
    PLACED,
)
def diff(call: Call) -> None:
    """What differs between two runs on one base model, or between two states of one run.

    RUN@N is the model behind event N of `nulledit log RUN`, RUN@0 the base. The table shows facts
    that only one has or that they answer differently, with the probability of each answer in both.

    \b
    $ nulledit diff run other
    $ nulledit diff run@3 run
    """
    call.prepare()
    from nulledit.ledger.store import Store
    from nulledit.runs.diff import difference

    first, second = call.first, call.second
    (a, at_a), (b, at_b) = _place(first), _place(second)
    other, run = Store(Path(b) / "ledger").load(), call.open(a)
    found = difference(
        run.editor,
        other,
        first=_columns(run.history, first, at_a),
        second=_columns(other, second, at_b),
    )
    call.show(lambda: _plain(found, first, second), lambda: _page(found, first, second))


def _page(found: Difference, first: str, second: str) -> list[str]:
    from nulledit.report.tables import as_text

    parts = []
    if found.facts:
        parts.append(as_text(_facts_table(found, first, second), left=2, most=48))
        if len(found.facts) > SHOWN:
            parts.append(f"and {len(found.facts) - SHOWN} more, with --json")
    parts.append(f"{len(found.facts)} facts differ, {found.common} are in both.")
    if found.layers:
        rows: list[Sequence[str]] = [
            [str(x.layer), f"{x.first:.4f}", f"{x.second:.4f}", f"{x.apart:.4f}"]
            for x in found.layers
        ]
        head = ["layer", f"‖Δ‖/‖W₀‖, {first}", second, "apart"]
        parts.append(as_text((head, rows)))
    return parts


def _place(text: str) -> tuple[str, int | None]:
    """`run@3` as folder and event; a folder of that very name comes first."""
    folder, at, event = text.rpartition("@")
    if not at or Path(text).is_dir():
        return text, None
    if not event.isdecimal() or len(event) > MOST_DIGITS:
        raise ConfigError(f"{text}: expected RUN or RUN@N, N the number of an event")
    return folder, int(event)


def _columns(history: History, name: str, event: int | None) -> list[Column] | None:
    if event is None:
        return None
    if event > len(history.events):
        raise ConfigError(f"{name}: the ledger has {len(history.events)} events")
    return history.active_as_of(event)


def _facts_table(found: Difference, first: str, second: str) -> tuple[Sequence[str], Any]:
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
    return ["prompt", "answer", "taught in", f"p, {first}", f"p, {second}"], rows


def _taught(item: FactDifference, answer: str, first: str, second: str) -> str:
    names = [
        f"{name}{' (to forget)' if fact.forget else ''}"
        for name, fact in ((first, item.first), (second, item.second))
        if fact and fact.target == answer
    ]
    return ", ".join(names)


def _plain(found: Difference, first: str, second: str) -> dict[str, Any]:
    return {
        "first": first,
        "second": second,
        "common": found.common,
        "facts": [
            {
                "first": x.first.to_dict() if x.first else None,
                "second": x.second.to_dict() if x.second else None,
                "probabilities": [
                    {"answer": answer, "first": p, "second": q}
                    for answer, (p, q) in x.probabilities.items()
                ],
            }
            for x in found.facts
        ],
        "layers": [vars(x) for x in found.layers],
    }
