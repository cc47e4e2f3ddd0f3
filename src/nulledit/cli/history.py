"""`nulledit log` and `nulledit show`: what a run's ledger tells, without loading its model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nulledit.cli.common import echo, emit
from nulledit.cli.options import output_options

if TYPE_CHECKING:
    from nulledit.ledger.records import History


@click.command(short_help="What happened to the model, event by event.")
@click.argument("run", metavar="RUN")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="Only the last ones.")
@output_options
def log(run: str, limit: int | None, as_json: bool, quiet: bool) -> None:
    """Every event in the ledger of RUN, oldest first: what came in, what went out, and when.

    RUN@N, in `nulledit diff`, is the model behind event N.

    \b
    $ nulledit log run
    """
    del quiet  # there is nothing to be quiet about
    history = _history(run, tensors=False)
    from nulledit.report.tables import as_text
    from nulledit.runs.history import events_of, log_table

    events = events_of(history)[-(limit or 0) :]
    if as_json:
        emit({"run": run, "base": history.base.model, "state": history.state_id, "events": events})
    else:
        echo(as_text(log_table(events), left=5))


@click.command(short_help="One fact of a run, or all that are in the model.")
@click.argument("run", metavar="RUN")
@click.argument("id_", metavar="[ID]", required=False)
@output_options
def show(run: str, id_: str | None, as_json: bool, quiet: bool) -> None:
    """What RUN's ledger knows of the fact ID; without it, the facts in the model.

    \b
    $ nulledit show run
    $ nulledit show run capital-of-france
    """
    del quiet
    history = _history(run, tensors=id_ is not None)
    from nulledit.report.tables import as_text
    from nulledit.runs.history import facts_in, facts_table, story_of, story_text

    if id_ is not None:
        story = story_of(history, id_)
        return emit({"run": run, **story}) if as_json else echo(story_text(story))
    if as_json:
        return emit({"run": run, "facts": facts_in(history)})
    return echo(as_text(facts_table(history), left=3))


def _history(run: str, *, tensors: bool) -> History:
    """The ledger of `run`; without `tensors` also where they are large, or damaged."""
    from nulledit.ledger.store import Store

    store = Store(Path(run) / "ledger")
    return store.load() if tensors else store.read()
