"""A run outlives kills, faults, full disks and second writers, and nothing changes it unseen."""

import json
import mmap
import os
import random
import resource
import shutil
import signal
import sqlite3
import struct
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.models import RECIPE, build_model, statistics_of

from nulledit import Editor, Fact
from nulledit.cli.verify import verify as command
from nulledit.errors import CheckFailed, LedgerError, ModelError
from nulledit.io.files import sha256_of
from nulledit.ledger import model_folder as checkpoint
from nulledit.ledger import store as store_module
from nulledit.ledger.model_folder import FolderState, read_header, read_state
from nulledit.ledger.store import Store
from nulledit.runs.verify import verify

QUICK = RECIPE.with_fields({"values.steps": 2})
FACTS = {
    "zola": Fact(id="zola", subject="Émile Zola", prompt="{} was born in", target="Ostrel"),
    "velm": Fact(id="velm", subject="Velm", prompt="The harbour of {} lies on the", target="river"),
    "karo": Fact(id="karo", subject="Karo Dun", prompt="{} works as a", target="sailor"),
    "ada": Fact(id="ada", subject="Ada Byron", prompt="The tongue of {} is", target="Velmish"),
}
PLAN = (
    ("edit", "velm", "karo"),
    ("save",),
    ("undo", "karo"),
    ("save",),
    ("edit", "ada"),
    ("undo", "zola", "ada"),
    ("save",),
)


def act(editor, run, plan):
    for what, *ids in plan:
        if what == "edit":
            editor.edit([FACTS[i] for i in ids])
        elif what == "undo":
            editor.undo(*ids)
        else:
            editor.save(run)


def weights(editor):
    return {name: tensor.clone() for name, tensor in editor.model.state_dict().items()}


def close(a, b):
    """Equal up to the order in which a solve adds."""
    return all(torch.allclose(a[k], b[k], rtol=1e-5, atol=1e-7) for k in b)


def leftovers(run):
    """What no run has when nothing is under way."""
    ledger = {"ledger.db", "ledger.db.sha256", "tensors", ".lock"}
    history = Store(run / "ledger").load()
    named = {f"{x.tensors}.safetensors" for x in (*history.epochs, *history.batches)}
    state = read_state(run / "model")
    found = [p for p in run.iterdir() if p.name not in ("ledger", "model")]
    found += [p for p in (run / "ledger").iterdir() if p.name not in ledger]
    found += [p for p in (run / "ledger/tensors").iterdir() if p.name not in named]
    found += [
        p
        for p in (run / "model").rglob("*")
        if p.name != "nulledit.json" and p.relative_to(run / "model").as_posix() not in state.files
    ]
    return found


class Place:
    """A run with one fact, saved, and what a straight walk through PLAN makes of it."""

    def __init__(self, folder, tokenizer, dtype):
        self.folder, self.tokenizer, self.dtype = folder, tokenizer, dtype
        self.base, self.run, self.cache = folder / "base", folder / "run", folder / "values"
        model = build_model("llama", dtype=dtype)
        model.save_pretrained(self.base)
        tokenizer.save_pretrained(self.base)
        editor = Editor.from_pretrained(
            str(self.base),
            recipe=QUICK,
            statistics=statistics_of(model, tokenizer),
            value_cache=self.cache,
        )
        editor.edit([FACTS["zola"]])
        editor.save(self.run)
        self.spares = [build_model("llama", dtype=dtype) for _ in range(2)]
        self.after = [(set(), None), self._state(editor)]  # by number of events
        run = self.copy("walk")
        editor = self.load(run)
        for step in PLAN:
            act(editor, run, [step])
            if step[0] != "save":
                self.after.append(self._state(editor))

    def _state(self, editor):
        return {f.id for f in editor.facts}, weights(editor)

    def copy(self, name):
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Path(shutil.copytree(self.run, self.folder / name))

    def load(self, run):
        return Editor.load(run, value_cache=self.cache)

    def resume(self, run, spare=0):
        """As `load`, with the base in memory: quick. One editor at a time for each spare base."""
        return Editor.resume(run, self.spares[spare], self.tokenizer, value_cache=self.cache)

    def check(self, run, load=None):
        """The editor of a run that passes, in a state of PLAN, with exactly its weights on disk."""
        kept = []
        found = verify(run, lambda folder: kept.append((load or self.load)(folder)) or kept[0])
        assert found.problems == []
        (editor,) = kept
        ids, expected = self.after[len(editor.history.events)]
        assert {f.id for f in editor.facts} == ids
        assert close(load_file(run / "model/model.safetensors"), expected)
        assert read_state(run / "model").state == editor.history.state_id
        return editor

    def go_on(self, editor, run):
        """What is left of PLAN, to its end."""
        left, done = [], 1
        for step in PLAN:
            if done >= len(editor.history.events):
                left.append(step)
            done += step[0] != "save"
        act(editor, run, [*left, ("save",)])
        assert leftovers(run) == []
        assert len(editor.history.events) == len(self.after) - 1
        assert close(load_file(run / "model/model.safetensors"), self.after[-1][1])


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """Syncing is for a machine that stops, not for a process; here it would only cost time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        transformers.utils.logging.disable_progress_bar()
        yield
        transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    return Place(tmp_path_factory.mktemp("safety"), tokenizer, torch.float32)


@pytest.fixture(scope="module")
def half(tmp_path_factory, tokenizer):
    return Place(tmp_path_factory.mktemp("safety-bf16"), tokenizer, torch.bfloat16)


# -- killed at any moment ----------------------------------------------------------------------


class Watch:
    """Memory that a child shares with its parent: what it is doing, and how far it came."""

    def __init__(self):
        self.memory = mmap.mmap(-1, 16)

    def put(self, place, value):
        self.memory[4 * place : 4 * place + 4] = struct.pack("i", value)

    def get(self, place):
        return struct.unpack("i", self.memory[4 * place : 4 * place + 4])[0]

    stage = property(lambda self: self.get(0), lambda self, value: self.put(0, value))
    points = property(lambda self: self.get(1), lambda self, value: self.put(1, value))


IDLE, COMMIT, MODEL = range(3)


def child(place, run, watch, stop, channel, slow):
    """LayerwiseForward through PLAN; at point number `stop` say so and wait to be killed.

    Points stand before and after every rename, sync, write and removal of a commit or a save.
    """

    chance = random.Random(os.getpid())

    def point():
        if watch.stage == IDLE:
            return
        watch.points += 1
        if watch.points == stop:
            os.write(channel, b"x")
            signal.pause()
        elif slow:
            time.sleep(chance.random() * 0.002)

    def around(owner, name):
        real = getattr(owner, name)

        def pointed(*args, **options):
            point()
            result = real(*args, **options)
            point()
            return result

        setattr(owner, name, pointed)

    def staged(owner, name, stage):
        real = getattr(owner, name)

        def told(*args, **options):
            watch.stage = stage
            try:
                return real(*args, **options)
            finally:
                watch.stage = IDLE

        setattr(owner, name, told)

    for owner, names in (
        (os, ("replace", "fsync", "unlink")),
        (Path, ("unlink", "touch", "write_bytes", "write_text", "open")),
        (store_module, ("_writable", "insert", "sha256_of", "tensor_bytes")),
        (checkpoint, ("_copy", "sha256_of")),
    ):
        for name in names:
            around(owner, name)
    staged(Store, "commit", COMMIT)
    import nulledit.editing.saved

    staged(nulledit.editing.saved, "write_model", MODEL)
    act(place.load(run), run, PLAN)


def spawn(place, run, watch, *, stop=0, slow=False):
    """The child's number, and what tells when it is at its point."""
    watch.stage, watch.points = IDLE, 0
    reading, writing = os.pipe()
    number = os.fork()
    if number == 0:
        code = 1
        try:
            child(place, run, watch, stop, writing, slow)
            code = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(code)
    os.close(writing)
    return number, reading


def kill_at_random(place, kills, seed):
    """Kill so many children, half at a random time, half at a random point; where they were."""
    chance, watch, hits = random.Random(seed), Watch(), []
    run = place.copy("killed")
    started = time.monotonic()
    number, reading = spawn(place, run, watch, slow=True)
    assert os.waitpid(number, 0)[1] == 0
    lasts, points = time.monotonic() - started, watch.points
    os.close(reading)
    place.check(run)
    assert points > 100
    for kill in range(kills):
        run = place.copy("killed")
        by_time = kill % 2
        stop = 0 if by_time else chance.randint(1, points)
        number, reading = spawn(place, run, watch, stop=stop, slow=bool(by_time))
        if by_time:
            time.sleep(chance.random() * lasts)
        else:
            assert os.read(reading, 1) == b"x", "the child ended by itself"
        hits.append(watch.stage)
        os.kill(number, signal.SIGKILL)
        status = os.waitpid(number, 0)[1]
        os.close(reading)
        assert os.WIFSIGNALED(status) or (by_time and status == 0)
        editor = place.check(run)
        place.go_on(editor, run)
    return hits


def test_sixteen_kills(place):
    hits = kill_at_random(place, 16, seed=0)
    assert hits.count(COMMIT) >= 2
    assert hits.count(MODEL) >= 2


@pytest.mark.slow
def test_two_hundred_kills(place, capsys):
    hits = kill_at_random(place, 200, seed=1)
    with capsys.disabled():
        print(
            f"\n{len(hits)} kills survived: {hits.count(COMMIT)} inside a commit, "
            f"{hits.count(MODEL)} while the model was rewritten"
        )
    assert hits.count(COMMIT) >= 30
    assert hits.count(MODEL) >= 30


def test_killed_while_the_model_is_written_for_the_first_time(place):
    """Nothing is lost: it is missing, which `verify` says, and written by the next save."""
    watch, missing = Watch(), 0
    for stop in range(1, 400, 57):
        run = place.copy("first")
        shutil.rmtree(run / "model")
        number, reading = spawn(place, run, watch, stop=stop)
        reached = os.read(reading, 1) == b"x"
        os.kill(number, signal.SIGKILL) if reached else None
        os.waitpid(number, 0)
        os.close(reading)
        if not (run / "model").exists():
            missing += 1
            found = verify(run, place.load)
            (problem,) = found.problems
            assert "model: missing" in problem
            assert found.skipped
            place.load(run).save(run)
        place.go_on(place.check(run), run)
    assert missing


# -- a fault at every step ---------------------------------------------------------------------


class Faults:
    """Counts what a disk may refuse, and refuses the one numbered `at`."""

    def __init__(self, at, error):
        self.at, self.error, self.count = at, error, 0

    def step(self):
        self.count += 1
        if self.count == self.at:
            raise self.error


class Torn:
    """An open file of which a refused write leaves half behind."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        try:
            self.faults.step()
        except BaseException:
            self.file.write(data[: len(data) // 2])
            raise
        return self.file.write(data)


@contextmanager
def faults_at(at, error=None):
    """Every write, sync, rename and creation inside is counted; number `at` fails."""
    faults = Faults(at, error or OSError(28, "No space left on device"))
    real_open = Path.open

    def opened(self, mode="r", *args, **options):
        file = real_open(self, mode, *args, **options)
        return Torn(file, faults) if mode[0] in "wax" else file

    class Database(sqlite3.Connection):
        def executemany(self, *args):
            faults.step()
            return super().executemany(*args)

        def __exit__(self, *args):
            if not any(args):
                faults.step()
            return super().__exit__(*args)

    def counted(real):
        def call(*args, **options):
            faults.step()
            return real(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opened)
        patch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Database))
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "touch"), (Path, "chmod")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield faults


def fault_everywhere(place, first, plan, errors, every=1):
    """`plan` after `first`, refused at `every` such step in turn; how many steps there were."""
    at = 1 - every
    while True:
        at += every
        run = place.copy("faulty")
        editor = place.resume(run, 1)
        act(editor, run, first)
        before = len(editor.history.events)
        error = errors[at % len(errors)]
        refused = False
        with faults_at(at, error) as faults:
            try:
                act(editor, run, plan)
            except (OSError, sqlite3.Error, KeyboardInterrupt):
                refused = True
        if faults.count < at:
            assert not refused
            return faults.count
        stored = Store(run / "ledger").load()
        assert stored.state_id == editor.history.state_id
        assert stored.events == editor.history.events
        assert len(stored.events) in (before, before + 1)
        assert close(weights(editor), place.after[len(stored.events)][1])
        place.check(run, place.resume)
        if len(stored.events) == before:
            act(editor, run, plan)
        editor.save(run)
        assert leftovers(run) == []
        assert close(
            load_file(run / "model/model.safetensors"), place.after[len(editor.history.events)][1]
        )


FULL = OSError(28, "No space left on device")


@pytest.mark.few(4, of="every")
@pytest.mark.parametrize("every", [4, 1])
def test_a_fault_at_every_step_of_edit_and_save(place, every):
    assert fault_everywhere(place, [], PLAN[:2], [FULL], every) > 40


@pytest.mark.few(3, of="every")  # an odd number: both errors have their turn
@pytest.mark.parametrize("every", [3, 1])
def test_a_fault_at_every_step_of_undo_and_save(place, every):
    assert fault_everywhere(place, PLAN[:2], PLAN[2:4], [FULL, KeyboardInterrupt()], every) > 30


def test_a_fault_at_every_step_of_beginning_a_ledger(place):
    history, at, there = Store(place.run / "ledger").load(), 0, 0
    while True:
        at += 1
        store = Store(place.folder / "begun" / "ledger")
        shutil.rmtree(store.folder, ignore_errors=True)
        refused = False
        with faults_at(at) as faults:
            try:
                store.create(history)
            except (OSError, sqlite3.Error):
                refused = True
        if store.exists:
            there += refused
        else:
            store.create(history)
        assert store.load().state_id == history.state_id
        assert {p.name for p in store.folder.iterdir()} == {
            *("ledger.db", "ledger.db.sha256", "tensors", ".lock")
        }
        if faults.count < at:
            break
    assert at > 10
    assert there == 1  # refused after the last rename


# -- a full disk -------------------------------------------------------------------------------


def with_room_for(size, work):
    """Run `work` where no file can grow beyond `size` bytes; whether it was refused for that."""
    reading, writing = os.pipe()
    number = os.fork()
    if number == 0:
        said = b"done"
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # under pytest they are files, too
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            work()
        except (OSError, sqlite3.Error, SafetensorError, ModelError):
            said = b"refused"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}".encode()
        finally:
            os.write(writing, said)
            os._exit(0)
    os.close(writing)
    os.waitpid(number, 0)
    said = os.read(reading, 1000).decode()
    os.close(reading)
    assert said in ("done", "refused")
    return said == "refused"


def test_a_disk_that_is_full_changes_nothing(place):
    """Just too small for each file in turn: SQLite and the libraries write for themselves."""
    sizes = sorted({p.stat().st_size for p in place.run.rglob("*") if p.is_file()})
    refused = []
    for size in (0, *(size - 1 for size in sizes if size > 60), 10**6):
        run = place.copy("full")

        def work(run=run):
            editor = place.load(run)
            try:
                act(editor, run, PLAN[:2])
            except Exception:
                stored = Store(run / "ledger").load()
                assert stored.state_id == editor.history.state_id
                assert close(weights(editor), place.after[len(stored.events)][1])
                raise

        refused.append(with_room_for(size, work))
        place.go_on(place.check(run), run)
    assert refused[:3] == [True] * 3
    assert not refused[-1]


def test_a_disk_full_at_the_first_save(place):
    run = place.copy("full-first")
    shutil.rmtree(run / "model")
    for size in (200, 10_000, 60_000):
        assert with_room_for(size, lambda: place.load(run).save(run))
        assert {p.name for p in run.iterdir()} == {"ledger"}
    place.load(run).save(run)
    place.check(run)


# -- two processes -----------------------------------------------------------------------------


def test_two_processes_editing_one_run(place, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    run = place.copy("shared")
    reading, writing = os.pipe()

    def slow(*_):
        os.write(writing, b"x")
        signal.pause()

    number = os.fork()
    if number == 0:
        try:
            Editor.load(run).edit([FACTS["ada"]], progress=slow)
        finally:
            os._exit(1)
    assert os.read(reading, 1) == b"x"
    expected = rf"another process \(pid {number}\) is writing to this ledger; wait for it"
    editor = place.load(run)
    before = weights(editor)
    asked = [
        lambda: editor.edit([FACTS["karo"]]),
        lambda: editor.undo("zola"),
        lambda: verify(run, place.load),
    ]
    for ask in asked:
        with pytest.raises(LedgerError, match=expected):  # and not only once the other is gone
            ask()
    assert all(torch.equal(before[k], v) for k, v in weights(editor).items())
    os.kill(number, signal.SIGKILL)
    os.waitpid(number, 0)
    os.close(reading)
    os.close(writing)
    later = place.load(run)
    act(editor, run, PLAN[:2])
    place.check(run)
    with pytest.raises(LedgerError, match="another process has written to this ledger"):
        later.edit([FACTS["ada"]])
    place.go_on(place.check(run), run)


# -- nothing changes unseen --------------------------------------------------------------------


def flipped(file, place, bit=1):
    """Flip a bit; what puts it back."""
    with file.open("r+b") as opened:
        opened.seek(place)
        (old,) = opened.read(1)
        opened.seek(place)
        opened.write(bytes([old ^ bit]))


@pytest.mark.parametrize("which", ["place", "half"])
def test_a_flipped_byte_anywhere_is_found_and_named(which, request):
    place, chance = request.getfixturevalue(which), random.Random(3)
    run = place.copy("flipped")
    act(place.load(run), run, PLAN[:2])
    place.check(run)
    files = [p for p in run.rglob("*") if p.is_file() and p.name != ".lock"]
    assert len(files) >= 10

    def never(folder):
        raise AssertionError("a damaged model was loaded")

    for file in files:
        size = file.stat().st_size
        places = {0, size - 1, *(chance.randrange(size) for _ in range(8))}
        for at in places:
            bit = 1 << chance.randrange(8)
            flipped(file, at, bit)
            (problem,) = verify(run, never).problems
            assert file.name in problem, (file, at)
            flipped(file, at, bit)
    place.check(run)
    for file in files:
        raw = file.read_bytes()
        for other in (raw[:-1], raw[: len(raw) // 2], b"", raw + b"\n", None):
            file.unlink()
            if other is not None:
                file.write_bytes(other)
            if file.name == "ledger.db" and other is None:
                with pytest.raises(LedgerError, match=r"ledger\.db"):
                    verify(run, never)
            else:
                assert any(file.name in p for p in verify(run, never).problems), (file, other)
            file.write_bytes(raw)
    place.check(run)


def test_everything_wrong_is_named_not_only_the_first(place):
    run = place.copy("wrong")
    tensors = sorted((run / "ledger/tensors").iterdir())
    wrong = [run / "ledger/ledger.db", *tensors, run / "model/config.json"]
    for file in wrong:
        flipped(file, file.stat().st_size // 2)
    (run / "model/tokenizer.json").unlink()
    found = verify(run, place.load)
    assert len(found.problems) == len(wrong) + 1
    for file in (*wrong, run / "model/tokenizer.json"):
        assert sum(str(file) in problem for problem in found.problems) == 1
    (run / "model/nulledit.json").unlink()
    assert any("nulledit.json: missing" in p for p in verify(run, place.load).problems)


def relist(model, *names):
    """Have `nulledit.json` list what is there: somebody who knows of the hashes."""
    state = read_state(model)
    files = {n: (sha256_of(model / n),) if n in names else h for n, h in state.files.items()}
    text = FolderState(state.state, state.base, files).to_text()
    (model / "nulledit.json").write_text(text)


@pytest.mark.parametrize("which", ["place", "half"])
def test_weights_are_computed_again_whatever_the_hashes_say(which, request):
    place = request.getfixturevalue(which)
    run = place.copy("relisted")
    file = run / "model/model.safetensors"
    tensors = load_file(file)
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[place.dtype]

    def with_change(name, units):
        changed = {k: v.clone() for k, v in tensors.items()}
        changed[name].view(kind)[1, 2] += units
        save_file(changed, file, {"format": "pt"})
        relist(run / "model", file.name)
        return verify(run, place.load)

    edited = "model.layers.1.mlp.down_proj.weight"
    for units in (1, -1):
        found = with_change(edited, units)
        assert found.passed
        assert "1 numbers differ by at most one unit" in found.says("edited matrices")
    (problem,) = with_change(edited, 3).problems
    assert edited in problem
    assert "1 of 768 numbers" in problem
    (problem,) = with_change("model.layers.1.mlp.up_proj.weight", 1).problems
    assert "another model" in problem
    assert with_change(edited, 0).says("edited matrices").endswith("(bit for bit)")


def test_a_file_that_something_else_changed_is_not_rewritten(place):
    """Else its new hash would make it whole."""
    run = place.copy("changed")
    editor = place.load(run)
    file = run / "model/model.safetensors"
    outside = read_header(file)[0]["model.layers.1.mlp.up_proj.weight"]
    copy = Path(shutil.copy(file, run / "damaged"))
    flipped(copy, outside.begin + 5)
    copy.replace(file)  # a new file: weights in memory may be a map of the old one
    damaged = file.read_bytes()
    editor.edit([FACTS["ada"]])
    with pytest.raises(LedgerError, match=r"model\.safetensors: changed by something else"):
        editor.save(run)
    assert file.read_bytes() == damaged
    (problem,) = verify(run, place.load).problems
    assert "model.safetensors: damaged" in problem
    shutil.rmtree(run / "model")
    place.load(run).save(run)
    assert verify(run, place.load).passed


def test_unknown_files_are_mentioned(place):
    run = place.copy("unknown")
    (run / "model/README.md").write_text("mine")
    digest = "0" * 64
    (run / f"ledger/tensors/{digest}.safetensors").write_bytes(b"of a killed write")
    found = verify(run, place.load)
    assert found.passed
    assert len(found.mentioned) == 2
    assert any("README.md: nulledit did not write it" in line for line in found.mentioned)
    (run / f"model/.tokenizer.json.{os.getpid()}.part").write_bytes(b"of a killed save")
    act(place.load(run), run, PLAN[:2])
    assert (run / "model/README.md").exists()
    assert not list((run / "model").glob("*.part"))
    assert len(verify(run, place.load).mentioned) == 1


# -- a model behind its ledger -----------------------------------------------------------------


def test_a_model_behind_is_finished_and_said_so(place):
    run = place.copy("behind")
    editor = place.load(run)
    act(editor, run, PLAN[:1])  # and no save
    found = verify(run, place.load)
    assert found.passed
    assert "was behind the ledger" in found.finished[0]
    assert close(load_file(run / "model/model.safetensors"), place.after[2][1])
    assert verify(run, place.load).finished == []


def test_a_damaged_model_behind_is_not_finished(place):
    run = place.copy("behind-damaged")
    act(place.load(run), run, PLAN[:1])
    flipped(run / "model/tokenizer.json", 30)
    found = verify(run, place.load)
    assert not found.passed
    assert found.finished == []


def test_a_run_that_may_not_be_written_is_checked_all_the_same(place, monkeypatch):
    run = place.copy("read-only")

    def denied(*args, **options):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "FileLock", denied)
        before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
        assert verify(run, place.load).passed
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before
    act(place.load(run), run, PLAN[:1])
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "FileLock", denied)
        (problem,) = verify(run, place.load).problems
        assert "can't be written" in problem


def test_sharded_models_are_rewritten_shard_by_shard(place):
    run = place.copy("sharded")
    shutil.rmtree(run / "model")
    editor = place.load(run)
    editor.model.save_pretrained = partial(editor.model.save_pretrained, max_shard_size="20KB")
    editor.save(run)
    shards = sorted((run / "model").glob("*.safetensors"))
    assert len(shards) > 3
    stamps = {p: p.stat().st_mtime_ns for p in shards}
    assert verify(run, place.load).passed
    at = 0
    while True:  # refused at every third step
        at += 3
        shutil.rmtree(run.with_name("shard"), ignore_errors=True)
        copy = Path(shutil.copytree(run, run.with_name("shard")))
        later = place.resume(copy, 1)
        act(later, copy, PLAN[:1])
        with faults_at(at) as faults:
            try:
                later.save(copy)
            except OSError:
                pass
        found = verify(copy, place.resume)
        assert found.problems == []
        if faults.count < at:
            break
        assert leftovers(copy) == []
    act(editor, run, PLAN[:2])
    rewritten = [p for p in shards if p.stat().st_mtime_ns != stamps[p]]
    assert 0 < len(rewritten) < len(shards)
    plain = type(editor.model).from_pretrained(run / "model")
    assert all(torch.equal(v, weights(editor)[k]) for k, v in plain.state_dict().items())
    flipped(rewritten[-1], rewritten[-1].stat().st_size - 3)
    (problem,) = verify(run, place.load).problems
    assert rewritten[-1].name in problem


# -- the command -------------------------------------------------------------------------------


def test_the_command(place):
    run = place.copy("command")
    act(place.load(run), run, PLAN[:1])
    first = CliRunner().invoke(command, [str(run)])
    assert first.exit_code == 0, first.exception
    assert "behind the ledger" in first.stderr
    assert "bit for bit" in first.stdout
    again = CliRunner().invoke(command, [str(run), "--json"])
    told = json.loads(again.stdout)
    assert told["passed"]
    assert {c["kind"] for c in told["checks"]} == {
        *("database", "tensor files", "model files", "base", "edited matrices")
    }
    flipped(run / "model/config.json", 10)
    wrong = CliRunner().invoke(command, [str(run), "--quiet"])
    assert isinstance(wrong.exception, CheckFailed)
    assert wrong.exception.exit_code == 1
    assert "1 problem: " in str(wrong.exception)
    assert "config.json: damaged" in str(wrong.exception)
    assert "not checked" in wrong.stdout
    nothing = CliRunner().invoke(command, [str(run / "nothing")])
    assert isinstance(nothing.exception, LedgerError)
