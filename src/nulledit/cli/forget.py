"""`nulledit forget`: suppress answers in a run's model, with nothing in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import DEVICE, FACTS, RUN, SKIP, TRUST, arg, given_options, least, opt
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.data.facts import Fact
    from nulledit.evaluation.forgetting import Recall
    from nulledit.report.document import StudyTable


@command(
    "Suppress a fact, with nothing in its place.",
    RUN,
    arg("facts", "[FACTS]"),
    "One fact:",
    opt("--subject TEXT", "What the fact is about."),
    opt("--prompt TEXT", "Text that the answer follows, with the subject."),
    opt("--target TEXT", "The answer to forget.  [default: the edit's, or the base's]"),
    "Facts of a file:",
    opt("--old-answers", "Forget each fact's old_answer, not its target.", bool),
    SKIP,
    FACTS,
    "Model:",
    DEVICE,
    TRUST,
    opt("--tokens N", "Length of the texts in which the answer is looked for.", least(1), 20),
)
def forget(call: Call) -> None:
    """Have the model of a run answer as if it did not know the subject.

    Either FACTS, a file as for `edit` whose targets are the answers to forget, or one fact by
    --subject and --prompt; its answer is then what an edit wrote, else what the base says. What is
    to be forgotten is shown before anything is written.

    It is an edit like any other: in the ledger, undone by `undo`, replaced when the same question
    is edited, and in the place of an earlier edit of it.

    A leak is the answer in what the model then says by itself, after the fact's prompt or its
    paraphrases. docs/forget.md says what to expect: other wordings of a question often still find
    the answer. It is no protection of data.

    \b
    $ nulledit forget run --subject France --prompt "The capital of France is the city of"
    $ nulledit forget run facts.yaml --old-answers
    """
    _check(call)
    asked = _read(call) if call.facts else []
    call.prepare()
    from nulledit.cli.going_on import followed
    from nulledit.editing.session import some
    from nulledit.evaluation.forgetting import asked_to_forget, doubts, summary
    from nulledit.runs.measure import check_lengths

    run, whence = call.open(writing=True), f"as {call.facts} says"
    if not call.facts:
        fact, whence = asked_to_forget(run.editor, call.subject, call.prompt, call.target)
        asked = [fact]
    check_lengths(run.editor, asked)
    answers = some(f'"{fact.target}"' for fact in asked)
    call.say(f"To be forgotten: {answers}, {whence}")
    before = run.recall(asked, tokens=call.tokens)
    with followed(run):
        report = run.forget(asked)
    call.notes(report.notices)
    after = run.recall(asked, tokens=call.tokens, before=before)
    warnings = doubts(after)
    call.notes(warnings, "Warning")
    sides = {"before": before, "after": after}
    rates = {side: summary(recalls) for side, recalls in sides.items()}

    def data() -> dict[str, Any]:
        from dataclasses import asdict

        plain = {s: {"summary": rates[s], "facts": [*map(asdict, r)]} for s, r in sides.items()}
        return {"run_folder": call.run, **plain, "notices": [*report.notices, *warnings]}

    call.show(data, lambda: [_answers(before, after), _rates(rates)])


def _check(call: Call) -> None:
    """One fact or a file of them, and the options of that one."""
    given = {option.name: option.flag for option in given_options()}
    of_one = [given[name] for name in ("subject", "prompt", "target") if name in given]
    if call.facts:
        if of_one:
            raise ConfigError(f"{', '.join(of_one)} can't be given with FACTS ({call.facts})")
        return
    if call.subject is None or call.prompt is None:
        raise ConfigError("give FACTS, or --subject and --prompt of one fact")
    if named := [given[name] for name in ("old_answers", "skip", "limit") if name in given]:
        raise ConfigError(f"{', '.join(named)} can't be given without FACTS")


def _read(call: Call) -> list[Fact]:
    """The facts of the file, to be forgotten."""
    from nulledit.data.facts import quote
    from nulledit.errors import FactError

    found = call.read_facts(call.facts).facts
    for fact in found:
        if call.old_answers and fact.old_answer is None:
            raise FactError(f"{call.facts}: fact {quote(fact.id)} has no old_answer to forget")
    return [f.forgotten(f.old_answer if call.old_answers else None) for f in found]


def _answers(before: Sequence[Recall], after: Sequence[Recall]) -> StudyTable:
    """What was said of each fact, and what is."""
    from nulledit.report.document import StudyTable

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
    return StudyTable.of("answers", "", head, rows)


def _leaks(old: Recall, new: Recall) -> str:
    """How many paraphrases leak, before and after."""
    if not new.paraphrases:
        return "absent"
    count = [sum(said.leaks for said in recall.paraphrases) for recall in (old, new)]
    return f"{count[0]} → {count[1]} of {len(new.paraphrases)}"


def _rates(sides: Mapping[str, Mapping[str, Any]]) -> StudyTable:
    """Rates over facts, before and after."""
    from nulledit.report.document import StudyTable
    from nulledit.report.tables import number, percent

    labels = {"leaks": "answer leaks (%)", "leaks_in_paraphrases": "in paraphrases (%)"}
    rows: list[Sequence[str]] = [
        [label, *(percent(side[name]) for side in sides.values())] for name, label in labels.items()
    ]
    for name, label in {"chance": "p(telling token)", "entropy": "entropy of texts (bits)"}.items():
        rates = [side[name] for side in sides.values()]
        rows.append([label, *(number(rate["mean"] if rate else None) for rate in rates)])
    return StudyTable.of("rates", "", ["", *sides], rows)
