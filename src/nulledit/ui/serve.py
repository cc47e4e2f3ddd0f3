"""The page's server: this machine alone, until it is interrupted."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import uvicorn

from nulledit.api.run import Run
from nulledit.errors import ConfigError
from nulledit.runs.talk import Talk
from nulledit.ui.app import Site
from nulledit.ui.work import Worker

HOST = "127.0.0.1"
PATIENCE = 2  # seconds that open streams get at the end


def serve(
    folder: Path,
    opened: Callable[[Talk], Run],
    *,
    name: str,
    port: int,
    ready: Callable[[str], None],
) -> None:
    """Show the run of `folder` until the process is interrupted; the model loads meanwhile.

    `opened`: loads the run. `name`: as it is shown. `port`: 0 for any that is free. `ready`: told
    the address, with its secret token. ConfigError for a port that is taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((HOST, port))
            bound.listen()  # who receives the address may come at once
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; leave it out for any") from error
        number = bound.getsockname()[1]
        site = Site(Worker(folder, opened), name=name, port=number)
        ready(f"http://{HOST}:{number}{site.app.path}")
        settings = uvicorn.Config(
            site.app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=PATIENCE,
        )
        with suppress(KeyboardInterrupt):  # the way to end it, by any signal
            uvicorn.Server(settings).run(sockets=[bound])
