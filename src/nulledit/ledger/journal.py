"""A history and the store that keeps it: both change together, or neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.ledger.entries import Batch, Column, Epoch, Event, History
from nulledit.ledger.store import Store, tensor_bytes


class Journal:
    """Writes a history: in memory, and to a store once there is one."""

    def __init__(self, history: History, store: Store | None = None):
        """Go on with `history`; `store` holds exactly that, or nothing is kept on disk."""
        self.history, self.store = history, store

    def keep_in(self, folder: Path) -> None:
        """Begin a ledger in `folder` with all there is, and commit every later change to it."""
        store = Store(folder)
        store.create(self.history)
        self.store = store

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

        Whatever error the store raises, the history is as before then.
        """
        h = self.history
        stored_epochs = len(h.epochs) if h.events else 0
        counts = (stored_epochs, len(h.batches), len(h.columns), len(h.events))
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
                epochs, batches, columns, events = counts
                self.store.commit(h, epochs=epochs, batches=batches, columns=columns, events=events)
        except BaseException:
            h.columns[:], h.batches[:], h.events[:] = before
            raise

    def stored_version(self, facts: Sequence[Fact]) -> list[Column] | None:
        """Inactive columns made together for exactly `facts`, newest first; [] for no facts."""
        if not facts:
            return []
        groups: dict[tuple[int, int], list[Column]] = {}
        for column in self.history.columns:
            groups.setdefault((column.batch, column.group), []).append(column)
        for columns in reversed(list(groups.values())):
            same = len(columns) == len(facts) and {c.fact for c in columns} == set(facts)
            if same and not any(c.active for c in columns):
                return columns
        return None
