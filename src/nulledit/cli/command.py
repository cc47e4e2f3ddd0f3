"""A command: its parameters, the help that shows them, and one call of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.common import Terminal, echo, emit, own_device, prepare
from nulledit.cli.options import (
    DEVICE,
    JSON,
    QUIET,
    Part,
    chat_settings,
    model_source,
    parameters,
    placed,
)
from nulledit.parallel.launch import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nulledit.api.editor import Editor
    from nulledit.api.run import Run
    from nulledit.config import ChatSettings, Layout, Recipe
    from nulledit.data.readers import FactFile
    from nulledit.models.editable_model import EditableModel
    from nulledit.parallel.ranks import Ranks
    from nulledit.report import document as doc
    from nulledit.runs.talk import Talk

    Shown = str | doc.Part | doc.Document | list[Any]

MOST_NOTICES = 20  # of a file of facts on the terminal


class Sectioned(click.Command):
    """A command whose help shows its options under titles; "" has those that come last."""

    sections: dict[str, list[click.Parameter]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Options by section."""
        sections = {title: found for title, found in self.sections.items() if title}
        last = "Output:" if sections else "Options:"
        titled = [p for found in sections.values() for p in found]
        sections[last] = [p for p in self.get_params(ctx) if p not in titled]
        for title, found in sections.items():
            options = [p for p in found if isinstance(p, click.Option)]
            records = [record for p in options if (record := p.get_help_record(ctx))]
            with formatter.section(title.removesuffix(":")):
                formatter.write_dl(records)


class Call:
    """One call of a command: what was given, by its name, and what commands do with it."""

    def __init__(self, given: dict[str, Any]):
        """`given`: the parsed parameters; `device` becomes what its four options say."""
        if "device_map" in given:
            given["device"] = placed(
                **{option.name or "": given.pop(option.name) for option in DEVICE}
            )
        self.given = given
        self.talk = Terminal(quiet=given.get("quiet", False) or Launch.of().rank > 0)
        self.say, self.progress = self.talk.say, self.talk.progress

    def __getattr__(self, name: str) -> Any:
        """What was given for the parameter `name`."""
        try:
            return vars(self)["given"][name]
        except KeyError:
            raise AttributeError(name) from None

    def prepare(self) -> None:
        """Before torch is loaded."""
        prepare(quiet=self.talk.quiet)

    def notes(self, lines: Iterable[str], kind: str = "Note") -> None:
        """A line on stderr for each."""
        for line in lines:
            self.say(f"{kind}: {line}")

    def read_facts(self, file: str, *, known: bool = False) -> FactFile:
        """The facts of `file` under the options of the command, its notices said."""
        from nulledit.data.readers import read_facts

        names = ("skip", "limit", "on_conflict", "skip_bad")
        given = {n: self.given[n] for n in names if n in self.given}
        found = read_facts(file, **given, known=known)
        self.notes(found.notices[:MOST_NOTICES])
        if (left := len(found.notices) - MOST_NOTICES) > 0:
            self.say(f"Note: {left} more: nulledit facts check {file} --json has all")
        return found

    def own_recipe(self, asked: str | None, model: str) -> Recipe:
        """The recipe that was asked for, or the one to use on the model."""
        from nulledit.config import read_recipe

        return read_recipe(asked or None, model)

    def chat_form(self, held: ChatSettings | None, *, asks: bool = False) -> ChatSettings | None:
        """A recipe's chat form, changed by the options of the command; None for plain text.

        `asks`: where one form is asked, a system prompt alone asks for the template, too.
        """
        chat = self.chat or (asks and held is not None and self.system is not None)
        forms = {name: self.given[name] for name in ("both", "plain") if name in self.given}
        return chat_settings(held, chat=chat, system=self.system, **forms)

    def load(self, name: str, **more: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """A model and its tokenizer, loaded as the options say; `more` goes before them."""
        from nulledit.models.load import load_model

        self.say(f"Loading {name}")
        names = ("device", "dtype", "quantize", "trust_remote_code")
        given = {n: self.given[n] for n in names if self.given.get(n) is not None}
        return load_model(model_source(name), **given | more)

    def editable(self, name: str, layout: Layout | None = None, **more: Any) -> EditableModel:
        """The same, to be run and asked."""
        self.prepare()
        from nulledit.models.editable_model import EditableModel

        return EditableModel(*self.load(name, **more), layout)

    def editor(self, name: str, **more: Any) -> Editor:
        """An editor of the model, as the options say; `more` goes before them."""
        from nulledit.api.editor import Editor

        self.say(f"Loading {name}")
        names = ("device", "dtype", "quantize", "trust_remote_code", "seed")
        given = {n: self.given[n] for n in names if self.given.get(n) is not None}
        given["statistics"] = self.given.get("stats")
        return Editor.from_pretrained(model_source(name), **given | more)

    def open(
        self,
        folder: str | Path | None = None,
        *,
        writing: bool = False,
        ranks: Ranks | None = None,
        talk: Talk | None = None,
    ) -> Run:
        """The run that was named; only to look at it, unless `writing`."""
        self.prepare()
        from nulledit.api.run import Run

        return Run.open(
            folder or self.run,
            device=own_device(ranks, self.device) if ranks else self.device,
            trust_remote_code=self.trust_remote_code,
            ranks=ranks,
            talk=talk or self.talk,
            writing=writing,
        )

    def show(self, data: Any, page: Shown | Callable[[], Shown]) -> None:
        """A result on stdout: as JSON where that was asked for, else as a document's parts."""
        if self.as_json:
            return emit(data() if callable(data) else data)
        parts = page() if callable(page) else page
        return echo(*parts) if isinstance(parts, list) else echo(parts)


def command(
    about: str, *parts: Part | str, group: click.Group | None = None
) -> Callable[[Callable[[Call], None]], click.Command]:
    """The function below as a command with these parameters, and with --json and --quiet.

    `about` is its line in a list of commands, its docstring the help. A text among `parts` is the
    title, in the help, of the options after it. `group`: that it belongs to.
    """
    sections: dict[str, list[click.Parameter]] = {}
    title = ""
    for part in parts:
        if isinstance(part, str):
            title = part
        else:
            sections.setdefault(title, []).extend(parameters([part]))

    def made(function: Callable[[Call], None]) -> click.Command:
        def called(**given: Any) -> None:
            function(Call(given))

        found = Sectioned(
            function.__name__,
            callback=called,
            params=[*parameters([*sections.values()]), JSON, QUIET],
            help=function.__doc__,
            short_help=about,
        )
        found.sections = sections
        if group is not None:
            group.add_command(found)
        return found

    return made
