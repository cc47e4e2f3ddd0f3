"""A history and the store that keeps it: both change together, or neither."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from nulledit.errors import LedgerError
from nulledit.ledger.records import Column, Epoch, History
from nulledit.ledger.store import Store, tensor_bytes


@dataclass
class Trial:
    """Changes that are not kept yet."""

    kept: bool = field(default=False, init=False)
    """Whether they will be."""

    def keep(self) -> None:
        """Keep them when the block ends."""
        self.kept = True


class Journal:
    """The history as it is now: in memory, and in a store once there is one."""

    def __init__(self, history: History, store: Store | None = None):
        """Go on with `history`; `store` holds exactly that, or nothing is kept on disk."""
        self.history, self.store = history, store
        self._stored = history.counts

    def keep_in(self, folder: Path) -> None:
        """Begin a ledger in `folder` with all there is, and commit every later change to it."""
        store = Store(folder)
        store.create(self.history)
        self.store, self._stored = store, self.history.counts

    def copy_to(self, store: Store) -> None:
        """Bring another store to this history; LedgerError if it holds something else."""
        if not store.exists:
            store.create(self.history)
            return
        there, events = store.load(), self.history.events
        if there.base != self.history.base or there.events != events[: len(there.events)]:
            raise LedgerError(f"{store.folder}: holds the ledger of another run")
        if len(there.events) < len(events):
            store.commit(self.history, there.counts)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One writer at a time: LedgerError if another process is at work on the store."""
        if self.store is None:
            yield
            return
        with self.store.writing(events=self._stored[3]):
            yield

    @contextmanager
    def together(self, kind: str = "") -> Iterator[Trial]:
        """Changes inside reach the store in one step, if `keep` was called; else none was made.

        With `kind` they become one event of that kind.
        """
        before, store, trial = self.history, self.store, Trial()
        self.store = None
        try:
            yield trial
            self.store = store
            if trial.kept:
                self._change(self.history.as_one_event(kind, before) if kind else self.history)
        except BaseException:
            reached = store is not None and self.history.counts == self._stored
            trial.kept = trial.kept and reached
            raise
        finally:
            self.store = store
            if not trial.kept:
                self.history = before

    def begin(self, epoch: Epoch, tensors: Mapping[str, Tensor]) -> None:
        """Open an epoch; it is stored together with its first batch."""
        self.history = self.history.with_epoch(epoch, tensors)

    def drop_empty_epoch(self) -> None:
        """Take back an epoch that got no batch."""
        self.history = self.history.without_empty_epochs()

    def commit(
        self,
        kind: str,
        made: Sequence[Column],
        *,
        deactivated: Sequence[Column],
        activated: Sequence[Column] = (),
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Add a batch of columns `made` with its `tensors`, and change which columns are active.

        Whatever error the store raises, the history is as before then, unless the store has it.
        """
        digest = "" if tensors is None else tensor_bytes(tensors)[0]
        self._change(
            self.history.after(
                kind, made, on=activated, off=deactivated, digest=digest, tensors=tensors
            )
        )

    def _change(self, history: History) -> None:
        """Take `history` for the one that is, once the store has it."""
        if self.store is not None and history.counts != self._stored:
            try:
                self.store.commit(history, self._stored)
            except BaseException:
                if self._reached(self.store, history):  # interrupted just as the commit had ended
                    self.history, self._stored = history, history.counts
                raise
            self._stored = history.counts
        self.history = history

    @staticmethod
    def _reached(store: Store, history: History) -> bool:
        try:
            return store.events() == len(history.events)
        except (sqlite3.Error, OSError, LedgerError):
            return False
