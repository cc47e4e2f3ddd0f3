"""What a run says as it goes on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nulledit.editing.call_log import Progress

if TYPE_CHECKING:
    from nulledit.editing.reports import EditReport  # with torch

logger = logging.getLogger(__name__)


class Talk:
    """Notices go to the log, progress nowhere; the command line has one that prints."""

    def say(self, message: str) -> None:
        """A line about what goes on."""
        logger.info("%s", message)

    @contextmanager
    def progress(self, prefix: str = "") -> Iterator[Progress | None]:
        """Who receives progress inside, each stage named with `prefix`."""
        yield None

    def written(self, report: EditReport) -> None:
        """Facts are in the model; they are yet to be evaluated, which takes longer."""


class Told(Talk):
    """Notices go to the log, progress to a function."""

    def __init__(self, progress: Progress | None):
        """`progress`: called with a stage, what is done, and what there is in all."""
        self.told = progress

    @contextmanager
    def progress(self, prefix: str = "") -> Iterator[Progress | None]:
        """The function, told of each stage by its name with `prefix` in front."""
        told = self.told
        yield None if told is None else lambda stage, *done: told(prefix + stage, *done)


def in_facts(tell: Progress, prefix: str = "") -> Progress:
    """`tell` with each stage named with `prefix`; values are counted as facts over all batches."""
    offset = facts = 0  # of the batch at work

    def told(stage: str, done: int, total: int) -> None:
        nonlocal offset, facts
        if stage == "batches":
            offset, facts = done, total
        elif stage == "values":
            tell("facts", min(offset + done, facts), facts)
        else:
            tell(f"{prefix}{stage}", done, total)

    return told
