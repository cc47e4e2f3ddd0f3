"""What a run says as it goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done, and what there is in all."""


class Talk:
    """Notices go to the log, progress nowhere; the command line has one that prints."""

    def say(self, message: str) -> None:
        """A line about what goes on."""
        logger.info("%s", message)

    @contextmanager
    def progress(self, prefix: str = "") -> Iterator[Progress | None]:
        """Who is told of progress inside, each stage named with `prefix`."""
        yield None
