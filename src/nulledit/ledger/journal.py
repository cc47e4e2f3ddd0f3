"""A history and the store that keeps it: both change together, or neither."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.errors import LedgerError
from nulledit.ledger.entries import Batch, Column, Epoch, Event, History
from nulledit.ledger.store import Store, tensor_bytes


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

    def begin(self, epoch: Epoch, tensors: dict[str, Tensor]) -> None:
        """Open an epoch; it is stored together with its first batch."""
        self.history.tensors[epoch.tensors] = tensors
        self.history.epochs.append(epoch)

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
        before = (list(h.columns), list(h.batches), list(h.events))
        on, off = {c.id for c in activated}, {c.id for c in deactivated}
        h.columns[:] = [
            replace(c, active=c.id in on or (c.active and c.id not in off)) for c in h.columns
        ]
        h.columns += made
        if tensors is not None:
            digest, _ = tensor_bytes(tensors)
            h.batches.append(Batch(len(h.batches) + 1, len(h.epochs), digest))
            h.tensors[digest] = tensors
        h.events.append(
            Event(
                id=len(h.events) + 1,
                kind=kind,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                activated=tuple(c.id for c in (*activated, *made)),
                deactivated=tuple(sorted(off)),
            )
        )
        try:
            if self.store:
                self.store.commit(h, self._stored)
        except BaseException:
            if self._reached_the_store():  # interrupted just as the transaction had ended
                self._stored = h.counts
            else:
                h.columns[:], h.batches[:], h.events[:] = before
            raise
        self._stored = h.counts

    def _reached_the_store(self) -> bool:
        try:
            return self.store is not None and self.store.events() == len(self.history.events)
        except (sqlite3.Error, OSError):
            return False

    def stored_version(self, facts: Sequence[Fact]) -> list[Column] | None:
        """Inactive columns made together for exactly `facts`, newest first."""
        groups: dict[tuple[int, int], list[Column]] = {}
        for column in self.history.columns:
            groups.setdefault((column.batch, column.group), []).append(column)
        for columns in reversed(list(groups.values())):
            if {c.fact for c in columns} == set(facts) and not any(c.active for c in columns):
                return columns
        return None

    def answers_behind(self, columns: Sequence[Column]) -> list[Column]:
        """The older answers that `columns` stand in for, through all their re-makings."""
        by_id = {c.id: c for c in self.history.columns}
        found = []
        for column in columns:
            older = by_id.get(column.replaces)
            while older is not None and older.fact == column.fact:
                older = by_id.get(older.replaces)
            if older is not None:
                found.append(older)
        return found
