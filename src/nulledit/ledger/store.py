"""A ledger on disk: `ledger.db` (SQLite) and `tensors/<sha256>.safetensors`.

Tensor files are written under a temporary name, synced and renamed to the hash of their content
before the transaction that names them; a crash leaves the state before or after, never between.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from nulledit.data.facts import Fact
from nulledit.errors import LedgerError
from nulledit.files import replacing
from nulledit.ledger.entries import Base, Batch, Column, Epoch, Event, History

SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE epochs (
    id INTEGER PRIMARY KEY, recipe TEXT NOT NULL, seed INTEGER NOT NULL, contexts TEXT NOT NULL,
    statistics TEXT NOT NULL, tensors TEXT NOT NULL) STRICT;
CREATE TABLE batches (
    id INTEGER PRIMARY KEY, epoch INTEGER NOT NULL REFERENCES epochs, tensors TEXT NOT NULL) STRICT;
CREATE TABLE columns (
    id INTEGER PRIMARY KEY, batch INTEGER NOT NULL REFERENCES batches, row INTEGER NOT NULL,
    "group" INTEGER NOT NULL, fact_id TEXT NOT NULL, fact TEXT NOT NULL, active INTEGER NOT NULL,
    outcome TEXT NOT NULL, replaces INTEGER NOT NULL, part INTEGER NOT NULL) STRICT;
CREATE TABLE events (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, time TEXT NOT NULL, activated TEXT NOT NULL,
    deactivated TEXT NOT NULL) STRICT;
"""


def tensor_bytes(tensors: dict[str, Tensor]) -> tuple[str, bytes]:
    """SHA-256 and content of the file that holds `tensors`."""
    raw = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    return hashlib.sha256(raw).hexdigest(), raw


class Store:
    """The folder of one ledger. Everything committed survives a crash."""

    def __init__(self, folder: Path):
        """`folder`: where `ledger.db` is or will be."""
        self.folder = folder
        self.database = folder / "ledger.db"
        self.tensors = folder / "tensors"

    @property
    def exists(self) -> bool:
        """Whether a ledger was committed here."""
        return self.database.is_file()

    def create(self, history: History) -> None:
        """Begin a ledger here with all that `history` holds; LedgerError if there is one."""
        if self.exists:
            raise LedgerError(f"{self.folder}: holds a ledger already")
        self.tensors.mkdir(parents=True, exist_ok=True)
        for digest, tensors in history.tensors.items():
            self._write_tensors(digest, tensors)
        meta = {"schema_version": str(SCHEMA_VERSION), "base": json.dumps(asdict(history.base))}
        with replacing(self.database) as partial, closing(sqlite3.connect(partial)) as db, db:
            db.executescript(SCHEMA)
            db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
            _insert(db, history.epochs, history.batches, history.columns, history.events)

    def commit(self, history: History, stored: tuple[int, int, int, int]) -> None:
        """Add what `history` holds beyond the counts `stored`, and which columns are active.

        One step: all of it or nothing. LedgerError if the ledger on disk is not at those counts:
        another process has written to it.
        """
        epochs, batches, columns, events = stored
        new_batches, new_epochs = history.batches[batches:], history.epochs[epochs:]
        for digest in [e.tensors for e in new_epochs] + [b.tensors for b in new_batches]:
            self._write_tensors(digest, history.tensors[digest])
        with closing(self._connect()) as db, db:
            db.execute("BEGIN IMMEDIATE")
            found = db.execute("SELECT COUNT(*) FROM events").fetchone()[0]
            if found != events:
                raise LedgerError(
                    f"{self.folder}: another process has written to this ledger "
                    f"({found} events, expected {events}); nothing was changed, load it again"
                )
            changed = [(int(c.active), c.id) for c in history.columns[:columns]]
            db.executemany("UPDATE columns SET active = ? WHERE id = ?", changed)
            _insert(db, new_epochs, new_batches, history.columns[columns:], history.events[events:])

    def load(self) -> History:
        """Read everything; LedgerError where something is missing or has another hash."""
        if not self.exists:
            raise LedgerError(f"{self.folder}: no ledger here (expected ledger.db)")
        try:
            with closing(self._connect()) as db:
                meta = dict(db.execute("SELECT name, value FROM meta"))
                if int(meta["schema_version"]) != SCHEMA_VERSION:
                    raise LedgerError(
                        f"{self.folder}: ledger of schema {meta['schema_version']}, this version "
                        f"reads schema {SCHEMA_VERSION}"
                    )
                history = History(
                    Base(**json.loads(meta["base"])),
                    [_epoch(r) for r in db.execute("SELECT * FROM epochs ORDER BY id")],
                    [Batch(*r) for r in db.execute("SELECT * FROM batches ORDER BY id")],
                    [_column(r) for r in db.execute("SELECT * FROM columns ORDER BY id")],
                    [_event(r) for r in db.execute("SELECT * FROM events ORDER BY id")],
                )
        except (sqlite3.Error, KeyError, ValueError, TypeError) as error:
            raise LedgerError(f"{self.database}: not a readable ledger ({error})") from error
        for digest in [e.tensors for e in history.epochs] + [b.tensors for b in history.batches]:
            history.tensors[digest] = self._read_tensors(digest)
        return history

    def events(self) -> int:
        """Number of events committed."""
        with closing(self._connect()) as db:
            return int(db.execute("SELECT COUNT(*) FROM events").fetchone()[0])

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.database, isolation_level=None, timeout=10)
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        return db

    def _write_tensors(self, digest: str, tensors: dict[str, Tensor]) -> None:
        file = self.tensors / f"{digest}.safetensors"
        if file.is_file():
            return
        found, raw = tensor_bytes(tensors)
        if found != digest:
            raise LedgerError(f"tensors of {digest[:12]} changed in memory; nothing was written")
        for left in self.tensors.glob(".*.part"):
            left.unlink()  # of a process that was killed
        with replacing(file) as partial:
            partial.write_bytes(raw)

    def _read_tensors(self, digest: str) -> dict[str, Tensor]:
        file = self.tensors / f"{digest}.safetensors"
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise LedgerError(f"{file}: missing, but the ledger names it") from error
        found = hashlib.sha256(raw).hexdigest()
        if found != digest:
            raise LedgerError(f"{file}: damaged: its hash is {found[:12]}, expected {digest[:12]}")
        try:
            return load(raw)
        except SafetensorError as error:
            raise LedgerError(f"{file}: not a safetensors file ({error})") from error


def _insert(
    db: sqlite3.Connection,
    epochs: Iterable[Epoch],
    batches: Iterable[Batch],
    columns: Iterable[Column],
    events: Iterable[Event],
) -> None:
    db.executemany(
        "INSERT INTO epochs VALUES (?, ?, ?, ?, ?, ?)",
        [
            (e.id, _dump(e.recipe), e.seed, _dump(e.contexts), _dump(e.statistics), e.tensors)
            for e in epochs
        ],
    )
    db.executemany(
        "INSERT INTO batches VALUES (?, ?, ?)", [(b.id, b.epoch, b.tensors) for b in batches]
    )
    db.executemany(
        "INSERT INTO columns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *(c.id, c.batch, c.row, c.group, c.fact.id, _dump(c.fact.to_dict())),
                *(int(c.active), _dump(c.outcome), c.replaces, c.part),
            )
            for c in columns
        ],
    )
    db.executemany(
        "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
        [(e.id, e.kind, e.time, _dump(e.activated), _dump(e.deactivated)) for e in events],
    )


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _epoch(row: tuple[Any, ...]) -> Epoch:
    id_, recipe, seed, contexts, statistics, tensors = row
    return Epoch(
        id_, json.loads(recipe), seed, tuple(json.loads(contexts)), json.loads(statistics), tensors
    )


def _column(row: tuple[Any, ...]) -> Column:
    id_, batch, place, group, _fact_id, fact, active, outcome, replaces, part = row
    request = Fact.from_dict(json.loads(fact))
    found = json.loads(outcome)
    return Column(id_, batch, place, group, request, bool(active), found, replaces, part)


def _event(row: tuple[Any, ...]) -> Event:
    id_, kind, time, activated, deactivated = row
    return Event(id_, kind, time, tuple(json.loads(activated)), tuple(json.loads(deactivated)))
