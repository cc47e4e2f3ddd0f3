"""`nulledit merge`: two runs on one base become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import PLACED, arg, opt
from nulledit.errors import CheckFailed, ConfigError
from nulledit.io.untrusted import MAX_SETTINGS, parse_yaml, read_text

if TYPE_CHECKING:
    from nulledit.editing.merge import Conflict
    from nulledit.report.document import StudyTable


@command(
    "Two runs on one base become one.",
    arg("first", "RUN"),
    arg("second", "RUN"),
    opt("--out RUN", "Folder to make for both.", required=True),
    opt(
        "--prefer",
        "Whose answer counts where both answer one question.",
        ("first", "second", "newest"),
    ),
    opt("--decide FILE", "YAML: a fact's id, and first, second or neither; goes before --prefer."),
    PLACED,
)
def merge(call: Call) -> None:
    """Make a third run of two: the first's facts, then the second's on top.

    Keys and residuals are taken again, stored values stay; facts that share a key are optimised
    together. Where both answer one question differently, the conflicts are listed (exit code 1)
    until --prefer or --decide says whose answer counts. The two runs stay as they are.

    \b
    $ nulledit merge run other --out both
    $ nulledit merge run other --out both --prefer newest
    """
    choices = _read_choices(call.decide) if call.decide else {}
    call.prepare()
    from nulledit.api.run import Run
    from nulledit.cli.change import change_dict, change_text
    from nulledit.cli.going_on import followed
    from nulledit.editing.merge import conflicts, newest
    from nulledit.ledger.store import Store

    Run.check_fresh(call.out)
    mine, theirs = (Store(Path(run) / "ledger").load() for run in (call.first, call.second))
    found = conflicts(mine, theirs)
    if call.decide:
        _check_choices(call.decide, choices, found)

    def choose(conflict: Conflict) -> str:
        said = choices.get(conflict.first.id) or choices.get(conflict.second.id, "")
        if said or call.prefer is None:
            return said
        return newest(mine, theirs)(conflict) if call.prefer == "newest" else str(call.prefer)

    choice = {conflict: choose(conflict) for conflict in found}
    listed = [_plain(conflict, said) for conflict, said in choice.items()]
    if not all(choice.values()):
        call.show({"conflicts": listed}, lambda: _table(choice))
        open_ = sum(not said for said in choice.values())
        raise CheckFailed(
            f"{open_} of {len(found)} conflicts are not decided: give --prefer or --decide FILE"
        )
    run = call.open(call.first)
    with followed(run):
        report = run.merge(theirs, call.out, decide=choose)
    call.notes(report.notices)
    call.show(
        lambda: {"run": call.out, "conflicts": listed, **change_dict(run.editor, report)},
        lambda: [
            *([_table(choice)] if choice else []),
            f"{change_text(run.editor, report)}\nModel:  {Path(call.out) / 'model'}",
        ],
    )


def _read_choices(file: str) -> dict[str, str]:
    """Fact id -> first, second or neither; ConfigError for anything else."""
    text = read_text(Path(file), most=MAX_SETTINGS, error=ConfigError, what="file of choices")
    data = parse_yaml(text, source=file, error=ConfigError)
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: expected a line for each conflict, a fact's id and a choice")
    return {str(name): str(said) for name, said in data.items()}


def _check_choices(file: str, choices: Mapping[str, str], found: Sequence[Conflict]) -> None:
    """ConfigError for a choice that would decide nothing, or two things."""
    from nulledit.data.facts import quote, suggest
    from nulledit.editing.merge import decided

    known = [fact.id for conflict in found for fact in (conflict.first, conflict.second)]
    for name in choices:
        if name not in known:
            raise ConfigError(
                f"{file}: {quote(name)} is in no conflict{suggest(name, known)}; expected ids that "
                "the two runs answer differently"
            )
    for conflict in found:
        said = {choices[f.id] for f in (conflict.first, conflict.second) if f.id in choices}
        if len(said) > 1:
            raise ConfigError(f"{file}: {conflict} is decided twice, as {' and '.join(said)}")
        if said:
            decided([conflict], {conflict.first.id: said.pop()})  # refuses a word that is no choice


def _table(choice: Mapping[Conflict, str]) -> StudyTable:
    from nulledit.report.document import StudyTable
    from nulledit.runs.history import answer_of

    rows: list[Sequence[str]] = [
        [
            c.first.render(c.first.prompt),
            *(f"{answer_of(fact)} ({fact.id})" for fact in (c.first, c.second)),
            said or "not decided",
        ]
        for c, said in choice.items()
    ]
    return StudyTable.of("conflicts", "", ["question", "first", "second", "counts"], rows)


def _plain(conflict: Conflict, said: str) -> dict[str, Any]:
    return {
        "first": conflict.first.to_dict(),
        "second": conflict.second.to_dict(),
        "decided": said or None,
    }
