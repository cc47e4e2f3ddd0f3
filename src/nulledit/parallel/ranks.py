"""Several processes at one piece of work: ranks, as `torchrun` starts them.

How it is meant:

- Every rank runs the same command on the same model and goes through the same steps. Two things
  are shared out: groups of token windows (their sums are added up), and facts of a batch (their
  values are gathered). All else each rank computes by itself, from numbers that rank 0 gives where
  a threshold decides on them, so that all take the same branches.
- Rank 0 alone writes files, keeps the ledger and prints.
- Before work begins all compare hashes of what they were given (`agree`).
- Nothing waits blindly. Each rank has a thread that beats twice a second in a store and hears the
  others; each wait looks at that. A rank that fails leaves a word with its error; one that is
  killed falls silent. Either way the others end, with one line from the lowest that is left.
- Nothing that ranks tell each other is a pickle: JSON, and tensors as safetensors.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from nulledit.errors import ConfigError, RankError
from nulledit.parallel.accelerators import accelerators
from nulledit.parallel.launch import Launch

BEAT = 0.5  # seconds
QUIET = 5 * BEAT  # silence after which a rank is gone, once something has broken
LOOK = 4 * QUIET  # how long is looked for who is gone
SILENCE = 60.0  # seconds of silence after which a rank is gone, whatever else is seen
JOIN = 300.0  # seconds within which all ranks must have started
INTERRUPTED = 130  # exit code
FAREWELL = 5.0  # seconds that ranks wait for each other's last words
FOREVER = timedelta(days=30)
"""For torch's own timeouts: a rank may well wait an hour for another one's values."""

Message = tuple[Any, dict[str, Tensor]]
"""Something as JSON has it, and tensors by name."""


@dataclass(frozen=True)
class Word:
    """The last that a rank says."""

    code: int
    """What it exits with."""
    line: str
    """Its error, if there is one."""


class Pulse(threading.Thread):
    """Says that this rank is alive, and hears the others; all through a store of its own."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        super().__init__(name="pulse", daemon=True)
        self.store, self.rank = store, rank
        self.others = [r for r in range(size) if r != rank]
        now = time.monotonic()
        self.heard = dict.fromkeys(self.others, now)  # when the last beat came
        self.answered = dict.fromkeys(self.others, 0)  # the last question that each has read
        self.words: dict[int, Word] = {}
        self.hearers: set[int] = set()  # of rank 0's last word, where this is rank 0
        self.unreachable: float | None = None  # since when the store is
        self._last = dict.fromkeys(self.others, b"")
        self._end = threading.Event()

    def run(self) -> None:
        """Beat and listen until `stop`."""
        number = 0
        while not self._end.is_set():
            number += 1
            try:
                asked = self.store.add("questions", 0)
                self.store.set(f"beat/{self.rank}", json.dumps([number, asked]))
                self._listen()
            except RuntimeError:  # of torch.distributed, which has many; it doesn't connect again
                self.unreachable = time.monotonic()
                return
            self._end.wait(BEAT)

    def ask(self) -> int:
        """Ask who is there: the number of a question, which only a rank alive from now on reads."""
        with suppress(RuntimeError):  # of a store that is gone, which `unreachable` tells
            return self.store.add("questions", 1)
        return 0

    def say(self, word: Word) -> None:
        """Leave the last word of this rank."""
        with suppress(RuntimeError):  # nobody there to hear it
            self.store.set(f"word/{self.rank}", json.dumps([word.code, word.line]))

    def hear(self) -> None:
        """Tell rank 0 that this one waits for no word of it any more."""
        with suppress(RuntimeError):
            self.store.set(f"heard/{self.rank}", "")

    def stop(self) -> None:
        """No beat after this."""
        self._end.set()

    def silent(self, seconds: float) -> list[int]:
        """Ranks that said no last word and were not heard for so long."""
        now = time.monotonic()
        return [r for r in self.others if r not in self.words and now - self.heard[r] > seconds]

    def _listen(self) -> None:
        for r in self.others:
            if r not in self.words and self.store.check([f"word/{r}"]):
                code, line = json.loads(self.store.get(f"word/{r}"))
                self.words[r] = Word(code, line)
                if r == 0:
                    self.hear()
            if self.rank == 0 and self.store.check([f"heard/{r}"]):
                self.hearers.add(r)
            if self.store.check([f"beat/{r}"]):
                beat = self.store.get(f"beat/{r}")
                if beat != self._last[r]:
                    self._last[r], self.heard[r] = beat, time.monotonic()
                    self.answered[r] = json.loads(beat)[1]


class Ranks:
    """The processes of one launch. Left to itself, a single one that shares nothing."""

    def __init__(self, launch: Launch | None = None, pulse: Pulse | None = None):
        """Use `join` where there may be others."""
        self.launch = launch or Launch()
        self.rank, self.size = self.launch.rank, self.launch.size
        self.patience = SILENCE
        self.parting = False
        """Whether this rank ends and knows why: a signal to stop tells it nothing new."""
        self._pulse = pulse
        self._lost: RankError | None = None  # what it ends of
        self._direct = False  # whether tensors of an accelerator are summed there

    @classmethod
    def join(cls, launch: Launch, *, device: str | None = None) -> Ranks:
        """Meet the other ranks of `launch`; RankError where they do not come.

        `device`: as `Ranks.device` takes it. Tensors of CUDA devices are then summed by NCCL,
        unless ranks share one; everything else goes through gloo.
        """
        if launch.size == 1:
            return cls()
        wait = timedelta(seconds=JOIN)
        patience = _patience()
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=wait))
            pulse = Pulse(_second(launch, wait), launch.rank, launch.size)
            pulse.start()
            ranks = cls(launch, pulse)
            ranks.patience = patience
            named = ranks.device(device)
            cuda = named is not None and torch.device(named).type == "cuda"
            ranks._direct = cuda and dist.is_nccl_available() and not ranks._sharing()
            if cuda:
                torch.cuda.set_device(torch.device(str(named)))
            backend = "cpu:gloo,cuda:nccl" if ranks._direct else "gloo"
            store.set_timeout(wait)
            with ranks.watched():
                dist.init_process_group(
                    backend, store=store, rank=launch.rank, world_size=launch.size, timeout=FOREVER
                )
        except RuntimeError as error:
            said = " ".join(str(error).split())[:200]
            raise RankError(
                f"rank {launch.rank} of {launch.size} can't meet the others at "
                f"{launch.address}:{launch.port} ({said})"
            ) from error
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def device(self, asked: str | None) -> str | None:
        """The device of this rank: the accelerator of its local number, where there is one.

        `asked`: as --device; ConfigError where all ranks would be on one device by it.
        """
        if self.alone:
            return asked
        found = accelerators()
        if asked in (None, "auto"):
            return None if found is None else f"{found[0]}:{self.launch.local_rank % found[1]}"
        if ":" in asked:
            raise ConfigError(
                f"--device {asked} can't be given to several ranks: each takes the accelerator of "
                "its number; give the kind alone, or cpu"
            )
        if found is not None and asked == found[0]:
            return f"{asked}:{self.launch.local_rank % found[1]}"
        return asked

    # -- telling each other --------------------------------------------------------------------

    def gather(self, note: Any, tensors: Mapping[str, Tensor] | None = None) -> list[Message]:
        """What every rank gave, by rank, on all of them; tensors come back on the CPU."""
        if self.alone:
            return [(note, dict(tensors or {}))]
        mine = _packed(note, tensors or {})
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        self._wait(dist.all_gather(lengths, torch.tensor([len(mine)]), async_op=True))
        room = max(map(int, lengths))
        padded = torch.zeros(room, dtype=torch.uint8)
        padded[: len(mine)] = mine
        found = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.size)]
        self._wait(dist.all_gather(found, padded, async_op=True))
        return [_unpacked(raw[: int(n)]) for raw, n in zip(found, lengths, strict=True)]

    def from_first(self, note: Any, tensors: Mapping[str, Tensor] | None = None) -> Message:
        """What rank 0 gave, on all ranks; what the others give is left aside.

        Tensors come back where they are on rank 0 itself, on the CPU on the others.
        """
        if self.alone:
            return note, dict(tensors or {})
        raw = _packed(note, tensors or {}) if self.first else torch.zeros(0, dtype=torch.uint8)
        length = torch.tensor([len(raw)])
        self._wait(dist.broadcast(length, 0, async_op=True))
        if not self.first:
            raw = torch.zeros(int(length), dtype=torch.uint8)
        self._wait(dist.broadcast(raw, 0, async_op=True))
        return (note, dict(tensors or {})) if self.first else _unpacked(raw)

    def sum_at_first(self, tensor: Tensor) -> None:
        """Add up `tensor` over all ranks in rank 0's; those of the others become zeros."""
        if self.alone:
            return
        here = tensor if self._direct or tensor.device.type == "cpu" else tensor.cpu()
        self._wait(dist.reduce(here, 0, async_op=True))
        if not self.first:
            tensor.zero_()
        elif here is not tensor:
            tensor.copy_(here)

    def agree(self, given: Mapping[str, str]) -> None:
        """RankError unless all ranks were given the same: `given` is hashes or words by what."""
        if self.alone:
            return
        all_given = [note for note, _ in self.gather(dict(given))]
        for rank, theirs in enumerate(all_given):
            for what, value in all_given[0].items():
                if theirs.get(what) != value:
                    raise RankError(
                        f"rank {rank} has another {what} than rank 0 ({str(theirs.get(what))[:16]} "
                        f"and {value[:16]}): start all ranks with the same"
                    )

    def barrier(self) -> None:
        """Wait for all."""
        self.gather(None)

    # -- when one is gone ----------------------------------------------------------------------

    @contextmanager
    def watched(self) -> Iterator[None]:
        """An interruption inside is a RankError if a rank is gone: launchers stop the others."""
        try:
            yield
        except KeyboardInterrupt as error:
            found = self.lost()
            if found is None:
                raise
            raise found from error

    def lost(self) -> RankError | None:
        """Why this rank was interrupted; None where all were."""
        if not self.alone and not self.parting:
            self.parting = True
            self._lost = self._search()
        found = self._lost
        return None if found is None or found.exit_code == INTERRUPTED else found

    def end(self, code: int, line: str = "", *, error: BaseException | None = None) -> Word:
        """Leave: the code to exit with, and the line to say, if this rank is to say one.

        A rank that ends well waits for rank 0's code. An error that all met is said by rank 0, one
        of a single rank by rank 0 too, or by itself where rank 0 does not hear it.
        """
        pulse = self._pulse
        if pulse is None:
            return Word(code, line)
        pulse.say(Word(code, line))
        self.parting = self.parting or self.first or code != 0
        if self.first:  # the store may live here, and the others are to know why it goes
            missing = set(error.missing if isinstance(error, RankError) else ())
            self._until(lambda: {*pulse.others} <= pulse.hearers | missing, FAREWELL)
        elif isinstance(error, RankError):
            pulse.hear()
            speaker = min((r for r in range(self.size) if r not in error.missing), default=0)
            line = line if self.rank == speaker else ""
        elif code:
            heard = self._until(lambda: 0 in pulse.words, FAREWELL)
            line = "" if heard else f"rank {self.rank}: {line}"
        else:
            try:
                with self.watched():
                    self._until(lambda: 0 in pulse.words, None)
            except RankError as gone:
                return self.end(gone.exit_code, str(gone), error=gone)
            code, self.parting = pulse.words[0].code, True
        pulse.stop()
        if code == 0:  # else the process ends at once
            pulse.join(FAREWELL)  # held in the store's C++ as the interpreter goes, it would abort
            dist.destroy_process_group()
        return Word(code, line)

    def _wait(self, work: Any) -> None:
        """Until `work` is done; RankError as soon as that can't be."""
        pause = 0.0002
        while not work.is_completed():
            self._look()
            time.sleep(pause)
            pause = min(0.02, 1.5 * pause)
        try:
            work.wait()
        except RuntimeError as error:
            said = " ".join(str(error).split())[:120]
            broken = f"the connection between the ranks broke ({said})"
            self._part(self._search() or RankError(broken, lost=True), error)

    def _until(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        """Whether `condition` came true within so many seconds; without a limit, RankError."""
        end = None if seconds is None else time.monotonic() + seconds
        while not condition():
            if end is None:
                self._look()
            elif time.monotonic() > end or not (self._pulse and self._pulse.is_alive()):
                return False
            time.sleep(0.05)
        return True

    def _look(self) -> None:
        """RankError if some rank is known to be gone, or to have failed."""
        found = self._known(self.patience)
        if found is not None:
            self._part(found)

    def _part(self, found: RankError, error: BaseException | None = None) -> NoReturn:
        """Raise `found`; a launcher that stops this rank from now on tells nothing new."""
        self._lost, self.parting = found, True
        raise found from error

    def _known(self, silence: float) -> RankError | None:
        pulse = self._pulse
        assert pulse is not None
        for rank, word in sorted(pulse.words.items()):
            if word.code:
                interrupted = word.code == INTERRUPTED
                return RankError(f"rank {rank}: {word.line}", lost=interrupted, code=word.code)
        down, store = pulse.unreachable, self.launch
        if down is not None and time.monotonic() - down > min(silence, 2 * QUIET):
            if store.store_by_launcher:
                return RankError(f"the launcher at {store.address}:{store.port} is gone", lost=True)
            return RankError("rank 0 is gone", missing=(0,))
        gone = pulse.silent(silence)
        if gone and down is None:
            names = ", ".join(map(str, gone))
            are = "rank {} is gone" if len(gone) == 1 else "ranks {} are gone"
            return RankError(are.format(names), missing=tuple(gone))
        return None

    def _search(self) -> RankError | None:
        """Who is gone, now that something has broken; None if all are heard again."""
        pulse = self._pulse
        if pulse is None:
            return None
        asked, end = pulse.ask(), time.monotonic() + LOOK
        while time.monotonic() < end:
            found = self._known(QUIET)
            if found is not None:
                return found
            if all(r in pulse.words or 0 < asked <= pulse.answered[r] for r in pulse.others):
                return None
            time.sleep(0.05)
        return None

    def _sharing(self) -> bool:
        found = accelerators()
        return found is not None and self.launch.local_size > found[1]


def shares(costs: Sequence[float], size: int) -> list[list[int]]:
    """Places in `costs` dealt out to `size` ranks, in order, so that each has about as much to do.

    The dearest first, each to the rank with the least so far.
    """
    dealt: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = loads.index(min(loads))
        dealt[rank].append(i)
        loads[rank] += costs[i]
    return [sorted(share) for share in dealt]


def _second(launch: Launch, wait: timedelta) -> dist.Store:
    """A connection for the pulse: one that waits for another rank would hold up its beats."""
    store = dist.TCPStore(
        launch.address, launch.port, None, False, timeout=wait, wait_for_workers=False
    )
    return dist.PrefixStore(f"nulledit/{launch.attempt}", store)


def _patience() -> float:
    given = os.environ.get("NULLEDIT_RANK_TIMEOUT", str(SILENCE))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not QUIET <= seconds < float("inf"):
        raise ConfigError(f"NULLEDIT_RANK_TIMEOUT is {given!r}: expected {QUIET} seconds or more")
    return seconds


def _packed(note: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """A message as bytes [n]: length of the JSON (8 bytes), JSON, safetensors."""
    head = json.dumps(note).encode()
    body = save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    raw = len(head).to_bytes(8, "little") + head + body
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _unpacked(raw: Tensor) -> Message:
    content = raw.numpy().tobytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), load(content[8 + length :])
