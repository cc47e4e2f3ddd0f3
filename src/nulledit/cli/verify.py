"""`nulledit verify`: a run against its ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from nulledit.cli.common import echo, emit, prepare, say
from nulledit.cli.options import device_option, output_options, trust_option


@click.command(short_help="Check every hash, and compute the weights again.")
@click.argument("run", metavar="RUN")
@device_option
@trust_option
@output_options
def verify(run: str, device: Any, trust_remote_code: bool, as_json: bool, quiet: bool) -> None:
    """Check that the model of RUN is its base with the edits in its ledger, and nothing else.

    The hash of the database, of every tensor and of every file of the model; then the edited
    matrices, computed again from base and ledger. A model that an interrupted write left behind
    the ledger is first brought to its state. Exits with 1 and names everything that is wrong.

    \b
    $ nulledit verify run
    """
    prepare(quiet=quiet)
    from nulledit.api.editor import Editor
    from nulledit.errors import CheckFailed
    from nulledit.io.text import count
    from nulledit.report.document import Status
    from nulledit.runs.verify import KINDS
    from nulledit.runs.verify import verify as check

    def load(folder: Path) -> Editor:
        say(f"Computing the weights of {folder} again", quiet=quiet)
        return Editor.load(folder, device=device, trust_remote_code=trust_remote_code)

    say(f"Checking the files of {run}", quiet=quiet)
    found = check(run, load)
    for line in (*found.finished, *found.mentioned):
        say(f"Note: {line}", quiet=quiet)
    if as_json:
        emit(
            {
                "run": run,
                "passed": found.passed,
                "problems": found.problems,
                "finished": found.finished,
                "mentioned": found.mentioned,
                "not_checked": list(found.skipped),
                "checks": [
                    {"kind": c.kind, "name": c.name, "problem": c.problem, "remark": c.remark}
                    for c in found.checks
                ],
            }
        )
    else:
        rows = []
        for kind in KINDS:
            wrong = any(check.problem for check in found.of(kind))
            tone = "bad" if wrong else "good" if found.of(kind) else ""
            rows.append((kind, str(len(found.of(kind))), Status(found.says(kind), tone)))
        echo((("", "checked", "result"), rows))
    if found.problems:
        raise CheckFailed(
            f"{run}: {count(len(found.problems), 'problem')}: " + "; ".join(found.problems)
        )
