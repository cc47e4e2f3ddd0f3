"""`nulledit check`: a run against limits; exit code 1 if one is broken."""

from __future__ import annotations

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, RUN, TEXT, opt
from nulledit.errors import CheckFailed


@command(
    "Limits on a run; exit code 1 if one is broken.",
    RUN,
    opt("--limits FILE|default", "YAML; default: the shipped ones.", default="default"),
    TEXT,
    opt("--capability DIR", "Six tasks: sst2.jsonl and so on."),
    PLACED,
)
def check(call: Call) -> None:
    """Compare the edited model of a run with its base against limits in a YAML file.

    Exit code 0 if all hold, 1 if one does not. Only what the limits ask for is measured. A limit
    that can't be measured fails, unless the file calls it optional. docs/limits.md names them all.

    \b
    $ nulledit check run
    $ nulledit check run --limits release.yaml --text wiki.txt --capability tasks
    """
    from nulledit.runs.gate import check_folder
    from nulledit.runs.gate_report import gate_table
    from nulledit.runs.limits import load_limits

    limits = load_limits(call.limits)
    check_folder(call.capability)
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
