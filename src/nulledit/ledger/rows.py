"""Records as rows of the ledger's database."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

from nulledit.data.facts import Fact
from nulledit.ledger.records import Column, Epoch, Event, History, ValueOutcome

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


def insert(db: sqlite3.Connection, history: History, stored: tuple[int, int, int, int]) -> None:
    """Add what `history` holds beyond the counts `stored`."""
    epochs, batches, columns, events = stored
    db.executemany(
        "INSERT INTO epochs VALUES (?, ?, ?, ?, ?, ?)",
        [
            (e.id, _dump(e.stored), e.seed, _dump(e.contexts), _dump(e.statistics), e.tensors)
            for e in history.epochs[epochs:]
        ],
    )
    db.executemany(
        "INSERT INTO batches VALUES (?, ?, ?)",
        [(b.id, b.epoch, b.tensors) for b in history.batches[batches:]],
    )
    db.executemany(
        "INSERT INTO columns VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *(c.id, c.batch, c.row, c.group, c.fact.id, _dump(c.fact.to_dict())),
                *(int(history.is_active(c)), _dump(c.outcome.to_dict()), c.replaces, c.part),
            )
            for c in history.columns[columns:]
        ],
    )
    db.executemany(
        "INSERT INTO events VALUES (?, ?, ?, ?, ?)",
        [
            (e.id, e.kind, e.time, _dump(e.activated), _dump(e.deactivated))
            for e in history.events[events:]
        ],
    )


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def epoch_of(row: tuple[Any, ...]) -> Epoch:
    """An epoch from its row."""
    id_, recipe, seed, contexts, statistics, tensors = row
    return Epoch(
        id_, json.loads(recipe), seed, tuple(json.loads(contexts)), json.loads(statistics), tensors
    )


def column_of(row: tuple[Any, ...]) -> Column:
    """A column from its row."""
    id_, batch, place, group, _fact_id, fact, _active, outcome, replaces, part = row
    request = Fact.from_dict(json.loads(fact))
    found = ValueOutcome.from_dict(json.loads(outcome))
    return Column(id_, batch, place, group, request, found, replaces, part)


def event_of(row: tuple[Any, ...]) -> Event:
    """An event from its row."""
    id_, kind, time, activated, deactivated = row
    return Event(id_, kind, time, tuple(json.loads(activated)), tuple(json.loads(deactivated)))
