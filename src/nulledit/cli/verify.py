"""`nulledit verify`: a run against its ledger."""

from __future__ import annotations

from pathlib import Path

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, RUN


@command("Every hash, and the weights computed again.", RUN, PLACED)
def verify(call: Call) -> None:
    """Check that the model of RUN is its base with the edits in its ledger, and nothing else.

    The hash of the database, of every tensor and of every file of the model; then the edited
    matrices, computed again from base and ledger. A model that an interrupted write left behind
    the ledger is first brought to its state. Exits with 1 and names everything that is wrong.

    \b
    $ nulledit verify run
    """
    call.prepare()
    from nulledit.api.editor import Editor
    from nulledit.errors import CheckFailed
    from nulledit.io.text import count
    from nulledit.report.document import Status, StudyTable
    from nulledit.runs.verify import KINDS
    from nulledit.runs.verify import verify as check

    def load(folder: Path) -> Editor:
        call.say(f"Computing the weights of {folder} again")
        return Editor.load(folder, device=call.device, trust_remote_code=call.trust_remote_code)

    call.say(f"Checking the files of {call.run}")
    found = check(call.run, load)
    call.notes((*found.finished, *found.mentioned))
    rows = []
    for kind in KINDS:
        wrong = any(each.problem for each in found.of(kind))
        tone = "bad" if wrong else "good" if found.of(kind) else ""
        rows.append((kind, str(len(found.of(kind))), Status(found.says(kind), tone)))
    call.show(
        {"run": call.run, **found.to_dict()},
        StudyTable.of("checks", "", ("", "checked", "result"), rows),
    )
    if found.problems:
        raise CheckFailed(
            f"{call.run}: {count(len(found.problems), 'problem')}: " + "; ".join(found.problems)
        )
