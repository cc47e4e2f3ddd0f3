"""A ledger on disk: `ledger.db` (SQLite), its hash in `ledger.db.sha256`, and
`tensors/<sha256>.safetensors`.

Tensor files are written under a temporary name, synced and renamed to the hash of their content
before the database that names them. The database is never written in place: a transaction is
applied to a copy, the copy's hash is listed beside the old one, and the copy is renamed over it.
A crash leaves the state before or after, never between, and at every moment the database on disk
is one that is listed. One process writes at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from nulledit.errors import LedgerError, NullEditError
from nulledit.io.files import replacing, sha256_of, write_text
from nulledit.ledger.records import Base, Batch, Epoch, History
from nulledit.ledger.rows import SCHEMA, SCHEMA_VERSION, column_of, epoch_of, event_of, insert

if TYPE_CHECKING:
    from torch import Tensor  # reading the database needs no torch

LOCK_SECONDS = 1.0  # how long a writer waits for another one
LARGEST_DATABASE = 1 << 30  # bytes; 500 facts take about one million
TRIES = 20  # at reading while others write
BLOCK = 1 << 20  # bytes copied at once
DIGEST = re.compile(r"[0-9a-f]{64}")
PARTIAL = re.compile(r"\.ledger\.db(\.sha256)?\.[0-9]+\.part")
LISTING = re.compile(r"([0-9a-f]{64}\n)(?:(?!\1)[0-9a-f]{64}\n)?")
# What a row of another program's making may do to a reader.
UNREADABLE = (
    *(sqlite3.Error, NullEditError, KeyError, ValueError, TypeError, AttributeError),
    *(OverflowError, RecursionError),
)


def tensor_bytes(tensors: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """SHA-256 and content of the file that holds `tensors`."""
    from safetensors.torch import save

    raw = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    return hashlib.sha256(raw).hexdigest(), raw


class Store:
    """The folder of one ledger. Everything committed survives a crash."""

    def __init__(self, folder: Path):
        """`folder`: where `ledger.db` is or will be."""
        self.folder = folder
        self.database = folder / "ledger.db"
        self.listing = folder / "ledger.db.sha256"
        self.tensors = folder / "tensors"
        self._writer: tuple[int, int] | None = None  # process and thread

    @property
    def exists(self) -> bool:
        """Whether a ledger was committed here."""
        return self.database.is_file()

    @property
    def unfinished(self) -> bool:
        """Whether all that lies here is what a `create` that was killed left."""
        if self.exists or not self.folder.is_dir():
            return False
        entries = [p for p in self.folder.rglob("*") if p != self.tensors]
        left = self._strays(set())
        return all(
            p in left
            or (p.parent == self.folder and p.name in (".lock", self.listing.name))
            or (p.parent == self.folder and PARTIAL.fullmatch(p.name))
            for p in entries
        )

    # -- writing -----------------------------------------------------------------------------

    @contextmanager
    def writing(self, *, events: int | None = None) -> Iterator[None]:
        """The only writer of this ledger inside, across processes; it ends with the process, too.

        May be entered again inside. `events`: how many the ledger is to hold. LedgerError if it
        holds another number, or if another process is writing.
        """
        me = (os.getpid(), threading.get_ident())
        if self._writer == me:
            yield
            return
        if not self.folder.is_dir():
            raise LedgerError(f"{self.folder}: no ledger here")
        lock = FileLock(self.folder / ".lock", timeout=LOCK_SECONDS)
        try:
            lock.acquire()
        except Timeout as error:
            raise LedgerError(
                f"{self.folder}: {self._holder()} is writing to this ledger; wait for it, "
                "nothing was changed"
            ) from error
        try:
            self._writer = me
            with suppress(OSError):  # only for the message above
                (self.folder / ".lock").write_text(f"{me[0]}\n", encoding="ascii")
            if events is not None:
                self._check_there()
                self._check_count(self.events(), events)
            yield
        finally:
            self._writer = None
            lock.release()

    def create(self, history: History) -> None:
        """Begin a ledger here with all that `history` holds; LedgerError if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.writing():
            if self.exists:
                raise LedgerError(f"{self.folder}: holds a ledger already")
            self.tensors.mkdir(exist_ok=True)
            self._sweep(set(history.tensors))
            for digest, tensors in history.tensors.items():
                self._write_tensors(digest, tensors)
            meta = {
                "schema_version": str(SCHEMA_VERSION),
                "base": json.dumps(history.base.to_dict()),
            }
            with replacing(self.database) as partial:
                with closing(_writable(partial)) as db, db:
                    db.executescript(f"BEGIN; {SCHEMA}")
                    db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
                    insert(db, history, (0, 0, 0, 0))
                self._list(sha256_of(partial))

    def commit(self, history: History, stored: tuple[int, int, int, int]) -> None:
        """Add what `history` holds beyond the counts `stored`, and which columns are active.

        One step: all of it or nothing. LedgerError if the ledger on disk is not at those counts:
        another process has written to it.
        """
        epochs, batches, columns, events = stored
        new_batches, new_epochs = history.batches[batches:], history.epochs[epochs:]
        with self.writing():
            self._check_there()
            with replacing(self.database) as partial:
                old = self._copy_to(partial)
                with closing(_writable(partial)) as db, db:
                    db.execute("BEGIN IMMEDIATE")
                    self._check_count(_count_events(db), events)
                    self._sweep(_digests(db) | set(history.tensors))
                    for digest in _named(new_epochs, new_batches):
                        self._write_tensors(digest, history.tensors[digest])
                    changed = [(int(history.is_active(c)), c.id) for c in history.columns[:columns]]
                    db.executemany("UPDATE columns SET active = ? WHERE id = ?", changed)
                    insert(db, history, stored)
                new = sha256_of(partial)
                self._list(old, new)
            self._list(new)

    def settle(self) -> None:
        """List the database's hash alone, where a commit that was killed left two."""
        if len(self._listed()) > 1:
            with self.writing():
                self._list(self.check())

    def discard(self) -> None:
        """Remove a ledger in which no batch was finished; LedgerError if one was."""
        if not self.folder.is_dir():
            return
        with self.writing():
            if self.exists and self.events():
                raise LedgerError(f"{self.folder}: holds finished batches; it is not removed")
            shutil.rmtree(self.folder)

    # -- reading -----------------------------------------------------------------------------

    def check(self) -> str:
        """The database's hash; LedgerError if it is not the one listed, or either is missing."""
        with self._listed_database() as (_, digest):
            return digest

    def load(self) -> History:
        """Read everything; LedgerError where something is missing or has another hash."""
        history = self.read()
        named = _named(history.epochs, history.batches)
        return replace(history, tensors={digest: self._read_tensors(digest) for digest in named})

    def read(self) -> History:
        """Everything but the tensors, from a database whose hash is the one listed."""
        self._check_there()
        try:
            with self._reading() as db:
                history = self._history(db)
        except UNREADABLE as error:
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(f"{self.database}: not a readable ledger ({error})") from error
        for digest in _named(history.epochs, history.batches):
            if not isinstance(digest, str) or not DIGEST.fullmatch(digest):  # it becomes a path
                raise LedgerError(f"{self.database}: names a tensor file by {digest!r}, no hash")
        return history

    def events(self) -> int:
        """Number of events committed."""
        with self._reading() as db:
            return _count_events(db)

    def tensor_file(self, digest: str) -> Path:
        """The file of the tensors that have this hash."""
        return self.tensors / f"{digest}.safetensors"

    def check_tensors(self, digest: str) -> None:
        """LedgerError if the file is missing or has another content; read block by block."""
        file = self.tensor_file(digest)
        try:
            found = sha256_of(file)
        except OSError as error:
            raise LedgerError(f"{file}: missing, but the ledger names it") from error
        if found != digest:
            raise LedgerError(f"{file}: damaged: its hash is {found[:12]}, expected {digest[:12]}")

    def unnamed(self, history: History) -> list[Path]:
        """Tensor files that `history` does not name: of a write that was killed."""
        return sorted(self._strays(set(_named(history.epochs, history.batches))))

    # -- inside ------------------------------------------------------------------------------

    def _history(self, db: sqlite3.Connection) -> History:
        meta = dict(db.execute("SELECT name, value FROM meta"))
        if int(meta["schema_version"]) != SCHEMA_VERSION:
            raise LedgerError(
                f"{self.folder}: ledger of schema {meta['schema_version']}, this version "
                f"reads schema {SCHEMA_VERSION}"
            )
        history = History(
            Base.from_dict(json.loads(meta["base"])),
            tuple(epoch_of(r) for r in db.execute("SELECT * FROM epochs ORDER BY id")),
            tuple(Batch(*r) for r in db.execute("SELECT * FROM batches ORDER BY id")),
            tuple(column_of(r) for r in db.execute("SELECT * FROM columns ORDER BY id")),
            tuple(event_of(r) for r in db.execute("SELECT * FROM events ORDER BY id")),
        )
        marked = {row[0] for row in db.execute("SELECT id FROM columns WHERE active")}
        if marked != history.active_ids:
            raise LedgerError(f"{self.database}: its active columns are not what its events leave")
        return history

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The database as it was at one moment, in memory: what was hashed is what is read."""
        with self._listed_database() as (file, _), closing(sqlite3.connect(":memory:")) as db:
            file.seek(0)
            db.deserialize(file.read())
            db.execute("PRAGMA trusted_schema = OFF")
            yield db

    @contextmanager
    def _listed_database(self) -> Iterator[tuple[BufferedReader, str]]:
        """The opened database and its hash, which is listed.

        Commits rename files over both names, so an opened database never changes: the listing
        need only be read while no commit falls between it and the opening, and hashing may take
        as long as it takes, however often others write.
        """
        for _ in range(TRIES):
            with self.database.open("rb") as file:
                listed, digest = self._listed(), self._hash_of(file)
                if digest in listed:
                    yield file, digest
                    return
                if os.path.samestat(os.fstat(file.fileno()), self.database.stat()):
                    break  # no other process has written meanwhile
        raise LedgerError(
            f"{self.database}: damaged: its hash is {digest[:12]}, {self.listing.name} lists "
            f"{' and '.join(digest[:12] for digest in listed)}; put back a copy of both files"
        )

    def _hash_of(self, file: BufferedReader) -> str:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_DATABASE:
            raise LedgerError(f"{self.database}: {size} bytes; more than {LARGEST_DATABASE}")
        return hashlib.file_digest(file, "sha256").hexdigest()

    def _listed(self) -> list[str]:
        try:
            with self.listing.open("rb") as file:
                text = file.read(200).decode("ascii", "replace")
        except FileNotFoundError as error:
            raise LedgerError(
                f"{self.listing}: missing: it holds the hash that {self.database.name} is checked "
                "by; put back a copy of both files"
            ) from error
        if not LISTING.fullmatch(text):
            raise LedgerError(f"{self.listing}: damaged: expected one line or two of 64 hex digits")
        return text.split()

    def _list(self, *hashes: str) -> None:
        write_text(self.listing, "".join(f"{digest}\n" for digest in dict.fromkeys(hashes)))

    def _copy_to(self, partial: Path) -> str:
        """Copy the database, block by block; its hash, which must be listed."""
        digest = hashlib.sha256()
        with self.database.open("rb") as source, partial.open("wb") as target:
            while block := source.read(BLOCK):
                digest.update(block)
                target.write(block)
        if digest.hexdigest() not in self._listed():
            self.check()  # says what is wrong
        return digest.hexdigest()

    def _check_there(self) -> None:
        if not self.exists:
            raise LedgerError(f"{self.folder}: no ledger here (expected ledger.db)")

    def _check_count(self, found: int, expected: int) -> None:
        if found != expected:
            raise LedgerError(
                f"{self.folder}: another process has written to this ledger "
                f"({found} events, expected {expected}); nothing was changed, load it again"
            )

    def _holder(self) -> str:
        number = ""
        with suppress(OSError, ValueError):
            number = (self.folder / ".lock").read_text(encoding="ascii")[:20].strip()
        if number == str(os.getpid()):
            return "another editor of this process"
        return f"another process (pid {number})" if number.isdigit() else "another process"

    def _sweep(self, named: set[str]) -> None:
        """Remove what killed writers left; under the lock nobody else has a file under way."""
        for file in self._strays(named):
            file.unlink(missing_ok=True)
        for ending in ("-journal", "-wal", "-shm"):
            self.database.with_name(self.database.name + ending).unlink(missing_ok=True)
        own = f".{self.database.name}.{os.getpid()}.part"
        for file in self.folder.glob(f".{self.database.name}*.part*"):
            if file.name != own:
                file.unlink(missing_ok=True)

    def _strays(self, named: set[str]) -> list[Path]:
        """Tensor files under temporary names or hashes that nothing names; not what others put."""
        found = []
        for file in self.tensors.iterdir() if self.tensors.is_dir() else ():
            stem, _, ending = file.name.partition(".safetensors")
            if stem.startswith(".") and ending.endswith(".part"):
                found.append(file)
            elif not ending and DIGEST.fullmatch(stem) and stem not in named:
                found.append(file)
        return found

    def _write_tensors(self, digest: str, tensors: Mapping[str, Tensor]) -> None:
        file = self.tensor_file(digest)
        if file.is_file() and sha256_of(file) == digest:
            return
        found, raw = tensor_bytes(tensors)
        if found != digest:
            raise LedgerError(f"tensors of {digest[:12]} changed in memory; nothing was written")
        with replacing(file) as partial:
            partial.write_bytes(raw)

    def _read_tensors(self, digest: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        self.check_tensors(digest)  # before anything of it is in memory
        file = self.tensor_file(digest)
        try:
            return load(file.read_bytes())
        except SafetensorError as error:
            raise LedgerError(f"{file}: not a safetensors file ({error})") from error


def _named(epochs: Iterable[Epoch], batches: Iterable[Batch]) -> list[str]:
    """Hashes of their tensor files."""
    return [e.tensors for e in epochs] + [b.tensors for b in batches]


def _writable(file: Path) -> sqlite3.Connection:
    """A copy that nobody else sees: neither a journal nor syncing is needed before its rename."""
    db = sqlite3.connect(file, isolation_level=None)
    db.execute("PRAGMA journal_mode = MEMORY")
    db.execute("PRAGMA synchronous = OFF")
    db.execute("PRAGMA temp_store = MEMORY")
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA trusted_schema = OFF")
    return db


def _count_events(db: sqlite3.Connection) -> int:
    return int(db.execute("SELECT COUNT(*) FROM events").fetchone()[0])


def _digests(db: sqlite3.Connection) -> set[str]:
    query = "SELECT tensors FROM epochs UNION SELECT tensors FROM batches"
    return {row[0] for row in db.execute(query)}
