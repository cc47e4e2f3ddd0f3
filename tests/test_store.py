"""The ledger's files: hashes, one writer, and what killed writers leave."""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nulledit import Fact
from nulledit.errors import LedgerError
from nulledit.io.files import recover_folder, replacing, replacing_folder, sweep
from nulledit.ledger import store as store_module
from nulledit.ledger.model_folder import FolderState, read_state
from nulledit.ledger.records import Base, Column, Epoch, History, ValueOutcome
from nulledit.ledger.store import Store, tensor_bytes

TENSORS = {"keys.1": torch.arange(6.0).reshape(2, 3)}


def begun():
    """A history with an epoch and no batch."""
    tensors = {"base.1": torch.eye(3)}
    epoch = Epoch(1, {"layers": [1]}, 0, ("{}",), {"tokens": 5}, tensor_bytes(tensors)[0])
    return History(Base("", "b" * 64, "float32", {"layers": [1]}, 0)).with_epoch(epoch, tensors)


def add(history, number=1, text="Rome"):
    """`number` more batches of two columns each."""
    for _ in range(number):
        id_, column = len(history.batches) + 1, len(history.columns) + 1
        tensors = {"z": torch.full((2, 3), float(id_))}
        made = []
        for row in range(2):
            fact = Fact(id=f"{id_}-{row}", subject="Velm", prompt=f"{{}} {id_} {row}", target=text)
            made.append(Column(column + row, id_, row, column + row, fact, ValueOutcome(0.5)))
        history = history.after("edit", made, digest=tensor_bytes(tensors)[0], tensors=tensors)
        events = (*history.events[:-1], replace(history.events[-1], time="now"))
        history = replace(history, events=events)
    return history


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "ledger")
    made.create(begun())
    return made


def same(a, b):
    lists = ("base", "epochs", "batches", "columns", "events")
    return all(getattr(a, name) == getattr(b, name) for name in lists)


def leftovers(folder):
    return [p for p in folder.rglob("*") if p.name.endswith((".part", "-journal", "-wal", "-shm"))]


def test_what_was_committed_is_what_is_read(store):
    history = begun()
    for batches in (1, 3, 2):  # several at once, too
        before = history.counts
        history = add(history, batches)
        store.commit(history, before)
        found = store.load()
        assert same(found, history)
        assert {d: t.keys() for d, t in found.tensors.items()} == {
            d: t.keys() for d, t in history.tensors.items()
        }
    assert (
        store.listing.read_text() == hashlib.sha256(store.database.read_bytes()).hexdigest() + "\n"
    )
    assert not leftovers(store.folder)


def test_every_byte_of_the_database_counts(store):
    history = begun()
    history = add(history, 2)
    store.commit(history, begun().counts)
    for file in (store.database, store.listing):
        raw = file.read_bytes()
        for place in (0, len(raw) - 1, *random.Random(1).sample(range(len(raw)), 20)):
            file.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            with pytest.raises(LedgerError, match=r"ledger\.db"):
                store.load()
            with pytest.raises(LedgerError, match=r"ledger\.db"):  # and nobody adds to it
                store.commit(add(history), history.counts)
        for other in (b"", raw[:-1], raw + b"\0", raw * 2):
            file.write_bytes(other)
            with pytest.raises(LedgerError, match=r"ledger\.db"):
                store.load()
        file.write_bytes(raw)
    assert same(store.load(), history)
    store.listing.unlink()
    with pytest.raises(LedgerError, match=r"ledger\.db\.sha256: missing"):
        store.load()


def test_a_damaged_tensor_is_found_before_it_is_read(store, monkeypatch):
    history = add(begun())
    store.commit(history, begun().counts)
    file = store.tensor_file(history.batches[0].tensors)
    raw = file.read_bytes()

    def never(self):
        raise AssertionError("read into memory")

    monkeypatch.setattr(Path, "read_bytes", never)
    monkeypatch.setattr("safetensors.torch.load", never)
    epoch = store.tensor_file(history.epochs[0].tensors)
    epoch.unlink()
    with pytest.raises(LedgerError, match="missing"):
        store.load()
    monkeypatch.undo()
    epoch.write_bytes(tensor_bytes({"base.1": torch.eye(3)})[1])
    monkeypatch.setattr(Path, "read_bytes", lambda self: never(self) if self == file else None)
    monkeypatch.setattr("safetensors.torch.load", lambda raw: {})
    for other in (raw[:-1], raw + b"\0" * (1 << 22), b"", raw[:9] + b"x" + raw[10:]):
        with file.open("wb") as opened:
            opened.write(other)
        with pytest.raises(LedgerError, match=f"{file.name}: damaged"):
            store.load()


def test_a_name_that_is_no_hash_never_becomes_a_path(store, tmp_path):
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    tampered(store, "UPDATE epochs SET tensors = '../../outside'")
    with pytest.raises(LedgerError, match="no hash"):
        store.load()


def tampered(store, *statements):
    """The database changed by another program that knows of the hash."""
    with closing(sqlite3.connect(store.database)) as db, db:
        for statement in statements:
            db.execute(statement)
    relist(store)


def relist(store):
    store.listing.write_text(hashlib.sha256(store.database.read_bytes()).hexdigest() + "\n")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE meta SET value = '[' WHERE name = 'base'",
        "UPDATE meta SET value = '[1, 2]' WHERE name = 'base'",
        "UPDATE meta SET value = '{\"model\": 1}' WHERE name = 'base'",
        "UPDATE meta SET value = 'x' WHERE name = 'schema_version'",
        "UPDATE meta SET value = '99' WHERE name = 'schema_version'",
        "DELETE FROM meta",
        "DROP TABLE events",
        "ALTER TABLE batches ADD COLUMN more TEXT",
        "UPDATE columns SET fact = '[]'",
        "UPDATE columns SET fact = '{\"subject\": 3}'",
        f"UPDATE columns SET fact = '{'[' * 100_000}'",
        "UPDATE columns SET fact = CAST(x'ff' AS TEXT)",
        "UPDATE epochs SET contexts = '3'",
    ],
)
def test_a_database_of_another_making_is_refused_in_one_line(store, statement):
    store.commit(add(begun()), begun().counts)
    tampered(store, statement)
    with pytest.raises(LedgerError):
        store.load()


def test_a_broken_database_with_a_right_hash_is_refused_or_read(store):
    """Whatever the bytes are: an error of ours, or a history, and nothing is written."""
    store.commit(add(begun(), 2), begun().counts)
    raw, chance = store.database.read_bytes(), random.Random(2)
    refused = 0
    for _ in range(60):
        broken = bytearray(raw)
        for _ in range(chance.choice([1, 5, 40])):
            broken[chance.randrange(len(raw))] = chance.randrange(256)
        store.database.write_bytes(broken)
        relist(store)
        try:
            store.read()
        except LedgerError:
            refused += 1
        assert store.database.read_bytes() == broken
    assert refused > 5


def test_a_database_too_large_is_not_read(store, monkeypatch):
    monkeypatch.setattr(store_module, "LARGEST_DATABASE", store.database.stat().st_size - 1)
    with pytest.raises(LedgerError, match="more than"):
        store.load()


def test_a_hot_journal_beside_the_database_is_not_played_back(store, tmp_path):
    """SQLite would roll back what a journal tells; this one's transaction never was ours."""
    history = add(begun())
    store.commit(history, begun().counts)
    journal = store.folder / "ledger.db-journal"
    with closing(sqlite3.connect(store.database, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN")
        db.execute("UPDATE columns SET active = 0")
        db.execute("UPDATE events SET activated = '[]'")
        db.execute("PRAGMA cache_spill = 1")
        copy = journal.read_bytes()
        db.execute("COMMIT")
    relist(store)
    journal.write_bytes(copy)
    shutil.copytree(store.folder, tmp_path / "copy")
    with closing(sqlite3.connect(tmp_path / "copy" / "ledger.db")) as db:
        assert db.execute("SELECT SUM(active) FROM columns").fetchone() == (2,), "it would be"
    assert store.load().active == []
    before = history.counts
    store.commit(add(history), before)
    assert not leftovers(store.folder)


def test_what_is_active_is_carried_along_as_the_events_leave_it():
    """Histories are made of each other without folding all events again."""
    history, rng = begun(), random.Random(0)
    for number in range(60):
        if number % 3 or not history.active:
            history = add(history)
        else:
            off = rng.sample(history.active, rng.randint(1, len(history.active)))
            out = [c for c in history.columns if not history.is_active(c)]
            on = rng.sample(out, rng.randint(0, len(out)))
            history = history.after("undo", on=on, off=off)
        folded = replace(history)  # nothing is carried into a copy
        assert "active_ids" not in vars(folded)
        assert history.active_ids == folded.active_ids
        assert history.active == history.active_as_of(len(history.events))
    joined = history.as_one_event("merge", begun())
    assert joined.active_ids == replace(joined).active_ids == history.active_ids


# -- one writer --------------------------------------------------------------------------------


def child(work):
    """Run `work` in another process; its number. It ends with 0 unless `work` raised."""
    number = os.fork()
    if number:
        return number
    try:
        work()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(1)


def wait_for(file, other):
    while not file.exists():
        assert os.waitpid(other, os.WNOHANG) == (0, 0), "the other process did not come so far"
        time.sleep(0.005)


def test_two_processes_take_turns(store, tmp_path, monkeypatch):
    def hold():
        with Store(store.folder).writing():
            (tmp_path / "holding").touch()
            signal.pause()

    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    other = child(hold)
    wait_for(tmp_path / "holding", other)
    history = add(begun())
    before = store.database.read_bytes()
    expected = rf"another process \(pid {other}\) is writing to this ledger; wait for it, nothing"
    with pytest.raises(LedgerError, match=expected):
        store.commit(history, begun().counts)
    with pytest.raises(LedgerError, match=expected), store.writing():
        pass
    assert store.database.read_bytes() == before
    assert same(store.load(), begun()), "reading needs no lock"
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    store.commit(history, begun().counts)  # the lock ended with its process
    assert same(store.load(), history)


def test_the_lock_may_be_entered_again_but_not_by_another_thread(store, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.05)
    said = []

    def other():
        for one in (store, Store(store.folder)):
            try:
                with one.writing():
                    said.append("in")
            except LedgerError as error:
                said.append(str(error))

    with store.writing(), store.writing():
        store.commit(add(begun()), begun().counts)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert all("another editor of this process is writing" in line for line in said)
    assert len(said) == 2
    with Store(store.folder).writing(events=1):
        pass
    with (
        pytest.raises(LedgerError, match=r"1 events, expected 5"),
        store.writing(events=5),
    ):
        pass
    with store.writing(events=1):  # the refusal let go of it
        pass


def test_a_second_writer_that_comes_later_is_told_of_the_first(store):
    history = add(begun())
    Store(store.folder).commit(history, begun().counts)
    before = store.database.read_bytes()
    with pytest.raises(LedgerError, match=r"1 events, expected 0\); nothing was changed"):
        store.commit(add(begun(), 2), begun().counts)
    assert store.database.read_bytes() == before
    with pytest.raises(LedgerError, match="holds a ledger already"):
        store.create(begun())


def test_readers_see_whole_ledgers_while_another_process_writes(store, tmp_path):
    def write():
        writer, history = Store(store.folder), begun()
        while not (tmp_path / "stop").exists():
            before, history = history.counts, add(history)
            writer.commit(history, before)

    other = child(write)
    try:
        seen = []
        while len(seen) < 50 or seen[-1] - seen[0] <= 3:
            assert os.waitpid(other, os.WNOHANG) == (0, 0), "the other writes meanwhile"
            history = store.load()
            seen.append(len(history.events))
            assert same(history, add(begun(), len(history.events)))
        assert seen == sorted(seen)
    finally:
        (tmp_path / "stop").touch()
        _, status = os.waitpid(other, 0)
    assert status == 0


def test_a_reader_slower_than_every_commit_still_reads(store, monkeypatch):
    history, digest_of, committing = begun(), hashlib.file_digest, False

    def while_another_commits(file, name):
        nonlocal history, committing
        if not committing:  # a commit takes hashes, too
            committing = True
            before, history = history.counts, add(history)
            Store(store.folder).commit(history, before)
            committing = False
        return digest_of(file, name)

    monkeypatch.setattr("nulledit.ledger.store.hashlib.file_digest", while_another_commits)
    for events in range(5):
        assert same(store.read(), add(begun(), events))
        assert len(history.events) == events + 1


def test_discard_removes_only_what_holds_no_batch(store, tmp_path):
    Store(tmp_path / "nothing").discard()
    history = add(begun())
    store.commit(history, begun().counts)
    with pytest.raises(LedgerError, match="finished batches"):
        store.discard()
    assert same(store.load(), history)
    fresh = Store(tmp_path / "fresh")
    fresh.create(begun())
    fresh.discard()
    assert not fresh.folder.exists()
    with pytest.raises(LedgerError, match="no ledger here"):
        fresh.commit(history, begun().counts)
    assert not fresh.folder.exists()


# -- what killed writers leave -----------------------------------------------------------------


def test_files_of_killed_writers_go_at_the_next_commit(store):
    """And what others put there stays."""
    history = add(begun())
    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    digest, raw = tensor_bytes(TENSORS)
    left = [
        store.tensor_file(digest),
        store.tensors / f".{digest}.safetensors.{gone}.part",
        store.tensors / f".{digest}.safetensors.{os.getpid()}.part",
        store.folder / f".ledger.db.{gone}.part",
        store.folder / f".ledger.db.{gone}.part-journal",
        store.folder / f".ledger.db.sha256.{gone}.part",
        store.folder / "ledger.db-wal",
    ]
    for file in left:
        file.write_bytes(raw)
    notes = store.tensors / "notes.txt"
    notes.write_text("mine")
    other = store.tensors / "mine.safetensors"
    other.write_bytes(raw)
    store.commit(history, begun().counts)
    assert [file for file in left if file.exists()] == []
    assert notes.exists()
    assert other.exists()
    assert same(store.load(), history)


def test_a_commit_killed_just_before_or_after_its_rename_reads(store):
    history = add(begun())
    old = store.listing.read_text()
    database = store.database.read_bytes()
    store.commit(history, begun().counts)
    new = store.listing.read_text()
    store.listing.write_text(old + new)  # killed between the two
    assert same(store.load(), history)
    store.settle()
    assert store.listing.read_text() == new
    store.listing.write_text(old + new)
    store.database.write_bytes(database)
    assert same(store.load(), begun())
    store.commit(history, begun().counts)
    assert store.listing.read_text() == new
    assert same(store.load(), history)


def test_a_tensor_file_that_was_damaged_is_written_again(store):
    history = add(begun())
    file = store.tensor_file(history.batches[0].tensors)
    file.write_bytes(b"half")  # under the right name already, as by a disk that lost its end
    store.commit(history, begun().counts)
    assert same(store.load(), history)


# -- folders -----------------------------------------------------------------------------------


def made(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a").write_text(text)
    return folder


@pytest.mark.parametrize("stop", range(1, 4))
@pytest.mark.parametrize("how", ["killed", "refused"])
def test_a_folder_is_never_lost(tmp_path, monkeypatch, stop, how):
    """Killed or refused at the first, the second, or just after the last rename."""
    folder = made(tmp_path / "model", "old")

    def replace(work):
        real, renames = os.replace, []

        def counted(source, target):
            renames.append(1)
            if len(renames) == stop:
                work()
            real(source, target)

        monkeypatch.setattr(os, "replace", counted)
        with replacing_folder(folder) as partial:
            (partial / "a").write_text("new")
            (partial / "b").write_text("new")
        if stop == 3:
            work()

    def fail():
        raise OSError(28, "No space left on device")

    if how == "killed":
        other = child(lambda: replace(lambda: os.kill(os.getpid(), signal.SIGKILL)))
        _, status = os.waitpid(other, 0)
        assert os.WIFSIGNALED(status)
        gone = not folder.exists()
        assert gone == (stop == 2)
        assert recover_folder(folder) == gone
        new = stop > 1
    else:
        with pytest.raises(OSError, match="No space"):
            replace(fail)
        monkeypatch.undo()
        new = stop > 2
    assert (folder / "a").read_text() == ("new" if new else "old")
    assert {p.name for p in folder.iterdir()} == ({"a", "b"} if new else {"a"})
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_process_of_the_same_number_left_goes(tmp_path):
    """Numbers come again, in a container above all."""
    left = tmp_path / f".model.{os.getpid()}.part"
    made(left / "new", "older")
    with replacing_folder(tmp_path / "model") as partial:
        assert list(partial.iterdir()) == []
        (partial / "a").write_text("new")
    (tmp_path / f".x.{os.getpid()}.part").write_text("longer than what follows")
    with replacing(tmp_path / "x") as partial:
        assert partial.read_text() == ""
    (tmp_path / f".y.{os.getpid()}.part").touch()
    (tmp_path / ".z.1.part").touch()  # that one runs
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"model", "x", ".z.1.part"}
    shutil.rmtree(tmp_path / "model")


def test_the_state_of_a_folder_has_one_form(tmp_path):
    state = FolderState("", "b" * 64, {"a": ("1" * 64, "2" * 64), "é/ü.json": ("3" * 64,)})
    text = state.to_text()
    assert FolderState.from_text(text) == state
    raw = text.encode()
    for place in range(len(raw)):
        (tmp_path / "nulledit.json").write_bytes(
            raw[:place] + bytes([raw[place] ^ 2]) + raw[place + 1 :]
        )
        with pytest.raises(LedgerError, match=r"nulledit\.json: damaged"):
            read_state(tmp_path)
    for other in ("", "[]", "null", "[" * 100_000, text + " ", text[:-1], '{"files": 3}'):
        (tmp_path / "nulledit.json").write_text(other)
        with pytest.raises(LedgerError, match=r"nulledit\.json: damaged"):
            read_state(tmp_path)
    for name in ("/etc/passwd", "../x", "a/../../x", "a\\b"):
        outside = FolderState("", "b" * 64, {name: ("1" * 64,)})
        (tmp_path / "nulledit.json").write_text(outside.to_text())
        with pytest.raises(LedgerError, match="outside its folder"):
            read_state(tmp_path)
    (tmp_path / "nulledit.json").unlink()
    assert read_state(tmp_path) is None
