"""`nulledit`: the group of commands, and how errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import os
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
from nulledit.cli.check import check
from nulledit.cli.common import CONTEXT, Interrupted, refuse_ranks
from nulledit.cli.diff import diff
from nulledit.cli.edit import edit
from nulledit.cli.evaluate import evaluate
from nulledit.cli.export import export
from nulledit.cli.facts import facts
from nulledit.cli.forget import forget
from nulledit.cli.history import log, show
from nulledit.cli.info import info
from nulledit.cli.locate import locate
from nulledit.cli.merge import merge
from nulledit.cli.methods import methods
from nulledit.cli.preview import preview
from nulledit.cli.recipe import recipe
from nulledit.cli.report import report
from nulledit.cli.retry import retry
from nulledit.cli.stats import stats
from nulledit.cli.study import study
from nulledit.cli.tune import tune
from nulledit.cli.verify import verify
from nulledit.errors import NullEditError
from nulledit.io.text import plain
from nulledit.io.untrusted import one_line
from nulledit.parallel.launch import Launch

if TYPE_CHECKING:
    from nulledit.parallel.ranks import Ranks

MOST_SAID = 2000  # characters of an error on the terminal

SECTIONS: dict[str, list[tuple[click.Command, str, str]]] = {
    "Edit": [
        (
            edit,
            "Write facts into a model, or more facts into a run.",
            "nulledit edit facts.yaml --model smollm2-135m --out run",
        ),
        (preview, "What an edit would change; writes nothing.", "nulledit preview run more.yaml"),
        (retry, "Write what does not hold again, with stronger settings.", "nulledit retry run"),
        (forget, "Suppress a fact, with nothing in its place.", "nulledit forget run facts.yaml"),
    ],
    "Live with edits": [
        (log, "What happened to the model, event by event.", "nulledit log run"),
        (show, "The facts of a run, or the story of one.", "nulledit show run capital-of-france"),
        (undo, "Take facts out, exactly.", "nulledit undo run capital-of-france"),
        (redo, "Take the last undo back.", "nulledit redo run"),
        (restore, "The base again, bit for bit.", "nulledit restore run"),
        (rebuild, "Write the facts anew, without a trace of undone ones.", "nulledit rebuild run"),
        (merge, "Two runs on one base become one.", "nulledit merge run other --out both"),
        (diff, "Two runs, or two states of one.", "nulledit diff run@3 run"),
    ],
    "Look at a run": [
        (ask, "One prompt, base and edited model.", 'nulledit ask run "The capital of France is"'),
        (evaluate, "Rates, perplexity and KL, base and edited.", "nulledit evaluate run"),
        (report, "One HTML page of runs and studies.", "nulledit report run"),
    ],
    "Gates": [
        (check, "Limits on a run; exit code 1 if one is broken.", "nulledit check run"),
        (verify, "Every hash, and the weights computed again.", "nulledit verify run"),
    ],
    "Hand over": [
        (
            export,
            "A checkpoint, a LoRA adapter or a delta.",
            "nulledit export run --as lora --out adapter",
        ),
        (apply, "A delta on its base, or off again.", "nulledit apply delta gpt2 --out model"),
    ],
    "Compare": [
        (
            study,
            "The paper's experiments, as commands.",
            "nulledit study table1 --facts counterfact.json --dry-run",
        ),
    ],
    "Prepare": [
        (facts, "Check a file of facts.", "nulledit facts check facts.yaml"),
        (
            stats,
            "Statistics of a model's preserved keys.",
            "nulledit stats make gpt2 --text corpus.txt --layers 2-6",
        ),
        (
            locate,
            "Which layers? Causal tracing of facts that a model knows.",
            "nulledit locate gpt2 facts.yaml --out trace",
        ),
        (
            tune,
            "A recipe for a model on given facts, with its evidence.",
            "nulledit tune gpt2 facts.yaml --out tuned.yaml --minutes 20",
        ),
        (methods, "Methods, their settings and sources.", "nulledit methods memit"),
        (
            recipe,
            "What a recipe may hold, for editors.",
            "nulledit recipe schema > recipe.schema.json",
        ),
        (info, "Versions, devices, caches, recipes, models.", "nulledit info"),
    ],
}


UNEXPECTED = 70
"""Exit code of what nulledit did not foresee: EX_SOFTWARE of sysexits.h."""
TOGETHER = ("edit", "stats")
"""Commands that several processes may run together, started by torchrun."""


class Root(click.Group):
    """The top group: sections and examples in its help, errors in one line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands by section, each with an example."""
        del ctx
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                for command, about, example in entries:
                    formatter.write_text(f"{command.name}: {about}")
                    with formatter.indentation():
                        formatter.write_text(f"$ {example}")

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
    """Edit facts in a language model, in the null space of what must stay.

    A run is a folder: RUN/model is an ordinary Hugging Face model, RUN/ledger remembers every edit
    exactly, RUN/report.md shows what changed and what did not. Results go to stdout, progress and
    notices to stderr. Exit codes: 0 done, 1 a check failed, 2 bad input, 70 an
    unexpected error, 130 interrupted.
    """
    ctx.obj = {"debug": debug}
    if ctx.invoked_subcommand not in TOGETHER:
        refuse_ranks(str(ctx.invoked_subcommand))


for _entries in SECTIONS.values():
    for _command, _about, _example in _entries:
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
