"""What a call has kept in a run's ledger when it is cut off, and the command that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nulledit.api.run import Run
from nulledit.cli.common import Interrupted, say
from nulledit.cli.options import given_words
from nulledit.cli.recipe_options import FIXED, OF_EPOCH
from nulledit.editing.editor import Editor
from nulledit.errors import RankError
from nulledit.io.text import count
from nulledit.ledger.store import Store
from nulledit.parallel.ranks import Ranks
from nulledit.runs.pages import write_derived

NONE = "no batch was finished"


class Kept:
    """The batches that one call commits to the ledger of a run."""

    def __init__(self, run: Run, again: Callable[[int], str]):
        """`again`: batches kept -> the command that goes on then."""
        self.run, self.again = run, again

    @contextmanager
    def told(self) -> Iterator[None]:
        """Where what is inside is cut off, say what is kept and what goes on from there."""
        try:
            yield
        except KeyboardInterrupt as error:
            kept = self.run.batches
            if self.run.begins and not kept:
                raise Interrupted(
                    "interrupted before the first batch was finished: nothing was kept"
                ) from error
            again = self.again(kept)
            raise Interrupted(f"interrupted: {self._line(kept)}; go on with: {again}") from error
        except RankError as error:
            raise error.advised(self._advice()) from error
        except Exception:
            kept = self.run.batches
            if kept:
                say(f"Note: {self._line(kept)}; go on with: {self.again(kept)}", quiet=False)
            raise

    def _advice(self) -> str:
        """What to do after a rank was lost."""
        kept = self.run.batches
        if kept or not self.run.begins:
            return f"{self._line(kept)}; go on, started as before, with: {self.again(kept)}"
        return f"{NONE}: start the same command again"

    def _line(self, kept: int) -> str:
        if not kept:
            return NONE
        verb, folder = "is" if kept == 1 else "are", self.run.folder
        return f"{count(kept, 'finished batch')} {verb} kept in {folder}"


def keep(editor: Editor, folder: Path) -> None:
    """Bring the model and the pages of a run to its ledger, after a change that edits nothing.

    The ledger has the change already: an error says so, lest the command be given again.
    """
    last = editor.history.events[-1]
    there = (
        f"the {last.kind} is in the ledger, as event {last.id}; the model and the report of "
        f"{folder} follow with the next change, the model also by `nulledit verify`"
    )
    try:
        write_derived(editor, folder)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted: {there}") from error
    except Exception:
        say(f"Note: {there}", quiet=False)
        raise


def begun(folder: Path, ranks: Ranks) -> bool:
    """Whether the launcher starts this command anew, and it has finished batches already."""
    store = Store(folder / "ledger")
    return ranks.launch.attempt > 0 and store.exists and store.events() > 0


def edit_again(given: dict[str, Any], folder: Path, kept: int) -> str:
    """What goes on after `kept` batches of this `nulledit edit`: the same command again.

    Without what the ledger has by then: model and seed, and what the first batch of an epoch fixes.
    """
    fixed = kept > 0 or not given["new_epoch"]
    known = {*FIXED, "run", *(("new_epoch", *OF_EPOCH) if fixed else ())}
    words = [*given_words(without=known), "--continue", str(folder)]
    return shlex.join(["nulledit", "edit", *words])


def retry_again(_kept: int) -> str:
    """The same `nulledit retry` again, which asks every fact anew."""
    return shlex.join(["nulledit", "retry", *given_words()])
