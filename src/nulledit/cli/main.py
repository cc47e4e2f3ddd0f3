"""`nulledit`: the group of commands, and how errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from nulledit._version import __version__
from nulledit.cli.apply import apply
from nulledit.cli.ask import ask
from nulledit.cli.change import rebuild, redo, restore, undo
from nulledit.cli.chat import chat
from nulledit.cli.check import check
from nulledit.cli.common import CONTEXT, Interrupted, interruptions_kept, refuse_ranks
from nulledit.cli.compare import compare
from nulledit.cli.diff import diff
from nulledit.cli.edit import edit
from nulledit.cli.evaluate import evaluate
from nulledit.cli.export import export
from nulledit.cli.facts import facts
from nulledit.cli.forget import forget
from nulledit.cli.history import log, show
from nulledit.cli.info import info
from nulledit.cli.locate import locate
from nulledit.cli.mcp import mcp
from nulledit.cli.merge import merge
from nulledit.cli.methods import methods
from nulledit.cli.preview import preview
from nulledit.cli.recipe import recipe
from nulledit.cli.report import report
from nulledit.cli.retry import retry
from nulledit.cli.run import run
from nulledit.cli.stats import stats
from nulledit.cli.study import study
from nulledit.cli.tune import tune
from nulledit.cli.ui import ui
from nulledit.cli.verify import verify
from nulledit.errors import NullEditError
from nulledit.io.text import plain
from nulledit.io.untrusted import one_line
from nulledit.parallel.launch import Launch

if TYPE_CHECKING:
    from nulledit.parallel.ranks import Ranks

MOST_SAID = 2000  # characters of an error on the terminal

SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Edit": (edit, preview, retry, forget, run),
    "Live with edits": (log, show, undo, redo, restore, rebuild, merge, diff),
    "Look at a run": (ui, ask, chat, evaluate, report),
    "Check": (check, verify),
    "Hand over": (export, apply, mcp),
    "Compare": (compare, study),
    "Prepare": (facts, stats, locate, tune, methods, recipe, info),
}
UNEXPECTED = 70
"""Exit code of what nulledit did not foresee: EX_SOFTWARE of sysexits.h."""
TOGETHER = ("edit", "stats")
"""Commands that several processes may run together, started by torchrun."""


class Root(click.Group):
    """The top group: sections and examples in its help, errors in one line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by section, each with the first example of its own help."""
        del ctx
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                for command in commands:
                    formatter.write_text(f"{command.name}: {command.short_help}")
                    example = re.search(r"^ *\$ (.+)$", command.help or "", re.MULTILINE)
                    with formatter.indentation():
                        formatter.write_text(example[0].strip() if example else "")

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run; in `standalone_mode` print errors as one line and exit with their code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(error.exit_code)
        except click.ClickException as error:
            hint = ""
            if isinstance(error, click.UsageError) and error.ctx:
                hint = f" (see {error.ctx.command_path} --help)"
            _fail(error.format_message() + hint, error.exit_code)
        except click.Abort:
            _fail("interrupted", 130)
        else:
            sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; with --debug, errors keep their trace."""
        try:
            with interruptions_kept():
                result = super().invoke(ctx)
            _end_with_others(ctx, 0, "", None)
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            ranks = _ranks(ctx)
            lost = ranks.lost() if ranks else None
            said = str(error) if isinstance(error, Interrupted) else "interrupted"
            line, code = (said, 130) if lost is None else _describe(lost)
            _end_with_others(ctx, code, line, lost or error)
            _fail(line, code)
        except Exception as error:
            line, code = _describe(error)
            if ctx.params.get("debug"):
                _end_with_others(ctx, code, "", error)
                traceback.print_exception(error)
            _end_with_others(ctx, code, line, error)
            _fail(line, code)


def _describe(error: Exception) -> tuple[str, int]:
    """One line for an error, and its exit code: 2 where a user can put it right, 70 for ours."""
    if isinstance(error, NullEditError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 2
    if isinstance(error, sqlite3.Error):
        return f"the ledger can't be written: {error}", 2
    kind = type(error).__name__
    if kind == "SafetensorError":
        return f"a tensor file can't be written: {error}", 2
    if isinstance(error, MemoryError) or kind in ("OutOfMemoryError", "AcceleratorError"):
        said = str(error) or "out of memory"
        return f"{said}: try a smaller --batch-size or --set chunk_positions=N", 2
    if kind == "LinAlgError" or "_LinAlgError" in kind:
        return f"{one_line(error)}: try a larger method.l2, or fewer facts", 2
    if "(os error" in str(error):  # of a library in Rust, such as tokenizers on a full disk
        return one_line(error), 2
    return (
        f"unexpected {kind}: {one_line(error) or 'without a word'} (a fault of nulledit: "
        "`nulledit --debug ...` shows where)",
        UNEXPECTED,
    )


def _ranks(ctx: click.Context | None) -> Ranks | None:
    """This process and those that it was started with, once they have met."""
    ranks = (ctx.obj or {}).get("ranks") if ctx else None
    return None if ranks is None or ranks.alone else ranks


def _end_with_others(ctx: click.Context, code: int, line: str, error: BaseException | None) -> None:
    """Leave the other ranks, if there are any: one of all says why, and all end alike."""
    ranks = _ranks(ctx)
    if ranks is None:
        return
    if code and not line:  # a slip of our own, or --debug
        traceback.print_exception(error)
        told = f"{type(error).__name__}: {error}"
        word = ranks.end(code, told or "stopped", error=error)
        _leave(word.code)
    word = ranks.end(code, line, error=error)
    if word.line:
        _say_error(word.line)
    if word.code:
        _leave(word.code)


def _leave(code: int) -> None:
    """End at once: threads that wait for a rank that is gone would hold up an orderly end."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _fail(message: str, code: int) -> None:
    with contextlib.suppress(NullEditError):
        if Launch.of().rank:  # all ranks were given the same words; rank 0 says what is wrong
            sys.exit(code)
    _say_error(message)
    sys.exit(code)


def _say_error(message: str) -> None:
    lines = (plain(line.strip()) for line in message.splitlines())
    line = one_line(" ".join(line for line in lines if line), MOST_SAID)
    click.echo(f"Error: {line}", err=True)


@click.group(cls=Root, context_settings=CONTEXT)
@click.version_option(__version__, message="nulledit %(version)s")
@click.option("--debug", is_flag=True, help="Show the trace of an error, and what libraries say.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Edit facts in a language model, and leave the rest as it is.

    A run is a folder: RUN/model is an ordinary Hugging Face model, RUN/ledger remembers every edit
    exactly, RUN/report.md shows what changed and what did not. Results go to stdout, progress and
    notices to stderr. Exit codes: 0 done, 1 a check failed, 2 bad input, 70 an
    unexpected error, 130 interrupted.
    """
    ctx.obj = {"debug": debug}
    if ctx.invoked_subcommand not in TOGETHER:
        refuse_ranks(str(ctx.invoked_subcommand))


for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)


def main() -> None:
    """The installed command: a termination counts as Ctrl-C; any terminal's encoding will do."""

    def interrupt(_number: int, _frame: object) -> None:
        ranks = _ranks(click.get_current_context(silent=True))
        if ranks is None or not ranks.parting:
            raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell's background has Ctrl-C
            signal.signal(number, interrupt)
    # Threads that spin while they wait for a busy core: with another process beside, optimising
    # values took 18.8 s of wall time by default and 9.4 s so. Read when torch is first loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "WORLD_SIZE" in os.environ:  # torch's own warnings of a rank that is gone; we say it once
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    cli(prog_name="nulledit")
