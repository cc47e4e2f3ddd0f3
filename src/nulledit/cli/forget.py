"""`nulledit forget`: suppress answers in a run's model, with nothing in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import click

from nulledit.cli.common import Bars, echo, emit, facts_of, prepare, say
from nulledit.cli.options import (
    PLACING,
    Sectioned,
    device_option,
    facts_options,
    output_options,
    skip_option,
    trust_option,
)
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.data.facts import Fact
    from nulledit.editing.editor import Editor
    from nulledit.evaluation.forgetting import Recall
    from nulledit.report.tables import Table


class _Forget(Sectioned):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "One fact": ("subject", "prompt", "target"),
        "Facts of a file": ("old_answers", "skip", "limit", "on_conflict", "skip_bad"),
        "Model": ("device", *PLACING, "trust_remote_code"),
    }


@click.command(cls=_Forget, short_help="Suppress answers, with nothing in their place.")
@click.argument("run", metavar="RUN")
@click.argument("facts", metavar="[FACTS]", required=False)
@click.option("--subject", metavar="TEXT", help="What the fact is about.")
@click.option("--prompt", metavar="TEXT", help="Text that the answer follows, with the subject.")
@click.option(
    "--target", metavar="TEXT", help="The answer to forget.  [default: the edit's, or the base's]"
)
@click.option("--old-answers", is_flag=True, help="Forget each fact's old_answer, not its target.")
@facts_options
@skip_option
@click.option(
    "--tokens",
    metavar="N",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="Length of the texts in which the answer is looked for.",
)
@device_option
@trust_option
@output_options
def forget(run: str, facts: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Have the model of a run answer as if it did not know the subject.

    Either FACTS, a file as for `edit` whose targets are the answers to forget, or one fact by
    --subject and --prompt; its answer is then what an edit wrote, else what the base says. What is
    to be forgotten is shown before anything is written.

    It is an edit like any other: in the ledger, undone by `undo`, replaced when the same question
    is edited, and in the place of an earlier edit of it.

    A leak is the answer in what the model then says by itself, behind the fact's prompt or its
    paraphrases. docs/forget.md says what to expect: other wordings of a question often still find
    the answer. It is no protection of data.

    \b
    $ nulledit forget run --subject France --prompt "The capital of France is the city of"
    $ nulledit forget run facts.yaml --old-answers
    """
    _check(facts, given)
    chosen = _read(facts, given, quiet=quiet) if facts else []
    prepare(quiet=quiet)
    from pathlib import Path

    from nulledit.cli.going_on import keep
    from nulledit.cli.loading import load_run
    from nulledit.evaluation.forgetting import doubts, recall_of, summary
    from nulledit.report.tables import as_text
    from nulledit.runs.measure import check_lengths

    editor = load_run(
        run, given["device"], quiet=quiet, trust_remote_code=given["trust_remote_code"]
    )
    asked, whence = (chosen, f"as {facts} says") if facts else _one(editor, given)
    check_lengths(editor, asked)
    say(f"To be forgotten: {_named(asked)}, {whence}", quiet=quiet)
    with Bars(quiet=quiet, prefix="before: ") as bars:
        before = recall_of(editor.editable, asked, tokens=given["tokens"], progress=_texts(bars))
    with editor.writing(), Bars(quiet=quiet) as bars:
        report = editor.forget(asked, progress=bars)
        keep(editor, Path(run))
    for notice in report.notices:
        say(f"Note: {notice}", quiet=quiet)
    with Bars(quiet=quiet, prefix="after: ") as bars:
        tokens = given["tokens"]
        after = recall_of(
            editor.editable, asked, tokens=tokens, before=before, progress=_texts(bars)
        )
    warnings = doubts(after)
    for warning in warnings:
        say(f"Warning: {warning}", quiet=quiet)
    sides = {"before": before, "after": after}
    if as_json:
        from dataclasses import asdict

        plain = {s: {"summary": summary(r), "facts": [*map(asdict, r)]} for s, r in sides.items()}
        emit({"run_folder": run, **plain, "notices": [*report.notices, *warnings]})
        return
    echo(as_text(_answers(before, after), left=4, most=44))
    echo("\n" + as_text(_rates({side: summary(r) for side, r in sides.items()})))


def _check(facts: str | None, given: Mapping[str, Any]) -> None:
    """One fact or a file of them, and the options of that one."""
    of_one = [f"--{name}" for name in ("subject", "prompt", "target") if given[name] is not None]
    if facts:
        if of_one:
            raise ConfigError(f"{', '.join(of_one)} can't be given with FACTS ({facts})")
        return
    if given["subject"] is None or given["prompt"] is None:
        raise ConfigError("give FACTS, or --subject and --prompt of one fact")
    of_file = {"--old-answers": "old_answers", "--skip": "skip", "--limit": "limit"}
    if named := [flag for flag, name in of_file.items() if given[name]]:
        raise ConfigError(f"{', '.join(named)} can't be given without FACTS")


def _read(file: str, given: Mapping[str, Any], *, quiet: bool) -> list[Fact]:
    """The facts of `file`, to be forgotten."""
    from nulledit.data.facts import quote
    from nulledit.errors import FactError

    read = facts_of(file, given, quiet=quiet)
    for fact in read.facts:
        if given["old_answers"] and fact.old_answer is None:
            raise FactError(f"{file}: fact {quote(fact.id)} has no old_answer to forget")
    return [f.forgotten(f.old_answer if given["old_answers"] else None) for f in read.facts]


def _one(editor: Editor, given: Mapping[str, Any]) -> tuple[list[Fact], str]:
    """The fact of the options, as the one in the model that asks the same if there is one.

    And where its answer comes from: if none was given, from the edit that is in the model, else
    from what the base says. What was forgotten already stays so.
    """
    from nulledit.data.facts import Fact
    from nulledit.evaluation.forgetting import find_answer

    target = given["target"]
    asked = Fact(given["subject"], given["prompt"], target or "?")
    same = (f for f in editor.facts if f.subject == asked.subject and asked.prompt in f.prompts)
    held = next(same, None)
    if target is not None:
        return [(held or asked).forgotten(target)], "as --target says"
    if held and held.forget:
        return [held], f"which {held.id} suppresses already"
    if held:
        return [held.forgotten()], f"which the edit {held.id} wrote"
    with editor.base_weights():
        target = find_answer(editor.editable, asked.subject, asked.prompt)
    return [asked.forgotten(target)], f"which the base says to {asked.render(asked.prompt)!r}"


def _named(facts: Sequence[Fact]) -> str:
    """The answers, the first of many."""
    from nulledit.editing.session import some

    return some(f'"{fact.target}"' for fact in facts)


def _texts(bars: Bars) -> Any:
    return lambda done, total: bars("texts", done, total)


def _answers(before: Sequence[Recall], after: Sequence[Recall]) -> Table:
    """What was said of each fact, and what is."""
    rows: list[Sequence[str]] = [
        [
            old.own.prompt,
            old.answer,
            old.own.says,
            new.own.says,
            f"{old.token}: {old.own.chance:.3f} → {new.own.chance:.3f}",
            "yes" if new.own.leaks else "no",
            _leaks(old, new),
        ]
        for old, new in zip(before, after, strict=True)
    ]
    head = ["prompt", "old answer", "said", "says", "p(telling token)", "leaks", "in paraphrases"]
    return head, rows


def _leaks(old: Recall, new: Recall) -> str:
    """How many paraphrases leak, before and after."""
    if not new.paraphrases:
        return "absent"
    count = [sum(said.leaks for said in recall.paraphrases) for recall in (old, new)]
    return f"{count[0]} → {count[1]} of {len(new.paraphrases)}"


def _rates(sides: Mapping[str, Mapping[str, Any]]) -> Table:
    """Rates over facts, before and after."""
    from nulledit.report.tables import number, percent

    labels = {"leaks": "answer leaks (%)", "leaks_in_paraphrases": "in paraphrases (%)"}
    rows: list[Sequence[str]] = [
        [label, *(percent(side[name]) for side in sides.values())] for name, label in labels.items()
    ]
    for name, label in {"chance": "p(telling token)", "entropy": "entropy of texts (bits)"}.items():
        rates = [side[name] for side in sides.values()]
        rows.append([label, *(number(rate["mean"] if rate else None) for rate in rates)])
    return ["", *sides], rows
