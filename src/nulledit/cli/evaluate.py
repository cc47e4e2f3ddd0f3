"""`nulledit evaluate`: the rates of a run, base and edited model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import CHAT, FACTS, PLACED, RUN, Opt, given_options, least, opt
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.runs.evaluated import Evaluated


@command(
    "Rates, perplexity and KL, base and edited.",
    RUN,
    opt("--facts FILE", "Ask about these.  [default: the facts in RUN]"),
    FACTS,
    opt(
        "--text FILE",
        "Text for perplexity, KL and preservation.  [default: one that comes with nulledit]",
    ),
    Opt(["--base/--no-base"], default=True, show_default=True, help="The base model, too."),
    opt("--distract", "Ask again after distracting text.", bool),
    opt("--fluency", "Let it write longer texts; n-gram entropy.", bool),
    opt("--references FILE", "Texts by fact, for consistency (JSON)."),
    CHAT,
    opt("--by-relation", "Rates by relation, groups of ten or more.", bool),
    opt("--capability DIR", "Six tasks: sst2.jsonl and so on."),
    opt("--items N", "Of each task.", least(1), 50),
    opt("--prompts FILE", "Drift of hidden states on these."),
    opt("--harness TASKS", "lm-evaluation-harness tasks, with commas."),
    PLACED,
)
def evaluate(call: Call) -> None:
    """Compare the edited model of a run with its base. Nothing in RUN is changed.

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
    if not call.capability and any(option.name == "items" for option in given_options()):
        raise ConfigError("--items belongs to --capability DIR")
    chosen = call.read_facts(call.facts).facts if call.facts else None
    call.prepare()
    from nulledit.cli.evaluation_tables import read_references
    from nulledit.evaluation.tasks import read_tasks

    references = read_references(call.references)
    items = read_tasks(call.capability, limit=call.items) if call.capability else []
    run = call.open()
    found = run.evaluate(
        run.editor.facts[: call.limit] if chosen is None else chosen,
        text=call.text,
        base=call.base,
        chat=call.chat_form(run.editor.recipe.chat, asks=True),
        distract=call.distract,
        fluency=call.fluency,
        references=references,
        items=items,
        prompts=call.prompts,
        harness=[task.strip() for task in call.harness.split(",")] if call.harness else (),
    )
    call.show(
        lambda: {"run_folder": call.run, **found.to_dict(relations=call.by_relation)},
        lambda: _page(found, relations=call.by_relation),
    )


def _page(found: Evaluated, *, relations: bool) -> list[Any]:
    from nulledit.cli import evaluation_tables as tables
    from nulledit.runs.tables import rates_tables

    parts: list[Any] = [*rates_tables({s: e.summary() for s, e in found.sides.items()})]
    if found.preservation:
        errors = ", ".join(
            f"{p.error:.3g} ± {p.standard_error:.1g} (layer {p.layer})" for p in found.preservation
        )
        parts.append(f"‖ΔK₀‖/‖W₀K₀‖: {errors}\nPerplexity, KL and ‖ΔK₀‖ are on {found.text}.")
    for name, rates in found.others.items():
        parts += rates_tables(rates, which=f". Asked {name}")
    if relations:
        parts.append(tables.relations_table(found.facts, found.after))
    if found.tasks:
        parts.append(tables.capability_table(found.tasks))
    if found.drift:
        parts.append(tables.drift_table(found.drift))
    if found.harness:
        parts.append(tables.harness_table(found.harness))
    return parts
