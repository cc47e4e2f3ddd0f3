"""`nulledit undo`, `redo`, `restore` and `rebuild`: changes of what is in a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, RUN, arg, least, opt
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.api.editor import Editor
    from nulledit.api.run import Run
    from nulledit.editing.reports import ChangeReport
    from nulledit.ledger.records import History

FIELDS = ("id", "subject", "relation", "target", "prompt")
IDS = arg("ids", "[ID]...", nargs=-1)


@command(
    "Take facts out, exactly.",
    RUN,
    IDS,
    opt("--batch N", "All facts of this batch.", least(1)),
    opt(
        "--where FIELD=TEXT",
        f"All facts with this {', '.join(FIELDS[:-1])} or {FIELDS[-1]}; repeatable, all must fit.",
        multiple=True,
    ),
    PLACED,
)
def undo(call: Call) -> None:
    """Take facts out of the model of RUN: it becomes the solve without them.

    IDs, --batch and --where add up: what any of them names goes. An older answer that a fact had
    replaced comes back. Says how the remaining facts moved, and
    which edits are on nearly the same key. `nulledit redo RUN` takes it back.

    \b
    $ nulledit undo run capital-of-france
    $ nulledit undo run --batch 3
    $ nulledit undo run --where subject=France --where relation=capital
    """
    if not (call.ids or call.batch or call.where):
        raise ConfigError("say which: an ID, --batch N or --where FIELD=TEXT")
    refuse_unknown(call.run, call.ids)
    _carry_out(call, lambda run: run.undo(*_chosen(run.history, call)))


@command("Take the last undo back.", RUN, IDS, PLACED)
def redo(call: Call) -> None:
    """Take back the last undo or restore of RUN; with IDs, bring these facts back.

    \b
    $ nulledit redo run
    $ nulledit redo run capital-of-france
    """
    _carry_out(call, lambda run: run.redo(*call.ids))


@command("The base again, bit for bit.", RUN, PLACED)
def restore(call: Call) -> None:
    """Make the model of RUN its base again, bit for bit. The ledger keeps all facts: `redo`.

    \b
    $ nulledit restore run
    """
    _carry_out(call, lambda run: run.restore())


@command(
    "Write the facts anew, without a trace of undone ones.",
    RUN,
    opt("--values", "Optimise the values again as well.", bool),
    PLACED,
)
def rebuild(call: Call) -> None:
    """Take keys and residuals of all facts in RUN again, with their stored values.

    Undo is exact in what was recorded; later facts were recorded while the undone ones were there.
    This leaves no trace of them. Batches keep their order, the ledger what it had.

    \b
    $ nulledit rebuild run
    """
    _carry_out(call, lambda run: run.rebuild(values=call.values))


def _carry_out(call: Call, change: Callable[[Run], ChangeReport]) -> None:
    """Load, change, write and show."""
    call.prepare()
    from nulledit.cli.going_on import followed

    run = call.open(writing=True)
    with followed(run):
        report = change(run)
    call.notes(report.notices)
    call.show(
        lambda: {"run": call.run, **change_dict(run.editor, report)},
        lambda: change_text(run.editor, report),
    )


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
    from nulledit.runs.change import change_lines

    lines = change_lines(report)
    there = len(editor.facts)
    lines.append(
        f"event {len(editor.history.events)}; "
        + (f"{there} in the model" if there else "the model is the base, bit for bit")
    )
    return "\n".join(lines)


def refuse_unknown(run: str, ids: Sequence[str]) -> None:
    """LedgerError for an id that is not in the model, before the model is loaded."""
    from nulledit.editing.session import check_in_model
    from nulledit.ledger.store import Store

    store = Store(Path(run) / "ledger")
    if ids and store.exists:
        check_in_model(ids, store.read())


def _chosen(history: History, call: Call) -> list[str]:
    """Ids of the facts that are named in any of the three ways."""
    wanted = [_condition(text) for text in call.where]  # one field named twice asks for both
    found = list(call.ids) + [
        column.fact.id
        for column in history.active
        if column.batch == call.batch
        or (wanted and all(getattr(column.fact, name) == text for name, text in wanted))
    ]
    if not found:
        asked = [f"--batch {call.batch}"] * (call.batch is not None)
        asked += [f"--where {text}" for text in call.where]
        raise ConfigError(f"no fact in the model fits {' '.join(asked)}; see `nulledit show RUN`")
    return list(dict.fromkeys(found))


def _condition(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name.strip() not in FIELDS:
        raise ConfigError(
            f"--where {text!r}: expected FIELD=TEXT with one of the fields {', '.join(FIELDS)}"
        )
    return name.strip(), value.strip()
