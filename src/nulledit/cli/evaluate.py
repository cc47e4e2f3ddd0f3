"""`nulledit evaluate`: the rates of a run, base and edited model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import click

from nulledit.cli.common import echo, emit, facts_of, prepare, say
from nulledit.cli.options import (
    chat_options,
    chat_settings,
    device_option,
    facts_options,
    output_options,
    trust_option,
)


@click.command(short_help="Rates, perplexity and KL of a run, base and edited.")
@click.argument("run", metavar="RUN")
@click.option("--facts", metavar="FILE", help="Ask about these.  [default: the facts in RUN]")
@facts_options
@click.option(
    "--text",
    metavar="FILE",
    help="Text for perplexity, KL and preservation.  [default: one that comes with nulledit]",
)
@click.option("--base/--no-base", default=True, show_default=True, help="The base model, too.")
@click.option("--distract", is_flag=True, help="Ask again behind distracting text.")
@click.option("--fluency", is_flag=True, help="Let it write longer texts; n-gram entropy.")
@click.option("--references", metavar="FILE", help="Texts by fact, for consistency (JSON).")
@chat_options
@click.option("--by-relation", is_flag=True, help="Rates by relation, groups of ten or more.")
@click.option("--capability", metavar="DIR", help="Six tasks: sst2.jsonl and so on.")
@click.option("--items", metavar="N", type=click.IntRange(1), default=50, help="Of each task.")
@click.option("--prompts", metavar="FILE", help="Drift of hidden states on these.")
@click.option("--harness", metavar="TASKS", help="lm-evaluation-harness tasks, with commas.")
@device_option
@trust_option
@output_options
def evaluate(run: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Evaluate the edited model of a run beside its base. Nothing in RUN is changed.

    Efficacy asks the fact's prompt, generalization its paraphrases, specificity its neighbours:
    each by preference (the answer is likelier than the other one) and strictly (every token of the
    answer is the likeliest). What the facts lack is absent. docs/protocols.md and
    docs/capability.md say what each measure means.

    Facts are asked as they were edited. Where that is in the chat template, they are asked again
    without a system prompt (or with one), and as plain text. --chat asks the facts of any run in
    the template, too.

    \b
    $ nulledit evaluate run
    $ nulledit evaluate run --facts others.yaml --text wiki.txt --json
    $ nulledit evaluate run --distract --capability tasks --prompts known_1000.json
    """
    chosen = None
    if given["facts"]:
        chosen = list(facts_of(given["facts"], given, quiet=quiet).facts)
    prepare(quiet=quiet)
    from nulledit.cli import evaluation_tables as rest
    from nulledit.cli.loading import load_run
    from nulledit.cli.runs import Terminal
    from nulledit.evaluation.forms import form_name, forms
    from nulledit.evaluation.tasks import read_tasks
    from nulledit.io.text import count
    from nulledit.runs.measure import check_lengths, evaluate_both, in_other_forms, read_text
    from nulledit.runs.tables import rates_tables

    references = rest.read_references(given["references"])
    items = read_tasks(given["capability"], limit=given["items"]) if given["capability"] else []
    editor = load_run(
        run, given["device"], quiet=quiet, trust_remote_code=given["trust_remote_code"]
    )
    facts = editor.facts[: given["limit"]] if chosen is None else chosen
    text = read_text(editor, given["text"])
    check_lengths(editor, facts)
    say(f"Evaluating {count(len(facts), 'fact')}, perplexity on {text.name}", quiet=quiet)
    asked = forms(editor.editable, also=chat_settings(given, editor.recipe.chat))
    both = evaluate_both(
        editor,
        facts,
        text,
        Terminal(quiet=quiet),
        base=given["base"],
        distract=given["distract"],
        fluency=given["fluency"],
        references=references,
    )
    sides: dict[str, Any] = {"base": both.before} if both.before else {}
    sides["edited"] = both.after
    tasks: dict[str, Any] = {}
    harness: dict[str, Any] = {}
    for side in sides if items or given["harness"] else ():
        with editor.base_weights() if side == "base" else nullcontext():
            if items:
                tasks[side] = rest.tasks_of(editor, items)
            if given["harness"]:
                harness[side] = rest.harness_of(editor, given["harness"])
    others = in_other_forms(editor, facts, asked, Terminal(quiet=quiet), base=given["base"])
    kept = both.preservation
    drift = rest.drift_of(editor, given["prompts"], facts) if given["prompts"] else None
    if as_json:
        emit(
            {
                "run_folder": run,
                "facts": len(facts),
                "text": text.name,
                "asked": form_name(editor.editable.encoder),
                "others": others,
                **{side: evaluation.summary() for side, evaluation in sides.items()},
                "preservation": [asdict(p) for p in kept],
                "capability": {s: {k: t.summary() for k, t in r.items()} for s, r in tasks.items()},
                "drift": drift.to_dict() if drift else None,
                "harness": harness,
                "relations": rest.relations_of(facts, sides["edited"])
                if given["by_relation"]
                else None,
                "results": {side: evaluation.rows() for side, evaluation in sides.items()},
            }
        )
        return
    parts: list[Any] = [*rates_tables({s: e.summary() for s, e in sides.items()})]
    if kept:
        errors = ", ".join(
            f"{p.error:.3g} ± {p.standard_error:.1g} (layer {p.layer})" for p in kept
        )
        parts.append(f"‖ΔK₀‖/‖W₀K₀‖: {errors}\nPerplexity, KL and ‖ΔK₀‖ are on {text.name}.")
    parts += [t for name, s in others.items() for t in rates_tables(s, which=f". Asked {name}")]
    if given["by_relation"]:
        parts.append(rest.relations_table(facts, sides["edited"]))
    if tasks:
        parts.append(rest.capability_table(tasks))
    if drift:
        parts.append(rest.drift_table(drift))
    if harness:
        parts.append(rest.harness_table(harness))
    echo(*parts)
