"""`nulledit compare`: methods side by side on one's own facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nulledit.cli.command import Call, command
from nulledit.cli.options import (
    MODEL,
    SKIP,
    SKIP_BAD,
    arg,
    least,
    model_source,
    opt,
    parse_layers,
    seed,
)
from nulledit.cli.study import Teller, cost_table
from nulledit.errors import ConfigError
from nulledit.io.text import count

if TYPE_CHECKING:
    from nulledit.config import Recipe
    from nulledit.studies.context import Lab

METHODS = "gated,alphaedit,ft,local,prompt"


@command(
    "Methods side by side on your own facts.",
    arg("facts", "FACTS"),
    opt(
        "--model MODEL",
        "smollm2-135m, a local folder or a Hub id; repeatable.",
        multiple=True,
        name="models",
    ),
    opt("--out DIR", "Folder of the results.  [default: compared]", str, "compared"),
    opt(
        "--methods LIST",
        "Arms of the small scale, recipes' files, and prompt, lora, local, which edit nothing.  "
        f"[default: {METHODS}]",
        str,
        METHODS,
    ),
    opt("--work DIR", "Values, edits and answers that comparisons share.  [default: DIR/work]"),
    opt("--dry-run", "Say what it will take; edit nothing.", bool),
    "Facts:",
    opt("--limit N", "Take so many records.  [default: all]", least(1)),
    SKIP_BAD,
    SKIP,
    opt("--text FILE", "For perplexity and KL.  [default: one that comes with nulledit]"),
    seed("Of contexts and order.  [default: 0]"),
    "Recipe:",
    opt("--stats PATH", "Statistics of the one model, of all kinds needed.  [default: found]"),
    opt("--recipe FILE|NAME", "What methods change.  [default: the model's]"),
    opt("--layers LIST", "Edited layers, as 4,5,6 or 4-8.  [default: the recipe's, or by depth]"),
    opt("--batch-size N", "Facts solved together.  [default: 100]", least(1), 100),
    opt(
        "--set FIELD=VALUE",
        "Any other field of the recipe that methods change; repeatable.",
        name="changes",
        multiple=True,
    ),
    MODEL,
)
def compare(call: Call) -> None:
    """Write the same facts by several methods, each into the unedited model, and compare them.

    Rates with intervals, KL and perplexity of other text, seconds, and what each model says of
    every fact, on one page (DIR/report.html). Methods share what they have in common, values above
    all; after an interruption the same command goes on. A time estimate comes first.

    \b
    $ nulledit compare facts.yaml --model smollm2-135m --methods gated,alphaedit,lora
    $ nulledit compare facts.yaml --model smollm2-135m --dry-run
    """
    from nulledit.studies.compare import check_out, settings_of
    from nulledit.studies.own_facts import COMPARE

    out = Path(call.out)
    check_out(out)
    folders = _folders(call.models, out)
    if call.stats is not None:
        _check_statistics(call)
    settings = settings_of(
        call.facts,
        call.methods,
        skip=call.skip,
        limit=call.limit,
        skip_bad=call.skip_bad,
        batch_size=call.batch_size,
    )
    recipes = [_recipe(call, model, settings) for model in call.models]
    call.prepare()
    from nulledit.studies.estimate import estimate
    from nulledit.studies.registry import run_study

    sizes, studies = {}, []
    for model, recipe, folder in zip(call.models, recipes, folders, strict=True):
        lab = _lab(call, model, recipe, settings)
        size = sizes[Path(model).name] = estimate(lab, COMPARE.work(lab))
        if not call.dry_run:
            time = f"about {size['seconds_in_all']} s, {count(size['to_edit'], 'batch')} to edit"
            call.say(f"{Path(model).name}: {time}")
            studies.append(run_study(COMPARE, lab, folder))
    if call.dry_run:
        return call.show(sizes, lambda: [cost_table(n, size) for n, size in sizes.items()])
    from nulledit.report.study import study_document
    from nulledit.runs.report import collect, write_report

    page = out / "report.html"
    write_report(collect(folders), page, title=f"Methods on {Path(call.facts).name}", force=True)
    call.show(
        lambda: {"folder": str(out), "studies": [study.to_dict() for study in studies]},
        lambda: [*map(study_document, studies), f"Page: {page}"],
    )


def _folders(models: Sequence[str], out: Path) -> list[Path]:
    """Of each model's results; ConfigError for none, or for two of one name."""
    if not models:
        raise ConfigError("name a model: --model smollm2-135m, a local folder or a Hub id")
    names = [Path(model).name for model in models]
    if len(set(names)) < len(names):
        raise ConfigError(f"--model: two have the same name ({', '.join(names)})")
    return [out / name for name in names] if len(names) > 1 else [out]


def _check_statistics(call: Call) -> None:
    """What --stats names, before a model is loaded."""
    from nulledit.statistics.found import check_there

    if len(call.models) > 1:
        raise ConfigError("--stats is of one model; leave it out, or compare on one alone")
    check_there(call.stats)


def _recipe(call: Call, model: str, settings: dict[str, Any]) -> Recipe:
    """What the methods change on a model; ConfigError for one that they can't."""
    from nulledit.io.settings import parse_changes
    from nulledit.studies.compare import checked_recipe

    recipe = call.own_recipe(call.recipe, model)
    if call.layers:
        recipe = recipe.with_fields({"layers": parse_layers(call.layers)})
    if call.changes:
        recipe = recipe.with_fields(parse_changes(call.changes))
    return checked_recipe(recipe, settings)


def _lab(call: Call, model: str, recipe: Recipe, settings: dict[str, Any]) -> Lab:
    from nulledit.studies.compare import lab_of, sources_of
    from nulledit.studies.stream import Workbench

    sources = sources_of(call.facts, call.text)
    work = Path(call.work or Path(call.out) / "work")
    return lab_of(
        Workbench(*call.load(model), work, name=model_source(model)),
        recipe,
        settings,
        sources,
        seed=call.seed,
        skip_bad=call.skip_bad,
        progress=None if call.talk.quiet else Teller(),
        statistics=Path(call.stats) if call.stats else None,
    )
