"""Methods compared on one's own facts: what `nulledit compare` does, to be called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nulledit.config import Recipe, read_recipe
from nulledit.data.readers import Facts, as_facts, read_facts
from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.preservation import shipped_file
from nulledit.io.files import check_output, write_text
from nulledit.io.jsonfiles import as_json
from nulledit.models.load import load_model
from nulledit.report.document import Study
from nulledit.studies.context import Lab, Sources
from nulledit.studies.own_facts import COMPARE, methods_of
from nulledit.studies.scale import listed, load_scale
from nulledit.studies.stream import Progress, Workbench

SCALE = "small"
"""Its arms are the methods."""
MARKS = (
    "study.json",
    "*/study.json",
    "work/facts.json",
    "work/unedited",
    "work/streams",
    "work/values",
)
"""Of a comparison in its folder, also of one that was interrupted."""


def compare_methods(
    facts: Facts,
    model: str,
    methods: str | Sequence[str] = ("gated", "alphaedit"),
    out: str | Path = "compared",
    *,
    recipe: Recipe | str | Path | None = None,
    text: str | Path | None = None,
    batch_size: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Study:
    """Write `facts` by each method into the unedited `model`, and compare what came of it.

    `facts`: as for `Editor.edit`. `methods`: names with commas, or a list. `out`: the folder of the
    results, where the same call goes on after an interruption; it holds nothing else. `recipe`:
    what methods change; left out, the model's. `text`: a file for perplexity and KL; left out, the
    one that comes with nulledit. Tables of the result: `methods` (rates, other text, seconds a
    fact), `differences` from the first method, `answers` (what each model says of every fact).
    ConfigError, FactError or StatisticsError for what can't be; a method that no statistics serve
    is absent, with a notice.
    """
    # The registry reads every module here.
    from nulledit.studies.registry import run_study

    out = Path(out)
    check_out(out)
    if isinstance(facts, str | Path):
        file = Path(facts)
    else:
        file = out / "work" / "facts.json"
        write_text(file, as_json([fact.to_dict() for fact in as_facts(facts).facts]))
    settings = settings_of(file, methods, batch_size=batch_size)
    chosen = checked_recipe(read_recipe(recipe, model), settings)
    sources = sources_of(file, text)
    bench = Workbench(*load_model(model), out / "work", name=model)
    lab = lab_of(bench, chosen, settings, sources, seed=seed, progress=progress)
    return run_study(COMPARE, lab, out)


def check_out(out: Path) -> None:
    """ConfigError for a folder that holds something else than an earlier comparison."""
    check_output(out, MARKS, "nulledit compare")


def settings_of(
    file: str | Path,
    methods: str | Sequence[str],
    *,
    skip: int = 0,
    limit: int | None = None,
    skip_bad: bool = False,
    batch_size: int = 100,
) -> dict[str, Any]:
    """Of the study, for all facts of the file; FactError if there are none."""
    if not (names := listed(methods)) or not all(names):
        raise ConfigError("methods: expected names with commas, such as gated,alphaedit")
    found = read_facts(file, on_conflict="first", skip=skip, limit=limit, skip_bad=skip_bad)
    facts = len({fact.key for fact in found.facts})
    if not facts:
        raise FactError(f"{file}: no facts to compare methods on")
    given = {"arms": methods, "facts": facts, "skip": skip, "batch_size": batch_size}
    settings = COMPARE.scaled(load_scale(SCALE)).of("compare", given)
    methods_of(settings)
    return settings


def checked_recipe(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe that the methods change; ConfigError for one that they can't."""
    for arm in methods_of(settings):
        load_scale(SCALE).recipe(recipe, arm, called="method")
    return recipe


def sources_of(facts: str | Path, text: str | Path | None) -> Sources:
    """The files of a comparison; ConfigError for a text that is not there."""
    sources = Sources(facts=str(facts), text=str(text or shipped_file()))
    sources.need("text")
    return sources


def lab_of(
    bench: Workbench,
    recipe: Recipe,
    settings: dict[str, Any],
    sources: Sources,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    progress: Progress | None = None,
    statistics: Path | None = None,
) -> Lab:
    """What the comparison works with; an error names the method that the model can't take."""
    scale = load_scale(SCALE)
    lab = Lab(bench, recipe, scale, settings, sources, seed, skip_bad, progress, statistics)
    lab.fit(methods_of(settings))
    return lab
