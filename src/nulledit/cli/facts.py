"""`nulledit facts`: what is in a file of facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from nulledit.cli.common import conflict_option, emit, output_options, say

if TYPE_CHECKING:
    from nulledit.data.facts import Fact


@click.group(short_help="Check a file of facts.")
def facts() -> None:
    """Files of facts.

    A fact has a subject, a prompt with {} where the subject stands (or containing it once) and a
    target; an id, an old_answer, a relation, more_prompts, paraphrases and neighbours may be added.

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


@facts.command(short_help="Format, counts and notices of a file.")
@click.argument("file", metavar="FILE")
@conflict_option
@output_options
def check(
    file: str, on_conflict: Literal["error", "first", "last"], as_json: bool, quiet: bool
) -> None:
    """Read FILE as `nulledit edit` would, and say what is in it. Exit code 2 if it is bad.

    YAML, JSON, JSON lines or CSV of nulledit's own records, CounterFact's, EasyEdit's or zsRE's,
    told apart by content. Repeated records are dropped with a notice; contradictions are refused
    unless --on-conflict decides.

    \b
    $ nulledit facts check facts.yaml
    """
    from nulledit.data.readers import read_facts
    from nulledit.report.tables import as_text

    found = read_facts(file, on_conflict=on_conflict)
    counts = count(found.facts)
    if as_json:
        emit({"file": file, "format": found.format, **counts, "notices": found.notices})
        return
    for notice in found.notices:
        say(f"Note: {notice}", quiet=quiet)
    rows: list[Sequence[str]] = [["format", found.format]]
    rows += [[name.replace("_", " "), str(n)] for name, n in counts.items()]
    click.echo(as_text(([file, ""], rows)))


def count(found: Sequence[Fact]) -> dict[str, Any]:
    """How many facts have what."""
    return {
        "facts": len(found),
        "with_old_answer": sum(f.old_answer is not None for f in found),
        "with_paraphrases": sum(bool(f.paraphrases) for f in found),
        "with_neighbours": sum(any(p.answer for p in f.neighbours) for f in found),
        "with_more_prompts": sum(bool(f.more_prompts) for f in found),
        "subjects": len({f.subject for f in found}),
        "relations": len({f.relation_key for f in found}),
    }
