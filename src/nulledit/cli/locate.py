"""`nulledit locate`: layers that causal tracing suggests, or what a value costs in each block."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import FACTS, MODEL, SKIP, arg, given_options, least, opt, seed
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.data.facts import Fact
    from nulledit.report.document import Document

TRACE = (
    opt("--at-least N", "Refuse to read anything from fewer known facts.", least(2), 20),
    opt("--draws N", "Runs with noise of their own, for each fact.", least(1), 3),
    opt("--noise X", "Its size, in standard deviations of the subjects' embeddings.", float, 3.0),
    opt(
        "--window N",
        "Layers whose MLP outputs are put back together.  [default: a fifth of all]",
        least(1),
    ),
)
COST = (
    opt("--text SOURCE", "As for `nulledit stats make`; needed."),
    opt("--tokens N", "Tokens for second moments.", least(1), 30_000),
    opt("--windows N", "Windows of 256 tokens for gradients, after these.", least(2), 64),
    opt("--inputs", "Leave out keys, where the MLP is very wide: gated edits alone.", bool),
)


@command(
    "Which layers? Causal tracing of known facts, or what a value costs in each block.",
    arg("model", "MODEL"),
    arg("facts", "FACTS"),
    opt("--by", "How blocks are compared.", ("trace", "cost"), "trace"),
    opt("--out FOLDER", "Folder to make for what is found.", required=True),
    seed("Of the noise, or of contexts and sampled tokens."),
    "Facts:",
    FACTS,
    SKIP,
    "Trace:",
    TRACE,
    "Cost:",
    COST,
    "Model:",
    opt("--recipe FILE|NAME", "Whose layout; for costs, whose contexts and chat form, too."),
    MODEL,
)
def locate(call: Call) -> None:
    """Compare MODEL's blocks, and suggest which ones to edit.

    --by trace: noise on the subject makes the model lose the answer; then one hidden state, or the
    MLP outputs of a few layers, is put back at one token, and what comes back of the answer's
    probability tells what was carried there (ROME, arXiv:2202.05262). FACTS is a file as for
    `nulledit edit`, or ROME's known_1000. Traced are facts whose old answer (of one to forget, its
    target) the model says, and facts without an old answer, with whatever it says. The rest is
    left out, and so are prompts that end with their subject.

    --by cost: for each block, how much a value written at the facts' subjects disturbs other text,
    for methods that change W and for gated edits; and how well the block tells subjects apart.

    FOLDER gets a picture, the numbers, and a report with lines for a recipe. These are places to
    begin: where facts are found is not where editing works best (Hase et al., arXiv:2301.04213).
    See docs/locate.md.

    \b
    $ nulledit locate smollm2-135m facts.yaml --out trace
    $ nulledit locate gpt2-xl known_1000.json --limit 200 --draws 10 --out trace
    $ nulledit locate smollm2-135m facts.yaml --by cost --text wiki.txt --out costs
    """
    folder = Path(call.out)
    _check_out(folder)
    _check_options(call)
    read = call.read_facts(call.facts, known=True)
    find = _cost if call.by == "cost" else _trace
    data, document = find(call, folder, read.facts)
    call.show(data, lambda: [document, f"Report: {folder / 'report.md'}"])


def _trace(call: Call, folder: Path, facts: Sequence[Fact]) -> tuple[dict[str, Any], Document]:
    from nulledit.config import load_recipe

    layout = load_recipe(call.recipe).layout if call.recipe else None
    call.prepare()
    from nulledit.tracing import TraceSettings
    from nulledit.tracing import locate as trace_all
    from nulledit.tracing.report import location_document, summary_of, write_location

    settings = TraceSettings(
        draws=call.draws, noise=call.noise, window=call.window or 0, seed=call.seed
    )
    model = call.editable(call.model, layout)
    with call.progress() as tell:
        found = trace_all(
            model,
            facts,
            settings,
            least=call.at_least,
            progress=lambda done, total: tell("facts", done, total),
        )
    write_location(folder, found, call.model)
    return summary_of(found, call.model), location_document(found, call.model)


def _cost(call: Call, folder: Path, facts: Sequence[Fact]) -> tuple[dict[str, Any], Document]:
    from nulledit.data.corpus import find_files

    find_files(call.text)  # a wrong path needs no model
    recipe = call.own_recipe(call.recipe, call.model)
    call.prepare()
    from nulledit.tracing.cost_report import cost_document, cost_summary, write_costs
    from nulledit.tracing.costs import CostSettings, cost_of

    settings = CostSettings(
        windows=call.windows, tokens=call.tokens, keys=not call.inputs, seed=call.seed
    )
    model = call.editable(call.model, recipe.layout).in_chat(recipe.chat)
    with call.progress() as tell:
        found = cost_of(model, facts, call.text, recipe.contexts, settings, progress=tell)
    write_costs(folder, found, call.model)
    return cost_summary(found, call.model), cost_document(found, call.model)


def _check_options(call: Call) -> None:
    """ConfigError for options of the other way, and for costs without a text."""
    ways = {"trace": TRACE, "cost": COST}
    others = {option.name for way, options in ways.items() if way != call.by for option in options}
    for option in given_options():
        if option.name in others:
            other = next(way for way in ways if way != call.by)
            raise ConfigError(f"{option.flag} belongs to --by {other}; this is --by {call.by}")
    if call.by == "cost" and call.text is None:
        raise ConfigError("--by cost needs --text SOURCE: a text file, a folder, or datasets:NAME")


def _check_out(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; give a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: is not empty; choose another folder")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):  # now, not after minutes of tracing
        raise ConfigError(f"--out {folder}: can't write in {there}; choose another folder")
