"""`nulledit locate`: causal tracing, and the layers that it suggests."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import click

from nulledit.cli.common import Bars, echo, emit, facts_of, prepare, say
from nulledit.cli.options import (
    MODEL_OPTIONS,
    Sectioned,
    facts_options,
    model_options,
    output_options,
    seed_option,
    skip_option,
)
from nulledit.errors import ConfigError


class _Locate(Sectioned):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Facts": ("limit", "skip", "on_conflict", "skip_bad", "at_least"),
        "Trace": ("draws", "noise", "window", "seed"),
        "Model": ("recipe", *MODEL_OPTIONS),
    }


@click.command(cls=_Locate, short_help="Which layers? Causal tracing of facts that a model knows.")
@click.argument("model", metavar="MODEL")
@click.argument("facts", metavar="FACTS")
@click.option("--out", metavar="FOLDER", required=True, help="Folder to make for the trace.")
@facts_options
@skip_option
@click.option(
    "--at-least",
    metavar="N",
    type=click.IntRange(2),
    default=20,
    show_default=True,
    help="Refuse to read anything from fewer known facts.",
)
@click.option(
    "--draws",
    metavar="N",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Runs with noise of their own, for each fact.",
)
@click.option(
    "--noise",
    metavar="X",
    type=float,
    default=3.0,
    show_default=True,
    help="Its size, in standard deviations of the subjects' embeddings.",
)
@click.option(
    "--window",
    metavar="N",
    type=click.IntRange(1),
    help="Layers whose MLP outputs are put back together.  [default: a fifth of all]",
)
@seed_option("Of the noise.")
@click.option("--recipe", metavar="FILE|NAME", help="Whose layout, for a family that is not known.")
@model_options
@output_options
def locate(model: str, facts: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Trace facts that MODEL knows through its layers, and suggest layers to edit.

    Noise on the subject makes the model lose the answer; then one hidden state, or the MLP outputs
    of a few layers, is put back at one token, and what comes back of the answer's probability tells
    what was carried there (ROME, arXiv:2202.05262).

    FACTS is a file as for `nulledit edit`, or ROME's known_1000. Traced are facts whose old answer
    (of one to forget, its target) the model says, and facts without an old answer, with whatever
    it says. The rest is left out, and so are prompts that end with their subject.

    FOLDER gets a heat map, the effects, and a report with a line for a recipe. The line is a place
    to begin: where facts are found is not where editing works best (Hase et al., arXiv:2301.04213).
    See docs/locate.md.

    \b
    $ nulledit locate smollm2-135m facts.yaml --out trace
    $ nulledit locate gpt2-xl known_1000.json --limit 200 --draws 10 --out trace
    """
    from nulledit.config import load_recipe

    folder = Path(given["out"])
    _check_out(folder)
    read = facts_of(facts, given, quiet=quiet, known=True)
    layout = load_recipe(given["recipe"]).layout if given["recipe"] else None
    prepare(quiet=quiet)
    from nulledit.cli.loading import load_asked
    from nulledit.models.editable_model import EditableModel
    from nulledit.tracing import TraceSettings
    from nulledit.tracing import locate as trace_all
    from nulledit.tracing.report import NOT_SAID, said, summary_of, write_location

    settings = TraceSettings(
        draws=given["draws"],
        noise=given["noise"],
        window=given["window"] or 0,
        seed=given["seed"],
    )
    say(f"Loading {model}", quiet=quiet)
    loaded, tokenizer = load_asked(model, given)
    with Bars(quiet=quiet) as bars:
        found = trace_all(
            EditableModel(loaded, tokenizer, layout),
            read.facts,
            settings,
            least=given["at_least"],
            progress=lambda done, total: bars("facts", done, total),
        )
    write_location(folder, found, model)
    if as_json:
        return emit(summary_of(found, model))
    parts = ["\n".join(said(found))]
    if line := found.suggestion.recipe_line:
        parts += [f"    {line}", NOT_SAID]
    seconds = f"{found.cpu_seconds:.1f} CPU-seconds, {found.wall_seconds:.1f} of wall time."
    parts.append(f"{seconds}\nReport: {folder / 'report.md'}")
    return echo("\n\n".join(parts))


def _check_out(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; give a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: is not empty; choose another folder")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):  # now, not behind minutes of tracing
        raise ConfigError(f"--out {folder}: can't write in {there}; choose another folder")
