"""What commands share: facts, ranks, notices and progress on stderr, results on stdout."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import click

from nulledit.errors import ConfigError
from nulledit.io.text import plain
from nulledit.parallel.launch import Launch

if TYPE_CHECKING:
    from tqdm import tqdm

    from nulledit.config import Placement
    from nulledit.data.readers import FactFile
    from nulledit.parallel.ranks import Ranks
    from nulledit.report.document import Document, Part
    from nulledit.report.tables import Table

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
MOST_NOTICES = 20  # of a file of facts on the terminal


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination, with a line that says what is kept."""


def facts_of(file: str, given: Mapping[str, Any], *, quiet: bool, known: bool = False) -> FactFile:
    """The facts of `file` under the options of a command, its notices said."""
    from nulledit.data.readers import read_facts

    names = ("skip", "limit", "on_conflict", "skip_bad")
    found = read_facts(file, **{n: given[n] for n in names if n in given}, known=known)
    for notice in found.notices[:MOST_NOTICES]:
        say(f"Note: {notice}", quiet=quiet)
    if (left := len(found.notices) - MOST_NOTICES) > 0:
        say(f"Note: {left} more: nulledit facts check {file} --json has all", quiet=quiet)
    return found


def emit(data: Any) -> None:
    """One JSON document on stdout."""
    from nulledit.io.jsonfiles import as_json

    click.echo(as_json(data), nl=False)


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
    """Have rank 0 convert the embedded model, before all read it."""
    from nulledit.models.embedded import EMBEDDED, embedded_folder, is_installed

    if not ranks.alone and name in EMBEDDED:
        if ranks.first and is_installed(name):
            embedded_folder(name)
        ranks.barrier()


def meet_early(device: str | Placement | None) -> None:
    """Meet before anything can fail on one rank alone; a single process has no time to lose."""
    if Launch.of().size > 1:
        meet(device)


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


def echo(*parts: str | Table | Part | Document) -> None:
    """A result on stdout, an empty line between its parts; none can steer the terminal."""
    from nulledit.report.terminal import has_colours, on_terminal

    colour = has_colours()
    click.echo("\n\n".join(filter(None, (on_terminal(p, colour=colour) for p in parts))))


def say(message: str, *, quiet: bool) -> None:
    """A line about what goes on, to stderr."""
    if not quiet:
        click.echo(plain(message), err=True)


class Bars:
    """Progress bars on stderr, one after the other; call it with (stage, done, total)."""

    def __init__(self, *, quiet: bool, prefix: str = ""):
        self.shown = not quiet and sys.stderr.isatty()
        self.prefix = prefix
        self.bar: tqdm[Any] | None = None
        self.stage = ""
        self.offset = self.facts = 0  # of the batch at work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Bring the bar of `stage` to `done` of `total`; a batch counts on from the ones before."""
        if stage == "batches":
            self.offset, self.facts = done, total
            return
        if stage == "values":
            done, total = min(self.offset + done, self.facts), self.facts
        if not self.shown:
            return
        if self.bar is None or stage != self.stage:
            from tqdm import tqdm

            self.__exit__()
            self.stage = stage
            name = "facts" if stage == "values" else f"{self.prefix}{stage}"
            self.bar = tqdm(total=total, desc=name, leave=False, file=sys.stderr)
        self.bar.n = done
        self.bar.refresh()
