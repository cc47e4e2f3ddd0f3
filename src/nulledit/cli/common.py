"""How a command speaks: results on stdout, notices and progress on stderr; and its ranks."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from nulledit.editing.call_log import Progress
from nulledit.errors import ConfigError, RankError
from nulledit.io.text import plain
from nulledit.parallel.launch import Launch
from nulledit.runs.talk import Talk, in_facts

if TYPE_CHECKING:
    from nulledit.config import Placement
    from nulledit.parallel.ranks import Ranks
    from nulledit.report.document import Document, Part

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
EVERY = 10.0  # seconds between lines of progress where stderr is no terminal


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination, with a line that says what is kept."""


@contextmanager
def interruptions_kept() -> Iterator[None]:
    """Any error that was raised on the way out of an interruption is that interruption.

    A signal may arrive in the middle of a library's bookkeeping, which then fails as it is cleaned
    up: torch's stack of modes, say. What the user must hear is that the command was stopped.
    """
    try:
        yield
    except (RankError, click.ClickException, click.Abort, click.exceptions.Exit):
        raise
    except Exception as error:
        if (interruption := _interruption(error)) is None:
            raise
        raise interruption from error


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The first interruption that `error` came from, through any number of errors between."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def emit(data: Any) -> None:
    """One JSON document on stdout."""
    from nulledit.io.jsonfiles import as_json

    click.echo(as_json(data), nl=False)


def echo(*parts: str | Part | Document) -> None:
    """A result on stdout, an empty line between its parts; none can steer the terminal."""
    from nulledit.report.terminal import has_colours, on_terminal

    colour = has_colours()
    click.echo("\n\n".join(filter(None, (on_terminal(p, colour=colour) for p in parts))))


def say(message: str, *, quiet: bool) -> None:
    """A line about what goes on, to stderr."""
    if not quiet:
        click.echo(plain(message), err=True)


class Terminal(Talk):
    """Notices and progress on stderr, or neither if `quiet`."""

    def __init__(self, *, quiet: bool):
        """`quiet`: neither."""
        self.quiet = quiet

    def say(self, message: str) -> None:
        """A line about what goes on."""
        say(message, quiet=self.quiet)

    @contextmanager
    def progress(self, prefix: str = "") -> Iterator[Progress]:
        """A bar for each stage where stderr is a terminal, else lines."""
        shown = Bars() if sys.stderr.isatty() else Lines()
        try:
            yield (lambda *_: None) if self.quiet else in_facts(shown, prefix)
        finally:
            shown.close()


class Bars:
    """A bar for each stage, one after the other."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Bring the bar of `stage` to `done` of `total`; 0: of nobody knows how many."""
        if self.bar is None or stage != self.stage:
            from tqdm import tqdm

            self.close()
            self.stage = stage
            self.bar = tqdm(total=total or None, desc=stage, leave=False, file=sys.stderr)
        self.bar.n = done
        self.bar.refresh()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


class Lines:
    """A line for each stage as it begins, then one every ten seconds at most: for logs."""

    def __init__(self) -> None:
        self.begun = self.last = time.monotonic()
        self.stages: set[str] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say how far `stage` is, if it is new or it is time."""
        now = time.monotonic()
        if stage in self.stages and now - self.last < EVERY:
            return
        self.stages.add(stage)
        self.last = now
        share = f"{done} of {total}" if total else str(done)
        say(f"{stage}: {share}, {now - self.begun:.0f} s", quiet=False)

    def close(self) -> None:
        """Nothing is left to take away."""


def meet(device: str | Placement | None) -> Ranks:
    """The ranks that this process was started with; how they end is seen to in `main`."""
    from nulledit.parallel.ranks import Ranks

    holder = click.get_current_context().ensure_object(dict)
    if "ranks" not in holder:
        named = device if device is None or isinstance(device, str) else None
        holder["ranks"] = Ranks.join(Launch.of(), device=named)
    ranks: Ranks = holder["ranks"]
    own_device(ranks, device)
    return ranks


def meet_early(device: str | Placement | None) -> None:
    """Meet before anything can fail on one rank alone; a single process has no time to lose."""
    if Launch.of().size > 1:
        meet(device)


def own_device(ranks: Ranks, device: str | Placement | None) -> str | Placement | None:
    """The device of this rank, or the devices of a process that is alone."""
    if device is None or isinstance(device, str):
        return ranks.device(device)
    if not ranks.alone:
        raise ConfigError(
            "a model can't be spread by several ranks (--device-map): each takes the "
            "accelerator of its number"
        )
    return device


def convert_once(name: str, ranks: Ranks) -> None:
    """Have rank 0 convert an embedded model or a GGUF file, before all read it."""
    from nulledit.models.embedded import source_of

    if not ranks.alone:
        if ranks.first:
            source_of(name)
        ranks.barrier()


def refuse_ranks(command: str) -> None:
    """ConfigError where several processes were started for a command that is one process's."""
    launch = Launch.of()
    if launch.size > 1:
        raise ConfigError(
            f"nulledit {command} runs in one process, {launch.size} were started: start it "
            "without torchrun"
        )


class _Stderr(logging.Handler):
    """Notices of the library, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(f"Note: {plain(record.getMessage())}", file=sys.stderr)


def prepare(*, quiet: bool) -> None:
    """Before torch is loaded: our notices to stderr; the libraries' talk off unless --debug."""
    context = click.get_current_context(silent=True)
    debug = bool(context and (context.find_object(dict) or {}).get("debug"))
    logger = logging.getLogger("nulledit")
    for handler in [h for h in logger.handlers if isinstance(h, _Stderr)]:
        logger.removeHandler(handler)
    logger.addHandler(_Stderr())
    logger.setLevel(logging.ERROR if quiet else logging.INFO)
    if debug:
        return
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(?!nulledit)")
