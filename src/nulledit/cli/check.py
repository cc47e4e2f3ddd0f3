"""`nulledit check`: a run against limits; exit code 1 if one is broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, RUN, TEXT, opt
from nulledit.errors import CheckFailed

if TYPE_CHECKING:
    from nulledit.report.document import StudyTable
    from nulledit.runs.gate import GateReport, Row


@command(
    "Limits on a run; exit code 1 if one is broken.",
    RUN,
    opt("--limits FILE", "YAML.  [default: shipped ones]", default="default"),
    TEXT,
    opt("--capability DIR", "Six tasks: sst2.jsonl and so on."),
    PLACED,
)
def check(call: Call) -> None:
    """Compare the edited model of a run with its base against limits in a YAML file.

    Exit code 0 if all hold, 1 if one does not. Only what the limits ask for is measured. A limit
    that can't be measured fails, unless the file calls it optional. docs/gates.md names the limits.

    \b
    $ nulledit check run
    $ nulledit check run --limits release.yaml --text wiki.txt --capability tasks
    """
    from nulledit.runs.limits import load_limits

    limits = load_limits(call.limits)
    report = call.open().check(limits, text=call.text, tasks=call.capability)
    call.show(
        {"run_folder": call.run, **report.to_dict()},
        lambda: gate_table(report),
    )
    if not report.passed:
        broken = ", ".join(report.failed)
        raise CheckFailed(
            f"{call.run}: {len(report.failed)} of {len(report.rows)} limits failed: {broken}"
        )


def gate_table(report: GateReport) -> StudyTable:
    """One row per limit: whether it holds, what was found, what is allowed."""
    from nulledit.report.document import Status, StudyTable

    tones = {"ok": "good", "FAILED": "bad"}
    head = ["limit", "", "found (%)", "n", "allowed (%)", ""]
    rows: list[Sequence[str]] = [
        [
            row.name,
            Status(row.verdict, tones.get(row.verdict, "weak")),
            *(_found(row), _count(row), _allowed(row), row.note),
        ]
        for row in report.rows
    ]
    return StudyTable.of("limits", "", head, rows)


def _found(row: Row) -> str:
    if row.found is None:
        return "not measured" if row.verdict == "FAILED" else ""
    shown = f"{round(row.found, 1) + 0.0:.1f}"  # no -0.0
    return (shown if row.error is None else f"{shown} ± {row.error:.1f}") + _unit(row)


def _count(row: Row) -> str:
    return "" if row.n is None else f"{row.n} {row.over}"


def _allowed(row: Row) -> str:
    sign = "≥" if row.side == "at_least" else "≤"
    return f"{sign} {row.limit:g}" + (" at 95 %" if row.confident else "") + _unit(row)


def _unit(row: Row) -> str:
    """What the column's head does not say."""
    return "" if row.unit == "%" else f" {row.unit}"
