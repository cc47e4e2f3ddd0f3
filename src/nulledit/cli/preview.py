"""`nulledit preview`: what a change would do, written nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.common import echo, emit, facts_of, prepare, say
from nulledit.cli.options import device_option, facts_options, output_options, trust_option
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.api.editor import Editor
    from nulledit.data.facts import Fact
    from nulledit.editing.weights import LayerReport
    from nulledit.evaluation.runner import Evaluation
    from nulledit.report.tables import Table


@click.command(short_help="What an edit or an undo would change; writes nothing.")
@click.argument("run", metavar="RUN|MODEL")
@click.argument("facts", metavar="[FACTS]", required=False)
@click.option(
    "--undo", "undone", multiple=True, metavar="ID", help="Take this fact out; repeatable."
)
@click.option(
    "--text", metavar="FILE", help="For perplexity and KL.  [default: one that comes along]"
)
@facts_options
@device_option
@trust_option
@output_options
def preview(
    run: str,
    facts: str | None,
    undone: tuple[str, ...],
    text: str | None,
    **given: Any,
) -> None:
    """Edit RUN in memory and show what would change: the facts, their neighbours, facts that are in
    the model already, perplexity, KL from the base and norms. Nothing is written.

    A model's name in the place of RUN previews the first edit of a run, with the model's recipe.

    \b
    $ nulledit preview run more.yaml
    $ nulledit preview run --undo capital-of-france
    """
    if not facts and not undone:
        raise ConfigError("give FACTS to edit, or --undo ID")
    found = facts_of(facts, given, quiet=given["quiet"]) if facts else None
    prepare(quiet=given["quiet"])
    from nulledit.cli.runs import Terminal
    from nulledit.runs.preview import preview as look
    from nulledit.runs.tables import rates_tables

    quiet = given["quiet"]
    editor = _editor(run, given)
    done = look(editor, found.facts if found else (), undone, text=text, talk=Terminal(quiet=quiet))
    for notice in done.notices:
        say(f"Note: {notice}", quiet=quiet)
    if given["as_json"]:
        return emit({"run": run, **done.to_dict()})
    before, after = done.asked.before, done.asked.after
    held = done.held
    return echo(
        _answers(done.facts, before or after, after),
        *rates_tables(done.asked.summary()),
        f"The last {len(held.after.rows())} facts in the model:" if held else "",
        *(rates_tables(held.summary(), absent=False) if held else ()),
        _norms(done.before, done.after),
        f"Perplexity and KL are on {done.asked.text}. Nothing was written.",
    )


def _editor(run: str, given: dict[str, Any]) -> Editor:
    from nulledit.api.editor import Editor
    from nulledit.cli.loading import load_run

    trust, quiet = given["trust_remote_code"], given["quiet"]
    if (Path(run) / "ledger").is_dir() or (
        Path(run).is_dir() and not (Path(run) / "config.json").is_file()
    ):
        return load_run(run, given["device"], quiet=quiet, trust_remote_code=trust)
    say(f"Loading {run}", quiet=quiet)
    return Editor.from_pretrained(run, device=given["device"], trust_remote_code=trust)


def _answers(facts: Sequence[Fact], before: Evaluation, after: Evaluation) -> Table:
    from nulledit.runs.history import answer_of

    rows: list[Sequence[str]] = [
        [
            f.render(f.prompt),
            answer_of(f),
            before.answers.get(f.id, ""),
            after.answers.get(f.id, ""),
        ]
        for f in facts
    ]
    return ["prompt", "target", "before", "after"], rows


def _norms(before: Sequence[LayerReport], after: Sequence[LayerReport]) -> Table:
    from nulledit.report.tables import number

    then = {r.layer: r for r in before}
    rows: list[Sequence[str]] = []
    for now in after:
        old = then.get(now.layer)
        rows.append(
            [
                str(now.layer),
                number(old.update_share if old else 0.0),
                number(now.update_share),
                number(100 * (old.room if old else 1.0)),
                number(100 * now.room),
            ]
        )
    return ["layer", "‖Δ‖/‖W₀‖ before", "after", "room left before (%)", "after (%)"], rows
