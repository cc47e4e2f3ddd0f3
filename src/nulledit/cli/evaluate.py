"""`nulledit evaluate`: rates, perplexity and preservation of a run."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from nulledit.cli.common import (
    Bars,
    conflict_option,
    device_option,
    emit,
    output_options,
    prepare,
    say,
    trust_option,
)


@click.command(short_help="Rates and perplexity of a run, base and edited.")
@click.argument("run", metavar="RUN")
@click.option("--facts", metavar="FILE", help="Ask about these.  [default: the facts in RUN]")
@click.option("--limit", type=click.IntRange(1), help="Ask about so many.  [default: all]")
@conflict_option
@click.option(
    "--text",
    metavar="FILE",
    help="Text for perplexity and preservation.  [default: one that comes with nulledit]",
)
@click.option("--base/--no-base", default=True, show_default=True, help="The base model, too.")
@device_option
@trust_option
@output_options
def evaluate(run: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Evaluate the edited model of a run beside its base. Nothing in RUN is changed.

    Efficacy asks the fact's prompt, generalization its paraphrases, specificity its neighbours:
    each by preference (the answer is likelier than the other one) and strictly (every token of the
    answer is the likeliest). What the facts lack is absent.

    \b
    $ nulledit evaluate run
    $ nulledit evaluate run --facts others.yaml --text wiki.txt --json
    """
    from nulledit.data.readers import read_facts

    chosen = None
    if given["facts"]:
        read = {"limit": given["limit"], "on_conflict": given["on_conflict"]}
        chosen = list(read_facts(given["facts"], **read).facts)
    prepare(quiet=quiet)
    from nulledit.cli.measure import check_lengths, load_run, read_text
    from nulledit.evaluation.preservation import preservation_report
    from nulledit.evaluation.runner import evaluate as ask_all
    from nulledit.report.tables import as_text, rates_table
    from nulledit.report.text import count

    editor = load_run(
        run, given["device"], quiet=quiet, trust_remote_code=given["trust_remote_code"]
    )
    facts = editor.facts[: given["limit"]] if chosen is None else chosen
    text = read_text(editor, given["text"])
    check_lengths(editor, facts)
    say(f"Evaluating {count(len(facts), 'fact')}, perplexity on {text.name}", quiet=quiet)
    sides = {}
    if given["base"]:
        with Bars(quiet=quiet, prefix="base: ") as bars, editor.base_weights():
            sides["base"] = ask_all(editor, facts, windows=text.windows, progress=bars)
    with Bars(quiet=quiet, prefix="edited: ") as bars:
        sides["edited"] = ask_all(editor, facts, windows=text.windows, progress=bars)
    kept = preservation_report(editor, text.windows) if editor.history.epochs else []
    if as_json:
        emit(
            {
                "run_folder": run,
                "facts": len(facts),
                "text": text.name,
                **{side: evaluation.summary() for side, evaluation in sides.items()},
                "preservation": [asdict(p) for p in kept],
                "results": {side: evaluation.rows() for side, evaluation in sides.items()},
            }
        )
        return
    click.echo(as_text(rates_table({s: e.summary() for s, e in sides.items()})))
    if kept:
        errors = ", ".join(
            f"{p.error:.3g} ± {p.standard_error:.1g} (layer {p.layer})" for p in kept
        )
        click.echo(f"\n‖ΔK₀‖/‖W₀K₀‖: {errors}\nPerplexity and ‖ΔK₀‖ are on {text.name}.")
