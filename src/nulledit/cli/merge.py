"""`nulledit merge`: two runs on one base become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.common import Bars, echo, emit, prepare, say
from nulledit.cli.options import device_option, output_options, trust_option
from nulledit.errors import CheckFailed, ConfigError
from nulledit.io.untrusted import MAX_SETTINGS, parse_yaml, read_text

if TYPE_CHECKING:
    from nulledit.editing.merge import Conflict


@click.command(short_help="Two runs on one base become one.")
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@click.option("--out", metavar="RUN", required=True, help="Folder to make for both.")
@click.option(
    "--prefer",
    type=click.Choice(["first", "second", "newest"]),
    help="Whose answer counts where both answer one question.",
)
@click.option(
    "--decide",
    metavar="FILE",
    help="YAML: a fact's id, and first, second or neither; goes before --prefer.",
)
@device_option
@trust_option
@output_options
def merge(
    first: str,
    second: str,
    out: str,
    prefer: str | None,
    decide: str | None,
    device: Any,
    trust_remote_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a third run of two: the first's facts, then the second's on top.

    Keys and residuals are taken again, stored values stay; facts that share a key are optimised
    together. Where both answer one question differently, the conflicts are listed (exit code 1)
    until --prefer or --decide says whose answer counts. The two runs stay as they are.

    \b
    $ nulledit merge run other --out both
    $ nulledit merge run other --out both --prefer newest
    """
    choices = _read_choices(decide) if decide else {}
    prepare(quiet=quiet)
    from nulledit.cli.change import change_dict, change_text
    from nulledit.cli.going_on import keep
    from nulledit.cli.loading import load_run
    from nulledit.editing.merge import conflicts, newest
    from nulledit.ledger.store import Store
    from nulledit.report.tables import as_text
    from nulledit.runs.pages import check_fresh

    check_fresh(Path(out))
    mine, theirs = (Store(Path(run) / "ledger").load() for run in (first, second))
    found = conflicts(mine, theirs)
    if decide:
        _check_choices(decide, choices, found)

    def choose(conflict: Conflict) -> str:
        said = choices.get(conflict.first.id) or choices.get(conflict.second.id, "")
        if said or prefer is None:
            return said
        return newest(mine, theirs)(conflict) if prefer == "newest" else prefer

    choice = {c: choose(c) for c in found}
    rows: list[Sequence[str]] = [
        [*_sides(conflict), choice[conflict] or "not decided"] for conflict in found
    ]
    if rows and (not as_json or not all(choice.values())):
        table = as_text((["question", "first", "second", "counts"], rows), left=4, most=48)
        if not all(choice.values()):
            if as_json:
                emit({"conflicts": [_plain(c, said) for c, said in choice.items()]})
            else:
                echo(table)
            open_ = sum(not said for said in choice.values())
            raise CheckFailed(
                f"{open_} of {len(found)} conflicts are not decided: give --prefer or --decide FILE"
            )
        echo(table + "\n")
    editor = load_run(first, device, quiet=quiet, trust_remote_code=trust_remote_code)
    editor.detach()  # in memory until all of it is there: nothing is left of half a merge
    with Bars(quiet=quiet) as bars:
        report = editor.merge(theirs, decide=choose, progress=bars)
    editor.attach(out)
    keep(editor, Path(out))
    for notice in report.notices:
        say(f"Note: {notice}", quiet=quiet)
    if as_json:
        listed = [_plain(c, said) for c, said in choice.items()]
        emit({"run": out, "conflicts": listed, **change_dict(editor, report)})
    else:
        echo(f"{change_text(editor, report)}\nModel:  {Path(out) / 'model'}")


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


def _sides(conflict: Conflict) -> tuple[str, str, str]:
    from nulledit.runs.history import answer_of

    one, two = conflict.first, conflict.second
    return (
        one.render(one.prompt),
        f"{answer_of(one)} ({one.id})",
        f"{answer_of(two)} ({two.id})",
    )


def _plain(conflict: Conflict, said: str) -> dict[str, Any]:
    return {
        "first": conflict.first.to_dict(),
        "second": conflict.second.to_dict(),
        "decided": said or None,
    }
