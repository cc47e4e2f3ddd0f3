"""A history and the store that keeps it: both change together, or neither."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from nulledit.errors import LedgerError
from nulledit.ledger.records import Batch, Column, Epoch, Event, History
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
    """Writes a history: in memory, and to a store once there is one."""

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
        """Changes inside reach the store in one step, if `keep` was called; else they are undone.

        With `kind` they become one event of that kind.
        """
        h, store, trial = self.history, self.store, Trial()
        before = _copy(h)
        active = {c.id for c in h.active}
        self.store = None
        try:
            yield trial
            if trial.kept:
                if kind:
                    now = {c.id for c in h.active}
                    del h.events[len(before.events) :]
                    if now != active:
                        h.events.append(_event(h, kind, now - active, active - now))
                if store is not None and h.counts != self._stored:
                    self.store = store
                    self._commit_to(store)
        except BaseException:
            trial.kept = self._stored == h.counts and store is not None
            raise
        finally:
            self.store = store
            if not trial.kept:
                _put_back(h, before)

    def begin(self, epoch: Epoch, tensors: dict[str, Tensor]) -> None:
        """Open an epoch; it is stored together with its first batch."""
        self.history.tensors[epoch.tensors] = tensors
        self.history.epochs.append(epoch)

    def drop_empty_epoch(self) -> None:
        """Take back an epoch that got no batch."""
        h = self.history
        used = {b.epoch for b in h.batches}
        while h.epochs and h.epochs[-1].id not in used:
            h.epochs.pop()

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
        h = self.history
        before = _copy(h)
        on, off = {c.id for c in activated}, {c.id for c in deactivated}
        h.columns[:] = [
            replace(c, active=c.id in on or (c.active and c.id not in off)) for c in h.columns
        ]
        h.columns += made
        if tensors is not None:
            digest, _ = tensor_bytes(tensors)
            h.batches.append(Batch(len(h.batches) + 1, len(h.epochs), digest))
            h.tensors[digest] = tensors
        h.events.append(_event(h, kind, on | {c.id for c in made}, off))
        if self.store is None:
            return
        try:
            self._commit_to(self.store)
        except BaseException:
            if self._stored != h.counts:
                _put_back(h, before)
            raise

    def _commit_to(self, store: Store) -> None:
        try:
            store.commit(self.history, self._stored)
        except BaseException:
            if self._reached(store):  # interrupted just as the transaction had ended
                self._stored = self.history.counts
            raise
        self._stored = self.history.counts

    def _reached(self, store: Store) -> bool:
        try:
            return store.events() == len(self.history.events)
        except (sqlite3.Error, OSError, LedgerError):
            return False


def _event(history: History, kind: str, on: set[int], off: set[int]) -> Event:
    time = datetime.now(UTC).isoformat(timespec="seconds")
    number = len(history.events) + 1
    return Event(number, kind, time, tuple(sorted(on)), tuple(sorted(off)))


def _copy(h: History) -> History:
    return History(
        h.base, list(h.epochs), list(h.batches), list(h.columns), list(h.events), dict(h.tensors)
    )


def _put_back(history: History, before: History) -> None:
    for name in ("epochs", "batches", "columns", "events"):
        getattr(history, name)[:] = getattr(before, name)
    history.tensors.clear()
    history.tensors.update(before.tensors)
