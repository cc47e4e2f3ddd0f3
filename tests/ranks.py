"""Ranks as real processes, which begin with everything imported: no second goes into that."""

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass

import torch

from nulledit.cli.main import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["nulledit.cli.runs", "nulledit.cli.main", "transformers.models.llama.modeling_llama"]
)


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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(folder, *commands, dies=None, before=None, attempt=0, stop=False):
    """Run `nulledit` with each of `commands` as one rank; how each ended.

    `dies`: (rank, "module:function", n): the rank is killed as it calls that the nth time.
    `before`: {"module:name": value} to set first. `stop`: when one has died, stop the others as
    torchrun does; then the store is the launcher's, too.
    """
    port, store = free_port(), None
    if stop:
        store = torch.distributed.TCPStore(
            "127.0.0.1", port, None, True, wait_for_workers=False, use_libuv=True
        )
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
        death = dies[1:] if dies and dies[0] == rank else None
        arguments = (folder / f"rank{rank}", mine, [str(w) for w in words], death, before or {})
        processes.append(SERVER.Process(target=_act, args=arguments))
    for process in processes:
        process.start()
    end = time.monotonic() + 60
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        if stop and any(p.exitcode for p in processes):
            for process in processes:
                if process.is_alive():
                    process.terminate()
            stop = False
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


def _act(place, environment, words, death, before):
    """One rank."""
    for kind, number in (("out", 1), ("err", 2)):
        descriptor = os.open(f"{place}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
    os.environ.update(environment)
    torch.set_num_threads(1)
    for name, value in before.items():
        setattr(*_found(name), value)
    if death:
        _mortal(*death)
    sys.argv = ["nulledit", *words]
    main()


def _found(name):
    module, _, attribute = name.partition(":")
    return importlib.import_module(module), attribute


def _mortal(name, number):
    """Have this process killed at the nth call of a function."""
    module, attribute = _found(name)
    real, calls = getattr(module, attribute), 0

    def called(*args, **options):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **options)

    setattr(module, attribute, called)
