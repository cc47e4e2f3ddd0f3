"""What a call has kept in a run's ledger when it is cut off, and what to do then."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from nulledit.api.run import Run
from nulledit.cli.common import Interrupted, interruptions_kept, say
from nulledit.cli.options import given_options, given_words
from nulledit.errors import RankError
from nulledit.io.text import count
from nulledit.ledger.store import Store
from nulledit.parallel.ranks import Ranks

Again = Callable[[int], str]
"""Batches kept -> the command that goes on then."""


@contextmanager
def followed(run: Run, again: Again | None = None) -> Iterator[None]:
    """Where what is inside is cut off, say what the run's ledger has by then, and what follows.

    `again`: of a command that goes on; without it the change is in the ledger as a whole, or not.
    """
    try:
        with interruptions_kept():
            yield
    except KeyboardInterrupt as error:
        if run.batches or not run.begins:
            raise Interrupted(f"interrupted{_advice(run, again)}") from error
        raise Interrupted(
            "interrupted before the first batch was finished: nothing was kept"
        ) from error
    except RankError as error:
        begun = run.batches or not run.begins
        advice = _advice(run, again, ", started as before,").removeprefix(": ")
        first = "no batch was finished: start the same command again"
        raise error.advised(advice if begun else first) from error
    except Exception:
        if run.batches:
            say(f"Note{_advice(run, again)}", quiet=False)
        raise


def _advice(run: Run, again: Again | None, how: str = "") -> str:
    """What is kept and what to do, after a colon; empty where nothing is to be said."""
    kept, folder = run.batches, run.folder
    if again:
        verb = "is" if kept == 1 else "are"
        there = f"{count(kept, 'finished batch')} {verb} kept in {folder}"
        said = there if kept else "no batch was finished"
        return f": {said}; go on{how} with: {again(kept)}"
    if not kept:
        return ""
    last = run.history.events[-1]
    return (
        f": the {last.kind} is in the ledger, as event {last.id}; the model and the report of "
        f"{folder} follow with the next change, the model also by `nulledit verify`"
    )


def begun(folder: Path, ranks: Ranks) -> bool:
    """Whether the launcher starts this command anew, and it has finished batches already."""
    store = Store(folder / "ledger")
    return ranks.launch.attempt > 0 and store.exists and store.events() > 0


def edit_again(folder: Path, kept: int) -> str:
    """What goes on after `kept` batches of this `nulledit edit`: the same command again.

    Without what the ledger has by then: model and seed, and what the first batch of an epoch fixes.
    """
    context = click.get_current_context()
    same = kept > 0 or not context.params["new_epoch"]
    fixed = ("run", "epoch") if same else ("run",)
    known = {option.name for option in given_options() if option.fixed in fixed}
    words = [*given_words(without={*known, "run"}), "--continue", str(folder)]
    return shlex.join(["nulledit", "edit", *words])


def retry_again(_kept: int) -> str:
    """The same `nulledit retry` again, which asks every fact anew."""
    return shlex.join(["nulledit", "retry", *given_words()])
