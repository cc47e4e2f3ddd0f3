"""Ranks as real processes, which begin with everything imported: no second goes into that."""

import contextlib
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from dataclasses import dataclass

import torch

from nulledit.cli.main import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["nulledit.api.run", "nulledit.cli.main", "transformers.models.llama.modeling_llama"]
)
STUCK = 300.0  # seconds after which ranks that do not end are given up
PATIENT = {"nulledit.parallel.ranks:FAREWELL": 60.0}
"""Ranks wait for each other's last words rather than so long, however busy the machine is."""


@dataclass
class Ended:
    """How a rank ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self):
        return [line for line in self.err.splitlines() if line.startswith("Error: ")]


def free_port():
    """One below those of outgoing connections, which take any from 32768 on meanwhile."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def launch(folder, *commands, dies=None, stopped=(), before=None, attempt=0, stop=False):
    """Run `nulledit` with each of `commands` as one rank; how each ended.

    `dies`: (rank, "module:function", n): the rank is killed as it calls that the nth time.
    `stopped`: ranks that are told to stop (SIGTERM) at such a place, likewise. `stop`: when one has
    died, stop the others again and again, as torchrun does once; then the store is the launcher's,
    too. `before`: {"module:name": value} to set first.
    """
    port, store = free_port(), None
    if stop:
        store = torch.distributed.TCPStore(
            "127.0.0.1", 0, None, True, wait_for_workers=False, use_libuv=True
        )
        port = store.port
    environment = {
        "WORLD_SIZE": str(len(commands)),
        "LOCAL_WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_USE_AGENT_STORE": str(stop),
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "NULLEDIT_CACHE": os.environ["NULLEDIT_CACHE"],
    }
    processes = []
    for rank, words in enumerate(commands):
        mine = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        signals = [(*place, signal.SIGKILL) for r, *place in [dies or (None,)] if r == rank]
        signals += [(*place, signal.SIGTERM) for r, *place in stopped if r == rank]
        arguments = (folder / f"rank{rank}", mine, [str(w) for w in words], signals, before or {})
        processes.append(SERVER.Process(target=_act, args=arguments))
    for process in processes:
        process.start()
    end = time.monotonic() + STUCK
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        if stop and any(p.exitcode for p in processes):
            for process in processes:
                process.terminate()
        time.sleep(0.02)
    stuck = [p for p in processes if p.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, "a rank did not end"
    del store
    return [
        Ended(
            process.exitcode,
            (folder / f"rank{rank}.out").read_text(),
            (folder / f"rank{rank}.err").read_text(),
        )
        for rank, process in enumerate(processes)
    ]


def _act(place, environment, words, signals, before):
    """One rank."""
    for kind, number in (("out", 1), ("err", 2)):
        descriptor = os.open(f"{place}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
    os.environ.update(environment)
    torch.set_num_threads(1)
    for name, value in (PATIENT | before).items():
        setattr(*_found(name), value)
    for name, number, sent in signals:
        _signalled(name, number, sent)
    sys.argv = ["nulledit", *words]
    main()


def _found(name):
    module, _, attribute = name.partition(":")
    return importlib.import_module(module), attribute


def _signalled(name, number, sent):
    """Have this process sent a signal at the nth call of a function."""
    module, attribute = _found(name)
    real, calls = getattr(module, attribute), 0

    def called(*args, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), sent)
        return real(*args, **options)

    setattr(module, attribute, called)
