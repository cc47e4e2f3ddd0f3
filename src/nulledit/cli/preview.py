"""`nulledit preview`: what a change would do, written nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nulledit.cli.change import refuse_unknown
from nulledit.cli.command import Call, command
from nulledit.cli.options import FACTS, PLACED, TEXT, arg, opt
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.api.run import Run


@command(
    "What an edit would change; writes nothing.",
    arg("run", "RUN|MODEL"),
    arg("facts", "[FACTS]"),
    opt("--undo ID", "Take this fact out; repeatable.", name="undone", multiple=True),
    TEXT,
    FACTS,
    PLACED,
)
def preview(call: Call) -> None:
    """Edit RUN in memory and show what would change: the facts, their neighbours, facts that are in
    the model already, perplexity, KL from the base and norms. Nothing is written.

    A model's name in the place of RUN previews the first edit of a run, with the model's recipe.

    \b
    $ nulledit preview run more.yaml
    $ nulledit preview run --undo capital-of-france
    """
    if not call.facts and not call.undone:
        raise ConfigError("give FACTS to edit, or --undo ID")
    new = call.read_facts(call.facts).facts if call.facts else ()
    refuse_unknown(call.run, call.undone)
    run = _run(call)
    from nulledit.runs.preview import preview_page

    found = run.preview(new, undo=call.undone, text=call.text)
    call.notes(found.notices)
    call.show(lambda: {"run": call.run, **found.to_dict()}, lambda: preview_page(found))


def _run(call: Call) -> Run:
    """The run that was named, or one of a model that has no edits, in memory."""
    folder = Path(call.run)
    if (folder / "ledger").is_dir() or (folder.is_dir() and not (folder / "config.json").is_file()):
        return call.open()
    call.prepare()
    from nulledit.api.run import Run

    return Run(folder, call.editor(call.run), call.talk)
