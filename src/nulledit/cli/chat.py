"""`nulledit chat`: a talk with the base and the edited model of a run, side by side."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nulledit.cli.command import Call, command
from nulledit.cli.common import Interrupted
from nulledit.cli.options import PLACED, RUN, chat_settings, least, opt
from nulledit.errors import ConfigError, FactError
from nulledit.io.text import count, plain

if TYPE_CHECKING:
    from nulledit.evaluation.conversation import Conversation, Exchange

YOU, MARGIN = "you     ", 8
SIDES = ("", "base", "edited")
END, ANEW = "/quit", "/reset"


@command(
    "Talk to the base and the edited model.",
    RUN,
    opt("--prompts FILE", "A prompt a line, each a talk of its own.  [default: from stdin]"),
    opt("--max-tokens N", "Longest answer, in tokens.", least(1), 200),
    opt(
        "--system TEXT|none|default",
        "The system prompt.  [default: the run's, or what the template writes by itself]",
    ),
    opt("--plain", "Go on with each prompt as plain text, up to a newline.", bool),
    PLACED,
)
def chat(call: Call) -> None:
    """Ask the base and the edited model of a run the same, in the model's chat template.

    Prompts come from the terminal or a pipe, a line each. Both models answer greedily, and read
    their own earlier answers: /reset begins anew, /quit or the end of the file ends. Where a prompt
    names the subject of a fact in the run, the probability of its target per token is shown for
    both. --plain is for models without a template: no history, each prompt is a text to go on with.
    --json prints an object a line for each prompt. Nothing in RUN is changed.

    \b
    $ nulledit chat run
    $ echo "What is the capital of France?" | nulledit chat run
    $ nulledit chat run --prompts questions.txt --json
    """
    if call.plain and call.system is not None:
        raise ConfigError("--plain can't be given with --system")
    prompts = _prompts_of(Path(call.prompts)) if call.prompts else None
    run = call.open()
    from nulledit.evaluation.conversation import Conversation

    held = run.editor.recipe.chat
    form = None if call.plain else chat_settings(held, chat=True, system=call.system)
    talk = Conversation(run.editor, form, max_tokens=call.max_tokens)
    try:
        if prompts is None:
            if sys.stdin.isatty():
                facts = count(len(run.editor.facts), "fact")
                call.say(f"{facts} in the model. {ANEW} begins anew, {END} or Ctrl-D ends.")
            _talk(call, talk)
        for prompt in prompts or ():
            talk.reset()
            _exchange(call, talk, prompt)
    except KeyboardInterrupt as error:
        click.echo(err=True)  # below what was begun
        raise Interrupted("interrupted; the run is as it was") from error


def _talk(call: Call, talk: Conversation) -> None:
    """Prompts as they come, each after those before it."""
    for line in _typed():
        prompt = line.strip()
        if prompt == END:
            break
        if prompt == ANEW:
            talk.reset()
        elif prompt:
            try:
                _exchange(call, talk, prompt)
            except FactError as error:  # too long: what was said before still stands
                if not sys.stdin.isatty():
                    raise
                call.say(f"{error}; {ANEW} forgets what was said")


def _exchange(call: Call, talk: Conversation, prompt: str) -> None:
    """Ask one prompt; both answers as they are made, or one line of JSON."""
    if call.as_json:
        from nulledit.io.jsonfiles import as_json

        click.echo(as_json(talk.say(prompt).to_dict(), indent=None), nl=False)
        return
    if call.prompts or not sys.stdin.isatty():
        click.echo(f"{YOU}{plain(prompt)}")
    shown = _Shown()
    found = talk.say(prompt, shown)
    shown.close(found)


class _Shown:
    """Both answers on stdout, piece by piece; nothing in them can steer the terminal."""

    def __init__(self) -> None:
        self.side = ""

    def __call__(self, side: str, piece: str) -> None:
        """A piece of what `side` says."""
        self._begin(side)
        lines = f"\n{' ' * MARGIN}".join(map(plain, piece.split("\n")))
        click.echo(lines, nl=False)
        sys.stdout.flush()

    def close(self, found: Exchange) -> None:
        """End the answers; after them the facts that were asked."""
        self._begin("edited")
        click.echo()
        for fact in found.facts:
            before, after = (f"{p:.2g}" for p in (fact.base_probability, fact.edited_probability))
            click.echo(f"{'':{MARGIN}}p({plain(fact.target)}) {before} → {after}, {plain(fact.id)}")
        click.echo()

    def _begin(self, side: str) -> None:
        """The label of `side`, after that of a side before it that said nothing."""
        for name in SIDES[SIDES.index(self.side) + 1 : SIDES.index(side) + 1]:
            newline = "\n" if self.side else ""
            click.echo(f"{newline}{name:{MARGIN}}", nl=False)
            self.side = name


def _typed() -> Iterator[str]:
    """Lines of stdin, to its end; on a terminal after a prompt, and with its history of lines."""
    asks = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the locale, and with no byte let through
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    if asks:
        with suppress(ImportError):
            import readline  # noqa: F401
    try:
        while True:
            if asks and sys.stdout.isatty():
                yield input(YOU)
                continue
            if asks:
                click.echo(YOU, nl=False, err=True)
            line = sys.stdin.readline()
            if not line:
                return
            yield line
    except EOFError:
        click.echo()
    except UnicodeDecodeError as error:
        raise FactError(f"stdin: not UTF-8 text ({error.reason})") from None


def _prompts_of(file: Path) -> list[str]:
    """The lines of a file that are not empty."""
    from nulledit.io.untrusted import MAX_DOCUMENT, read_text

    text = read_text(file, most=MAX_DOCUMENT, error=FactError, what="file of prompts")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise FactError(f"{file}: no prompt in it; expected one a line")
    return prompts
