"""`nulledit log` and `nulledit show`: what a run's ledger tells, without loading its model."""

from __future__ import annotations

from pathlib import Path

from nulledit.cli.command import Call, command
from nulledit.cli.options import RUN, arg, least, opt


@command(
    "What happened to the model, event by event.",
    RUN,
    opt("--limit N", "Only the last ones.", least(1)),
)
def log(call: Call) -> None:
    """Every event in the ledger of RUN, oldest first: what came in, what went out, and when.

    RUN@N, in `nulledit diff`, is the model after event N.

    \b
    $ nulledit log run
    """
    from nulledit.ledger.store import Store
    from nulledit.runs.history import events_of, log_table

    history = Store(Path(call.run) / "ledger").read()  # also where tensors are large, or damaged
    events = events_of(history)[-(call.limit or 0) :]
    call.show(
        {"run": call.run, "base": history.base.model, "state": history.state_id, "events": events},
        lambda: log_table(events),
    )


@command("The facts of a run, or the story of one.", RUN, arg("id_", "[ID]"))
def show(call: Call) -> None:
    """What RUN's ledger knows of the fact ID; without it, the facts in the model.

    \b
    $ nulledit show run
    $ nulledit show run capital-of-france
    """
    from nulledit.ledger.store import Store
    from nulledit.runs.history import facts_in, facts_table, story_of, story_text

    store = Store(Path(call.run) / "ledger")
    if call.id_ is not None:
        story = story_of(store.load(), call.id_)
        return call.show({"run": call.run, **story}, lambda: story_text(story))
    history = store.read()
    facts = {"run": call.run, "facts": facts_in(history)}
    return call.show(facts, lambda: facts_table(history))
