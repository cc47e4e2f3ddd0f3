"""What a call gathers on its way, and who receives its progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nulledit.editing.displacement import Displacement  # which needs torch

Progress = Callable[[str, int, int], None]
"""Called with a stage, what is done, and what there is in all."""


class CallLog:
    """What one call gathers on its way: notices, seconds by stage, progress."""

    def __init__(self, progress: Progress | None):
        self.notices: list[str] = []
        self.seconds: dict[str, float] = {}
        self.optimised = 0  # values that were not in a cache
        self.displaced: list[Displacement] = []  # of each batch that came after others
        self.progress = progress

    def tell(self, stage: str, done: int, total: int) -> None:
        """Report progress, if anybody listens."""
        if self.progress:
            self.progress(stage, done, total)

    def counter(self, stage: str, total: int) -> Callable[[int], None]:
        """Called with a number of things just done."""
        done = 0

        def count(n: int) -> None:
            nonlocal done
            done += n
            self.tell(stage, done, total)

        return count

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall seconds inside to `seconds[stage]`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
