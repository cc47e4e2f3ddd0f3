"""`nulledit locate`: causal tracing, and the layers that it suggests."""

from __future__ import annotations

import os
from pathlib import Path

from nulledit.cli.command import Call, command
from nulledit.cli.options import FACTS, MODEL, SKIP, arg, least, opt, seed
from nulledit.errors import ConfigError


@command(
    "Which layers? Causal tracing of facts that a model knows.",
    arg("model", "MODEL"),
    arg("facts", "FACTS"),
    opt("--out FOLDER", "Folder to make for the trace.", required=True),
    "Facts:",
    FACTS,
    SKIP,
    opt("--at-least N", "Refuse to read anything from fewer known facts.", least(2), 20),
    "Trace:",
    opt("--draws N", "Runs with noise of their own, for each fact.", least(1), 3),
    opt("--noise X", "Its size, in standard deviations of the subjects' embeddings.", float, 3.0),
    opt(
        "--window N",
        "Layers whose MLP outputs are put back together.  [default: a fifth of all]",
        least(1),
    ),
    seed("Of the noise."),
    "Model:",
    opt("--recipe FILE|NAME", "Whose layout, for a family that is not known."),
    MODEL,
)
def locate(call: Call) -> None:
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

    folder = Path(call.out)
    _check_out(folder)
    read = call.read_facts(call.facts, known=True)
    layout = load_recipe(call.recipe).layout if call.recipe else None
    call.prepare()
    from nulledit.tracing import TraceSettings
    from nulledit.tracing import locate as trace_all
    from nulledit.tracing.report import NOT_SAID, said, summary_of, write_location

    settings = TraceSettings(
        draws=call.draws, noise=call.noise, window=call.window or 0, seed=call.seed
    )
    model = call.editable(call.model, layout)
    with call.progress() as tell:
        found = trace_all(
            model,
            read.facts,
            settings,
            least=call.at_least,
            progress=lambda done, total: tell("facts", done, total),
        )
    write_location(folder, found, call.model)
    parts = ["\n".join(said(found))]
    if line := found.suggestion.recipe_line:
        parts += [f"    {line}", NOT_SAID]
    seconds = f"{found.cpu_seconds:.1f} CPU-seconds, {found.wall_seconds:.1f} of wall time."
    parts.append(f"{seconds}\nReport: {folder / 'report.md'}")
    call.show(lambda: summary_of(found, call.model), lambda: parts)


def _check_out(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder}: is a file; give a folder")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--out {folder}: is not empty; choose another folder")
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK):  # now, not behind minutes of tracing
        raise ConfigError(f"--out {folder}: can't write in {there}; choose another folder")
