"""What a call has kept in a run's ledger when it is cut off, and the command that goes on."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nulledit.cli.common import Interrupted, say
from nulledit.cli.options import given_words
from nulledit.cli.recipe_options import FIXED, OF_EPOCH
from nulledit.editing.editor import Editor
from nulledit.errors import LedgerError, RankError
from nulledit.io.text import count
from nulledit.ledger.store import Store
from nulledit.parallel.ranks import Ranks

NONE = "no batch was finished"


class Kept:
    """The batches that one call commits to the ledger of a run."""

    def __init__(
        self, editor: Editor, folder: Path, again: Callable[[int], str], *, begins: bool = False
    ):
        """Made before the first batch. `again`: batches kept -> the command that goes on then.

        `begins`: the call makes the run.
        """
        self.editor, self.folder, self.again, self.begins = editor, folder, again, begins
        self.held = len(editor.history.events)
        self.created, self.attached = not folder.exists(), False

    def attach(self) -> None:
        """Begin the run's ledger; removed again if no batch comes into it."""
        self.attached = True
        self.editor.attach(self.folder)

    @property
    def batches(self) -> int:
        """How many were committed so far; with a gate none is before the end."""
        there = Store(self.folder / "ledger").exists
        return len(self.editor.history.events) - self.held if there else 0

    @contextmanager
    def told(self) -> Iterator[None]:
        """Where what is inside is cut off, say what is kept and what goes on from there."""
        try:
            yield
        except KeyboardInterrupt as error:
            kept = self._settled()
            if self.begins and not kept:
                raise Interrupted(
                    "interrupted before the first batch was finished: nothing was kept"
                ) from error
            again = self.again(kept)
            raise Interrupted(f"interrupted: {self._line(kept)}; go on with: {again}") from error
        except RankError as error:
            self._settled()
            raise error.advised(self.advice()) from error
        except Exception:
            kept = self._settled()
            if kept:
                say(f"Note: {self._line(kept)}; go on with: {self.again(kept)}", quiet=False)
            raise

    def advice(self) -> str:
        """What to do after a rank was lost."""
        kept = self.batches
        if kept or not self.begins:
            return f"{self._line(kept)}; go on, started as before, with: {self.again(kept)}"
        return f"{NONE}: start the same command again"

    def _settled(self) -> int:
        """How many batches are kept; if none, what the call made in the folder is removed."""
        kept = self.batches
        if self.attached and not kept:
            with suppress(LedgerError):  # another one is making something there
                Store(self.folder / "ledger").discard()
            if self.created and self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
        return kept

    def _line(self, kept: int) -> str:
        if not kept:
            return NONE
        return (
            f"{count(kept, 'finished batch')} {'is' if kept == 1 else 'are'} kept in {self.folder}"
        )


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
