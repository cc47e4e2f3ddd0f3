"""`nulledit undo`, `redo`, `restore` and `rebuild`: changes of what is in a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.common import Bars, echo, emit, prepare, say
from nulledit.cli.options import device_option, output_options, trust_option
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.editing.editor import Editor
    from nulledit.editing.reports import ChangeReport

MOVED = 5  # facts whose movement is shown
SHOWN = 10  # facts named that came or went
FIELDS = ("id", "subject", "relation", "target", "prompt")


@click.command(short_help="Take facts out, exactly.")
@click.argument("run", metavar="RUN")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--batch", metavar="N", type=click.IntRange(1), help="All facts of this batch.")
@click.option(
    "--where",
    multiple=True,
    metavar="FIELD=TEXT",
    help=f"All facts with this {', '.join(FIELDS[:-1])} or {FIELDS[-1]}; repeatable, all must fit.",
)
@device_option
@trust_option
@output_options
def undo(
    run: str, ids: tuple[str, ...], batch: int | None, where: tuple[str, ...], **given: Any
) -> None:
    """Take facts out of the model of RUN: it becomes the solve without them.

    IDs, --batch and --where add up: what any of them names goes. An older answer that a fact had
    replaced comes back. Says how the remaining facts moved, and
    which edits are on nearly the same key. `nulledit redo RUN` takes it back.

    \b
    $ nulledit undo run capital-of-france
    $ nulledit undo run --batch 3
    $ nulledit undo run --where subject=France --where relation=capital
    """
    if not (ids or batch or where):
        raise ConfigError("say which: an ID, --batch N or --where FIELD=TEXT")

    _refuse_unknown(run, ids)

    def change(editor: Editor) -> ChangeReport:
        return editor.undo(*_chosen(editor, ids, batch, where))

    _carry_out(run, change, given)


@click.command(short_help="Take the last undo back, or bring named facts back.")
@click.argument("run", metavar="RUN")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@device_option
@trust_option
@output_options
def redo(run: str, ids: tuple[str, ...], **given: Any) -> None:
    """Take back the last undo or restore of RUN; with IDs, bring these facts back.

    \b
    $ nulledit redo run
    $ nulledit redo run capital-of-france
    """
    _carry_out(run, lambda editor: editor.redo(*ids), given)


@click.command(short_help="Take everything out: the base, bit for bit.")
@click.argument("run", metavar="RUN")
@device_option
@trust_option
@output_options
def restore(run: str, **given: Any) -> None:
    """Make the model of RUN its base again, bit for bit. The ledger keeps all facts: `redo`.

    \b
    $ nulledit restore run
    """
    _carry_out(run, lambda editor: editor.restore(), given)


@click.command(short_help="Write the facts anew, as if the undone ones had never been.")
@click.argument("run", metavar="RUN")
@click.option("--values", is_flag=True, help="Optimise the values again as well.")
@device_option
@trust_option
@output_options
def rebuild(run: str, values: bool, **given: Any) -> None:
    """Take keys and residuals of all facts in RUN again, with their stored values.

    Undo is exact in what was recorded; later facts were recorded while the undone ones were there.
    This leaves no trace of them. Batches keep their order, the ledger what it had.

    \b
    $ nulledit rebuild run
    """

    def change(editor: Editor) -> ChangeReport:
        with Bars(quiet=given["quiet"]) as bars:
            return editor.rebuild(values=values, progress=bars)

    _carry_out(run, change, given)


def _carry_out(run: str, change: Callable[[Editor], ChangeReport], given: dict[str, Any]) -> None:
    """Load, change and write; one writer all the while."""
    prepare(quiet=given["quiet"])
    from nulledit.cli.going_on import keep
    from nulledit.cli.loading import load_run

    quiet, folder = given["quiet"], Path(run)
    trust = given["trust_remote_code"]
    editor = load_run(run, given["device"], quiet=quiet, trust_remote_code=trust)
    with editor.writing():
        report = change(editor)
        keep(editor, folder)
    for notice in report.notices:
        say(f"Note: {notice}", quiet=quiet)
    if given["as_json"]:
        emit({"run": run, **change_dict(editor, report)})
    else:
        echo(change_text(editor, report))


def change_dict(editor: Editor, report: ChangeReport) -> dict[str, Any]:
    """A change as plain data."""
    return {
        "event": len(editor.history.events),
        "kind": editor.history.events[-1].kind,
        "state": editor.history.state_id,
        "facts": len(editor.facts),
        **{name: list(getattr(report, name)) for name in ("removed", "restored", "rebuilt")},
        "near": [{"id": i, "cosine": value} for i, value in report.near],
        "moved": [{"id": i, "share": value} for i, value in report.moved],
        "notices": list(report.notices),
    }


def change_text(editor: Editor, report: ChangeReport) -> str:
    """A change for a terminal."""
    from nulledit.editing.session import some

    lines = []
    for label, ids in (
        ("out", report.removed),
        ("back as it was", report.restored),
        ("written anew", report.rebuilt),
    ):
        if ids:
            lines.append(f"{label}: {some(ids, SHOWN)}")
    if report.near:
        near = ", ".join(f"{i} ({cosine:.3f})" for i, cosine in report.near[:MOVED])
        lines.append(f"on nearly the same key (cosine): {near}")
    moved = [pair for pair in report.moved if pair[1] > 0]
    if moved:
        most = ", ".join(f"{i} ({100 * value:.2g} %)" for i, value in moved[:MOVED])
        lines.append(
            f"the others moved by {100 * median(v for _, v in moved):.2g} % (median of what was "
            f"written at their keys); most: {most}"
        )
    there = len(editor.facts)
    lines.append(
        f"event {len(editor.history.events)}; "
        + (f"{there} in the model" if there else "the model is the base, bit for bit")
    )
    return "\n".join(lines)


def _refuse_unknown(run: str, ids: Sequence[str]) -> None:
    """LedgerError for an id that is not in the model, before the model is loaded."""
    from nulledit.editing.session import check_in_model
    from nulledit.ledger.store import Store

    store = Store(Path(run) / "ledger")
    if ids and store.exists:
        check_in_model(ids, store.read())


def _chosen(
    editor: Editor, ids: Sequence[str], batch: int | None, where: Sequence[str]
) -> list[str]:
    """Ids of the facts that are named in any of the three ways."""
    active = editor.history.active
    found = list(ids)
    if batch is not None:
        found += [c.fact.id for c in active if c.batch == batch]
    if where:
        wanted = [_condition(text) for text in where]  # one field named twice asks for both
        found += [
            c.fact.id for c in active if all(getattr(c.fact, name) == text for name, text in wanted)
        ]
    if not found:
        asked = [f"--batch {batch}"] * (batch is not None) + [f"--where {text}" for text in where]
        raise ConfigError(f"no fact in the model fits {' '.join(asked)}; see `nulledit show RUN`")
    return list(dict.fromkeys(found))


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name.strip() not in FIELDS:
        raise ConfigError(
            f"--where {text!r}: expected FIELD=TEXT with one of the fields {', '.join(FIELDS)}"
        )
    return name.strip(), value.strip()
