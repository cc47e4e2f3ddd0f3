"""`nulledit study`: the paper's experiments, and those its replications added."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from nulledit.cli.common import echo, emit, prepare, say
from nulledit.cli.options import (
    device_option,
    dtype_option,
    model_source,
    output_options,
    parse_changes,
    parse_layers,
    seed_option,
    skip_bad_option,
    trust_option,
)
from nulledit.errors import ConfigError


@click.command(short_help="The paper's experiments.")
@click.argument("name", metavar="NAME", required=False)
@click.option(
    "--model",
    metavar="MODEL",
    default="smollm2-135m",
    show_default=True,
    help="smollm2-135m, a local folder or a Hub id.",
)
@click.option("--out", metavar="DIR", help="Folder of the results.  [default: studies/NAME]")
@click.option(
    "--work",
    metavar="DIR",
    default="studies/work",
    show_default=True,
    help="Streams, values and measures that studies share.",
)
@click.option(
    "--scale", metavar="small|paper|FILE", default="small", show_default=True, help="How large."
)
@click.option("--facts", metavar="FILE", help="CounterFact, or facts like it.")
@click.option("--zsre", metavar="FILE", help="zsRE records.")
@click.option("--text", metavar="FILE", help="For perplexity; unseen by the statistics.")
@click.option("--corpus", metavar="FILE", help="Preserved text (study corpus).")
@click.option("--capability", metavar="DIR", help="The six tasks' .jsonl files.")
@click.option("--prompts", metavar="FILE", help="For the drift of hidden states.")
@skip_bad_option
@click.option("--recipe", metavar="FILE|NAME", help="What arms change.  [default: the model's]")
@click.option("--layers", metavar="LIST", help="Edited layers, as 4,5,6 or 4-8.")
@click.option("--arms", metavar="LIST", help="Instead of the scale's: alphaedit,memit+inside,...")
@seed_option("Of everything.")
@click.option(
    "--set",
    "changes",
    metavar="SETTING=VALUE",
    multiple=True,
    help="A setting of the study, such as facts=100 or batch_size=25.",
)
@click.option("--dry-run", is_flag=True, help="Say what it will take; edit nothing.")
@device_option
@dtype_option
@trust_option
@output_options
def study(name: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Run a study: a comparison with tables, figures and a page, in a folder.

    Without NAME, the studies are listed. What was edited or measured once is kept in --work and
    taken up by any study that asks for the same, and after an interruption.

    \b
    $ nulledit study table1 --facts counterfact.json --text wiki.txt --dry-run
    $ nulledit study table1 --facts counterfact.json --text wiki.txt
    """
    prepare(quiet=quiet)
    from nulledit.studies.registry import STUDIES, find_study

    if name is None:
        found = {n: {"question": s.question, "needs": list(s.needs)} for n, s in STUDIES.items()}
        if as_json:
            emit(found)
        else:
            for n, about in found.items():
                needs = " ".join(f"--{source}" for source in about["needs"])
                echo(f"{n:<13} {about['question']}\n{'':<13} needs {needs}")
        return
    spec = find_study(name)
    lab = _lab(name, given, spec, quiet=quiet)
    if given["dry_run"]:
        from nulledit.studies.estimate import estimate

        size = estimate(lab, spec.work(lab))
        emit(size) if as_json else echo(_as_text(name, size))
        return
    from nulledit.studies.registry import run_study

    folder = Path(given["out"] or Path("studies") / name)
    result = run_study(spec, lab, folder)
    if as_json:
        emit(result.to_dict())
    else:
        echo((folder / "study.md").read_text(encoding="utf-8"))
        echo(f"Folder: {folder}\nPage:   nulledit report {folder}")


def _lab(name: str, given: dict[str, Any], spec: Any, *, quiet: bool) -> Any:
    """Everything that needs no model is checked before it is loaded, the rest just after."""
    from nulledit.config import Recipe, load_recipe, shipped_recipes
    from nulledit.studies.context import Lab, Sources
    from nulledit.studies.scale import load_scale

    sources = Sources(
        **{k: given[k] for k in ("facts", "zsre", "text", "corpus", "capability", "prompts")}
    )
    spec.check(sources)
    for source in vars(sources):
        if getattr(sources, source) is not None:
            sources.need(source)
    scale = spec.scaled(load_scale(given["scale"]))
    changes: dict[str, Any] = dict(parse_changes(given["changes"]))
    if given["arms"]:
        changes["arms"] = given["arms"]
    settings = scale.of(name, changes)
    named = given["recipe"] or (given["model"] if given["model"] in shipped_recipes() else None)
    recipe = load_recipe(named) if named else Recipe()
    if given["layers"]:
        recipe = recipe.with_fields({"layers": parse_layers(given["layers"])})
    from nulledit.studies.scale import chosen

    arms = [a for key in ("arms", "zsre_arms") if key in settings for a in chosen(settings, key)]
    ways = chosen(settings, "projections") if "projections" in settings else ()
    for arm in [*arms, *(f"{arm}+{way}" for arm in arms for way in ways)]:
        scale.recipe(recipe, arm)
    out = Path(given["out"] or Path("studies") / name)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a folder")
    from nulledit.models.load import load_model
    from nulledit.studies.stream import Workbench

    say(f"Loading {given['model']}", quiet=quiet)
    source = model_source(given["model"])
    model, tokenizer = load_model(
        source,
        device=given["device"],
        dtype=given["dtype"],
        trust_remote_code=given["trust_remote_code"],
    )
    bench = Workbench(model, tokenizer, Path(given["work"]), name=source)
    tell = None if quiet else _Teller()
    lab = Lab(
        bench,
        recipe,
        scale,
        settings,
        sources,
        seed=given["seed"],
        skip_bad=given["skip_bad"],
        progress=tell,
    )
    lab.fit(arms)
    return lab


class _Teller:
    """One line on stderr for each thing begun, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        spent = time.monotonic() - self.start
        share = f" {done}/{total}" if total > 1 else ""
        say(f"[{spent:7.0f} s] {stage}{share}", quiet=False)


def _as_text(name: str, size: dict[str, Any]) -> str:
    lines = [f"{name}: {size['streams']} streams, {size['to_edit']} batches still to edit"]
    lines += [f"  {stage:<12} {value:>7} s" for stage, value in size["seconds"].items()]
    lines.append(f"  {'in all':<12} {size['seconds_in_all']:>7} s, within a factor of about two")
    return "\n".join(lines)
