"""`nulledit preview`: what a change would do, written nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import FACTS, PLACED, TEXT, arg, opt
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.api.run import Run
    from nulledit.report.document import StudyTable
    from nulledit.runs.preview import Preview


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
    found = _run(call).preview(new, undo=call.undone, text=call.text)
    call.notes(found.notices)
    call.show(lambda: {"run": call.run, **found.to_dict()}, lambda: _page(found))


def _run(call: Call) -> Run:
    """The run that was named, or one of a model that has no edits, in memory."""
    folder = Path(call.run)
    if (folder / "ledger").is_dir() or (folder.is_dir() and not (folder / "config.json").is_file()):
        return call.open()
    call.prepare()
    from nulledit.api.run import Run

    return Run(folder, call.editor(call.run), call.talk)


def _page(found: Preview) -> list[Any]:
    from nulledit.report.document import StudyTable
    from nulledit.runs.history import answer_of
    from nulledit.runs.tables import rates_tables

    before, after, held = found.asked.before, found.asked.after, found.held
    then = before.answers if before else {}
    answers: list[Sequence[str]] = [
        [f.render(f.prompt), answer_of(f), then.get(f.id, ""), after.answers.get(f.id, "")]
        for f in found.facts
    ]
    return [
        StudyTable.of("answers", "", ["prompt", "target", "before", "after"], answers),
        *rates_tables(found.asked.summary()),
        f"The last {len(held.after.rows())} facts in the model:" if held else "",
        *(rates_tables(held.summary(), absent=False) if held else ()),
        _norms(found),
        f"Perplexity and KL are on {found.asked.text}. Nothing was written.",
    ]


def _norms(found: Preview) -> StudyTable:
    from nulledit.report.document import StudyTable
    from nulledit.report.tables import number

    then, rows = {r.layer: r for r in found.before}, []
    for now in found.after:
        old = then.get(now.layer)
        share, room = (old.update_share, old.room) if old else (0.0, 1.0)
        cells = (share, now.update_share, 100 * room, 100 * now.room)
        rows.append([str(now.layer), *map(number, cells)])
    head = ["layer", "‖Δ‖/‖W₀‖ before", "after", "room left before (%)", "after (%)"]
    return StudyTable.of("norms", "", head, rows)
