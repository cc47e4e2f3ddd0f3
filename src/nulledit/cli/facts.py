"""`nulledit facts`: what is in a file of facts, what a model makes of it, and a file to begin."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.command import Call, command
from nulledit.cli.common import echo, emit
from nulledit.cli.options import CHAT, FACTS, MODEL, arg, given_options, opt, parameters
from nulledit.errors import BadRecordsError, ConfigError

if TYPE_CHECKING:
    from nulledit.data.facts import Fact
    from nulledit.evaluation.outlook import Outlook
    from nulledit.report.document import Part

MOST_FACTS = 50  # in the table of what a model says


@click.group(short_help="Check a file of facts, or begin one.")
def facts() -> None:
    """Files of facts.

    A fact has a subject, a prompt with {} where the subject stands (or containing it once) and a
    target; an id, an old_answer, a relation, target_aliases, more_prompts, paraphrases,
    neighbours, other_relations and portability may be added.

    \b
    $ nulledit facts check facts.yaml

    \b
    facts:
      - subject: France
        prompt: The capital of {} is
        target: Madrid
        old_answer: Paris
        paraphrases: ["If you visit the capital of France, you are in"]
        neighbours:
          - {prompt: The capital of Austria is, answer: Vienna}
    """


@command(
    "Format, counts, errors and notices of a file.",
    arg("file", "FILE"),
    "Facts:",
    FACTS,
    "Model:",
    opt("--model MODEL", "Say what this model makes of the facts, too."),
    CHAT,
    MODEL,
    group=facts,
)
def check(call: Call) -> None:
    """Read FILE as `nulledit edit` would, and say what is in it. Exit code 2 if it is bad.

    YAML, JSON, JSON lines or CSV of nulledit's own records, or of another project's
    (docs/facts.md), told apart by content. Every error is reported with its line and id; --skip-bad
    leaves bad records out. Repeated records are dropped with a notice; contradictions are refused
    unless --on-conflict decides.

    With --model: how many tokens each target has, what the model says to each prompt by itself,
    old answers that are not what it says, targets that begin with a lone space piece, and facts
    that will share a key (one subject, and the same text up to its end).

    \b
    $ nulledit facts check facts.yaml
    $ nulledit facts check facts.yaml --model smollm2-135m
    """
    of_model = parameters((CHAT, MODEL))
    alone = [option.flag for option in given_options() if option in of_model]
    if alone and call.model is None:
        raise ConfigError(f"{', '.join(alone)} can't be given without --model")
    call.talk.quiet |= call.as_json
    try:
        found = call.read_facts(call.file)
        seen = _look(call, found.facts) if call.model is not None else ()
    except BadRecordsError as error:
        if call.as_json:
            emit({"file": call.file, "errors": error.problems})
        elif len(error.problems) > 1:
            echo("\n".join(error.problems))
        raise
    counts = found.counts
    told = {"file": call.file, "format": found.format, **counts}
    told |= {"bad": found.bad, "notices": found.notices}
    if call.model is not None:
        told["model"] = {"name": call.model, "facts": [_plain(item) for item in seen]}
    rows: list[Sequence[str]] = [["format", found.format]]
    rows += [[name.replace("_", " "), str(n)] for name, n in counts.items()]
    if found.bad:
        rows.append(["bad, left out", str(len(found.bad))])
    call.show(told, lambda: _page(call, rows, seen))


def _page(call: Call, rows: list[Sequence[str]], seen: Sequence[Outlook]) -> list[str | Part]:
    from nulledit.report.document import StudyTable
    from nulledit.runs.tables import outlook_table

    parts: list[str | Part] = [StudyTable.of("file", "", [call.file, ""], rows)]
    if seen:
        parts.append(outlook_table(seen[:MOST_FACTS]))
        if len(seen) > MOST_FACTS:
            parts.append(f"{len(seen) - MOST_FACTS} more facts: --json has all")
        parts.append(StudyTable.of("model", "", [call.model, "facts"], _summary(seen)))
    return parts


@facts.command(short_help="A commented file to begin with.")
@click.argument("file", metavar="[FILE]", default="facts.yaml")
def new(file: str) -> None:
    """Write a commented FILE (facts.yaml) of two facts, to put your own in their place.

    \b
    $ nulledit facts new mine.yaml
    """
    from nulledit.io.files import write_text

    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{file}: the template is YAML: give a name that ends in .yaml")
    if path.exists():
        raise ConfigError(f"{file}: is there already; choose another name")
    template = resources.files("nulledit") / "assets" / "facts" / "template.yaml"
    write_text(path, template.read_text(encoding="utf-8"))
    echo(f"Wrote {file}. Put your facts in it, then: nulledit facts check {quote(file)}")


def _look(call: Call, facts: Sequence[Fact]) -> Sequence[Outlook]:
    """What the model of the options makes of the facts."""
    form = call.chat_form(None)
    call.prepare()
    from nulledit.evaluation.outlook import outlook

    asked = call.editable(call.model).in_chat(form)
    with call.progress() as tell:
        return outlook(asked, facts, progress=lambda done, total: tell("answers", done, total))


def _plain(item: Outlook) -> dict[str, Any]:
    return {
        "id": item.fact.id,
        "target": item.fact.target,
        "target_tokens": item.tokens,
        "lone_space": item.lone_space,
        "says": item.says,
        "says_target": item.knows_target,
        "old_answer": item.fact.old_answer,
        "says_old_answer": item.says_old_answer,
        "shares_key": item.shares_key,
    }


def _summary(seen: Sequence[Outlook]) -> list[Sequence[str]]:
    tokens = sorted(item.tokens for item in seen)
    old = [item.says_old_answer for item in seen if item.says_old_answer is not None]
    return [
        ["tokens of a target, fewest to most", f"{tokens[0]} to {tokens[-1]}"],
        ["targets of one token", str(tokens.count(1))],
        ["targets that begin with a lone space piece", str(sum(s.lone_space for s in seen))],
        ["old answers that the model does not say", f"{old.count(False)} of {len(old)}"],
        ["targets that it says already", str(sum(item.knows_target for item in seen))],
        ["facts that share a key with another", str(sum(bool(s.shares_key) for s in seen))],
    ]
