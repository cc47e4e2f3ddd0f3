"""`nulledit study`: the paper's experiments, and those its replications added."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.common import say
from nulledit.cli.options import (
    DEVICE,
    DTYPE,
    SKIP_BAD,
    TRUST,
    arg,
    model_source,
    opt,
    parse_layers,
    seed,
)
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.report.document import Items, StudyTable
    from nulledit.studies.context import Lab
    from nulledit.studies.declaration import StudySpec


@command(
    "The paper's experiments, as commands.",
    arg("name", "[NAME]"),
    opt("--model MODEL", "smollm2-135m, a local folder or a Hub id.", str, "smollm2-135m"),
    opt("--out DIR", "Folder of the results.  [default: studies/NAME]"),
    opt("--work DIR", "Streams, values and measures that studies share.", str, "studies/work"),
    opt("--scale small|paper|FILE", "How large.", str, "small"),
    opt("--facts FILE", "CounterFact, or facts like it."),
    opt("--zsre FILE", "zsRE records."),
    opt("--text FILE", "For perplexity; unseen by the statistics."),
    opt("--corpus FILE", "Preserved text (study corpus)."),
    opt("--capability DIR", "The six tasks' .jsonl files."),
    opt("--prompts FILE", "For the drift of hidden states."),
    SKIP_BAD,
    opt("--recipe FILE|NAME", "What arms change.  [default: the model's]"),
    opt("--layers LIST", "Edited layers, as 4,5,6 or 4-8."),
    opt("--arms LIST", "Instead of the scale's: alphaedit,memit+inside,..."),
    seed("Of everything."),
    opt(
        "--set SETTING=VALUE",
        "A setting of the study, such as facts=100 or batch_size=25.",
        name="changes",
        multiple=True,
    ),
    opt("--dry-run", "Say what it will take; edit nothing.", bool),
    DEVICE,
    DTYPE,
    TRUST,
)
def study(call: Call) -> None:
    """Run a study: a comparison with tables, figures and a page, in a folder.

    Without NAME, the studies are listed. What was edited or measured once is kept in --work and
    taken up by any study that asks for the same, and after an interruption.

    \b
    $ nulledit study table1 --facts counterfact.json --text wiki.txt --dry-run
    $ nulledit study table1 --facts counterfact.json --text wiki.txt
    """
    call.prepare()
    from nulledit.studies.registry import STUDIES, find_study, run_study

    name = call.name
    if name is None:
        found = {n: {"question": s.question, "needs": list(s.needs)} for n, s in STUDIES.items()}
        return call.show(found, lambda: _listed(found))
    spec = find_study(name)
    lab = _lab(call, spec)
    if call.dry_run:
        from nulledit.studies.estimate import estimate

        size = estimate(lab, spec.work(lab))
        return call.show(size, lambda: cost_table(name, size))
    folder = Path(call.out or Path("studies") / name)
    result = run_study(spec, lab, folder)
    from nulledit.report.study import study_document

    place = f"Folder: {folder}\nPage:   nulledit report {folder}"
    return call.show(result.to_dict, lambda: [study_document(result), place])


def _listed(found: dict[str, dict[str, Any]]) -> Items:
    from nulledit.report.document import Items

    said = {
        name: f"{about['question']} Needs {' '.join(f'--{source}' for source in about['needs'])}."
        for name, about in found.items()
    }
    return Items(tuple(said.items()))


def _lab(call: Call, spec: StudySpec) -> Lab:
    """Everything that needs no model is checked before it is loaded, the rest just after."""
    from nulledit.io.settings import parse_changes
    from nulledit.studies.context import SOURCE_HELP, Lab, Sources
    from nulledit.studies.scale import chosen, load_scale
    from nulledit.studies.stream import Workbench

    sources = Sources(**{source: call.given[source] for source in SOURCE_HELP})
    spec.check(sources)
    for source in SOURCE_HELP:
        if call.given[source] is not None:
            sources.need(source)
    scale = spec.scaled(load_scale(call.scale))
    changes = parse_changes(call.changes) | ({"arms": call.arms} if call.arms else {})
    settings = scale.of(spec.name, changes)
    recipe = call.own_recipe(call.recipe, call.model)
    if call.layers:
        recipe = recipe.with_fields({"layers": parse_layers(call.layers)})
    arms = [
        arm for key in ("arms", "zsre_arms") if key in settings for arm in chosen(settings, key)
    ]
    ways = chosen(settings, "projections") if "projections" in settings else ()
    for arm in [*arms, *(f"{arm}+{way}" for arm in arms for way in ways)]:
        scale.recipe(recipe, arm)
    out = Path(call.out or Path("studies") / spec.name)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    source = model_source(call.model)
    bench = Workbench(*call.load(call.model), Path(call.work), name=source)
    lab = Lab(
        bench,
        recipe,
        scale,
        settings,
        sources,
        seed=call.seed,
        skip_bad=call.skip_bad,
        progress=None if call.talk.quiet else Teller(),
    )
    lab.fit(arms)
    return lab


class Teller:
    """One line on stderr for each thing begun, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Say what begins, or how far it is."""
        spent = time.monotonic() - self.start
        share = f" {done}/{total}" if total > 1 else ""
        say(f"[{spent:7.0f} s] {stage}{share}", quiet=False)


def cost_table(name: str, size: dict[str, Any]) -> StudyTable:
    """What a study will take, by stage."""
    from nulledit.report.document import StudyTable

    title = f"{name}: {size['streams']} streams, {size['to_edit']} batches still to edit"
    rows = [(stage, str(value)) for stage, value in size["seconds"].items()]
    rows.append(("in all", str(size["seconds_in_all"])))
    within = "Within a factor of about two"
    return StudyTable.of("cost", title, ("stage", "seconds"), rows, within)
