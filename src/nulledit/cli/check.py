"""`nulledit check`: a run against limits; exit code 1 if one is broken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.common import Bars, echo, emit, prepare, say
from nulledit.cli.options import device_option, output_options, trust_option
from nulledit.errors import CheckFailed

if TYPE_CHECKING:
    from nulledit.report.tables import Table
    from nulledit.runs.gate import GateReport, Row


@click.command(short_help="Compare a run with limits; exit 1 if one is broken.")
@click.argument("run", metavar="RUN")
@click.option("--limits", metavar="FILE", default="default", help="YAML.  [default: shipped ones]")
@click.option(
    "--text", metavar="FILE", help="For perplexity and KL.  [default: one that comes along]"
)
@click.option("--capability", metavar="DIR", help="Six tasks: sst2.jsonl and so on.")
@device_option
@trust_option
@output_options
def check(
    run: str,
    limits: str,
    text: str | None,
    capability: str | None,
    device: Any,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare the edited model of a run with its base against limits in a YAML file.

    Exit code 0 if all hold, 1 if one does not. Only what the limits ask for is measured. A limit
    that can't be measured fails, unless the file calls it optional. docs/gates.md names the limits.

    \b
    $ nulledit check run
    $ nulledit check run --limits release.yaml --text wiki.txt --capability tasks
    """
    from nulledit.runs.limits import load_limits

    asked = load_limits(limits)
    prepare(quiet=quiet)
    from nulledit.cli.loading import load_run
    from nulledit.runs.gate import check as measure
    from nulledit.runs.measure import windows_of

    editor = load_run(run, device, quiet=quiet, trust_remote_code=trust_remote_code)
    windows = None
    if asked.needs("text"):
        found = windows_of(editor.editable.encoder, text)
        windows = found.windows
        say(f"Perplexity and KL on {found.name}", quiet=quiet)
    with Bars(quiet=quiet) as bars:
        report = measure(editor, asked, windows=windows, tasks=capability, progress=bars)
    if as_json:
        emit({"run_folder": run, **report.to_dict()})
    else:
        echo(gate_table(report))
    refuse(report, run)


def gate_table(report: GateReport) -> Table:
    """One row per limit: whether it holds, what was found, what is allowed."""
    from nulledit.report.document import Status

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
    return head, rows


def refuse(report: GateReport, name: str) -> None:
    """CheckFailed, with the names of the limits that `name` breaks, if it breaks one."""
    if report.passed:
        return
    broken = ", ".join(report.failed)
    raise CheckFailed(f"{name}: {len(report.failed)} of {len(report.rows)} limits failed: {broken}")


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
