"""`nulledit stats`: second moments of a model's preserved keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.common import (
    convert_once,
    echo,
    emit,
    meet,
    meet_early,
    own_device,
    prepare,
    refuse_ranks,
    say,
)
from nulledit.cli.options import (
    model_options,
    model_source,
    null_space,
    output_options,
    parse_layers,
)
from nulledit.errors import ConfigError, RankError, StatisticsError
from nulledit.parallel.launch import Launch

if TYPE_CHECKING:
    from nulledit.config import NullSpaceSettings, Recipe, StatisticsSettings
    from nulledit.parallel.ranks import Ranks
    from nulledit.statistics.spectra import Statistics

null_space_option = click.option(
    "--null-space",
    metavar="RULE=VALUE",
    default="absolute=0.02",
    show_default=True,
    help="Which directions count as free: absolute=0.02, leakage=0.1, median=1.",
)


@click.group(short_help="Statistics of a model's preserved keys.")
@click.pass_context
def stats(ctx: click.Context) -> None:
    """Statistics of the keys that a model sees in ordinary text: what edits must not disturb.

    They are made once per model and kept in the cache, where `nulledit edit` finds them.
    """
    if ctx.invoked_subcommand != "make":
        refuse_ranks(f"stats {ctx.invoked_subcommand}")


@stats.command(short_help="Make statistics from a text.")
@click.argument("model", metavar="MODEL")
@click.option(
    "--text",
    required=True,
    metavar="SOURCE",
    help="A text file, a JSONL file, a folder of them, or datasets:NAME:CONFIG, such as "
    "datasets:wikimedia/wikipedia:20231101.en.",
)
@click.option("--layers", help="As 4,5,6 or 4-8.  [default: the recipe's]")
@click.option(
    "--recipe", metavar="FILE|NAME", help="Whose layers and layout.  [default: the model's]"
)
@click.option("--tokens", type=click.IntRange(0), default=0, help="Token budget.  [default: all]")
@click.option(
    "--window",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Window in tokens, at most the model's context.",
)
@click.option(
    "--packing",
    type=click.Choice(["packed", "lines"]),
    default="packed",
    show_default=True,
    help="One stream cut into full windows, or each line on its own.",
)
@click.option(
    "--inputs", is_flag=True, help="Of the MLPs' inputs in the place of keys, for gated edits."
)
@click.option("--skip-first", is_flag=True, help="Leave out position 0, the attention sink.")
@click.option("--out", metavar="FOLDER", help="Where to keep them.  [default: the cache]")
@click.option("--compact", metavar="FILE", help="A small copy, too, for this --null-space only.")
@null_space_option
@model_options
@output_options
def make(model: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Sum the keys of all chosen layers in one pass over a text. A killed run goes on where it was.

    Started by torchrun, several processes share the text.

    \b
    $ nulledit stats make smollm2-135m --text wiki.txt
    $ nulledit stats make gpt2 --text datasets:wikimedia/wikipedia:20231101.en --layers 2-6
    $ torchrun --nproc-per-node 8 -m nulledit stats make gpt2 --text wiki --layers 2-6
    """
    meet_early(given["device"])
    from nulledit.config import Recipe, StatisticsSettings, load_recipe, shipped_recipes

    rule = null_space(given["null_space"])
    named = given["recipe"] or (model if model in shipped_recipes() else None)
    recipe = load_recipe(named) if named else Recipe()
    layers = parse_layers(given["layers"]) if given["layers"] else list(recipe.layers)
    if not layers and named:
        raise ConfigError(f"give --layers: the recipe {named} names none")
    if not layers:
        raise ConfigError(f"give --layers: no recipe that comes with nulledit is for {model!r}")
    settings = StatisticsSettings(
        given["tokens"], given["packing"], given["window"], not given["skip_first"]
    )
    prepare(quiet=quiet or Launch.of().rank > 0)
    ranks = meet(given["device"])
    try:
        with ranks.watched():
            found = _made(ranks, model, recipe, layers, settings, given, quiet=quiet)
    except RankError as error:
        advice = "start the same command again: it goes on where sums were last saved"
        raise error.advised(advice) from error
    if found is not None:
        if given["compact"]:
            _write_compact(found, rule, Path(given["compact"]))
        _show(found, rule, as_json)


def _made(
    ranks: Ranks,
    model: str,
    recipe: Recipe,
    layers: Sequence[int],
    settings: StatisticsSettings,
    given: dict[str, Any],
    *,
    quiet: bool,
) -> Statistics | None:
    """The statistics, on rank 0."""
    from nulledit.cli.loading import load_asked
    from nulledit.data.corpus import find_files, open_corpus
    from nulledit.models.editable_model import EditableModel
    from nulledit.models.load import model_hash
    from nulledit.statistics.collect import collect_together

    quiet = quiet or not ranks.first
    find_files(given["text"])  # a wrong path needs no model
    say(f"Loading {model}", quiet=quiet)
    name = model_source(model)
    convert_once(name, ranks)
    loaded, tokenizer = load_asked(name, {**given, "device": own_device(ranks, given["device"])})
    digest = model_hash(loaded)  # before anything runs, as an editor takes it
    asked = EditableModel(loaded, tokenizer, recipe.layout)
    for layer in layers:
        if layer >= asked.depth:
            raise ConfigError(
                f"layer {layer} is out of range: the model has layers 0 to {asked.depth - 1}"
            )
        asked.mlp_out(layer)
    context = asked.context
    if settings.window > context:
        say(f"Note: windows of {context} tokens, the model's context", quiet=quiet)
        settings = replace(settings, window=context)
    return collect_together(
        ranks,
        asked,
        open_corpus(given["text"]),  # read once the model is known to do
        settings,
        layers=layers,
        name=name,
        model_hash=digest,
        folder=Path(given["out"]) if given["out"] else None,
        progress=not quiet,
        inputs=given["inputs"],
    )


@stats.command(short_help="Add statistics of several texts.")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True)
@click.option("--out", metavar="FOLDER", help="Where to keep them.  [default: the cache]")
@click.option("--compact", metavar="FILE", help="A small copy, too, for this --null-space only.")
@null_space_option
@output_options
def merge(folders: tuple[str, ...], as_json: bool, quiet: bool, **given: Any) -> None:
    """Add statistics of several texts, made with one model and the same settings.

    The same as one pass over all of the texts. Each FOLDER is one that `stats make --out` made.

    \b
    $ nulledit stats merge wiki-stats code-stats --out both-stats
    """
    rule = null_space(given["null_space"])
    prepare(quiet=quiet)
    from nulledit.statistics.merge import merge_statistics

    out = Path(given["out"]) if given["out"] else None
    found = merge_statistics([Path(folder) for folder in folders], out)
    if given["compact"]:
        _write_compact(found, rule, Path(given["compact"]))
    _show(found, rule, as_json)


def _write_compact(found: Statistics, rule: NullSpaceSettings, file: Path) -> None:
    from nulledit.linalg.spectrum import RULES

    thresholds = {i: RULES[rule.rule](s.eigenvalues, rule.value) for i, s in found.spectra.items()}
    found.save_compact(file, thresholds)


@stats.command(short_help="What statistics hold.")
@click.argument("source", metavar="PATH|MODEL")
@null_space_option
@output_options
def show(source: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Per layer: tokens, protected directions, leakage, largest eigenvalues.

    Leakage is the share of the keys' energy that lies in the free directions: what edits may
    disturb. PATH is a folder or file of statistics; of a MODEL's, those that `edit` would find.

    \b
    $ nulledit stats show smollm2-135m --null-space leakage=0.1
    """
    rule = null_space(given["null_space"])
    prepare(quiet=quiet)
    _show(find(source), rule, as_json)


def find(source: str) -> Statistics:
    """Statistics at a path, or a model's by the name they were made under: the largest."""
    from nulledit.io.files import cache_folder
    from nulledit.statistics.manifest import read_manifest
    from nulledit.statistics.spectra import Statistics

    path = Path(source)
    if path.is_file() or (path / "manifest.json").is_file():
        return Statistics.load(path)
    name = model_source(source)
    for shipped in Statistics.shipped(lambda manifest: manifest.model == name):
        return shipped
    found = []
    for manifest in (cache_folder() / "statistics").glob("*/*/manifest.json"):
        if read_manifest(manifest.parent)[0].model == name:
            found.append(Statistics.load(manifest.parent))
    if not found:
        raise StatisticsError(
            f"no statistics at or of {source!r}: "
            f"make them with `nulledit stats make {source} --text ...`"
        )
    return max(found, key=lambda s: s.manifest.tokens)


def rows_of(statistics: Statistics, rule: NullSpaceSettings) -> list[dict[str, Any]]:
    """One row per layer."""
    from nulledit.linalg.spectrum import RULES

    rows = []
    for layer, spectrum in sorted(statistics.spectra.items()):
        threshold = RULES[rule.rule](spectrum.eigenvalues, rule.value)
        rows.append(
            {
                "layer": layer,
                "tokens": statistics.manifest.tokens,
                "experts": list(getattr(spectrum, "tokens", ())),
                "d_in": spectrum.d_in,
                "threshold": threshold,
                "protected": spectrum.protected(threshold),
                "leakage": spectrum.leakage(threshold),
                "largest": spectrum.eigenvalues.flip(0)[:3].tolist(),
                "median": float(spectrum.eigenvalues.median()),
            }
        )
    return rows


def _show(statistics: Statistics, rule: NullSpaceSettings, as_json: bool) -> None:
    from nulledit.io.text import plain
    from nulledit.report.tables import as_text

    manifest, rows = statistics.manifest, rows_of(statistics, rule)
    if as_json:
        told = {"manifest": asdict(manifest), "checked": statistics.checked}
        emit({**told, "null_space": asdict(rule), "layers": rows})
        return
    first = "counted" if manifest.settings.count_first else "left out"
    echo(
        f"{plain(manifest.model)} (weights {manifest.model_hash[:12]}, {manifest.dtype}) on "
        f"{plain(manifest.corpus)}, {manifest.settings.packing}, windows of "
        f"{manifest.settings.window}, position 0 {first}; "
        f"{'hashes checked' if statistics.checked else 'no hashes to check them by'}\n"
    )
    cells: list[Sequence[str]] = [
        [
            str(r["layer"]),
            str(r["tokens"]),
            f"{r['protected']} of {r['d_in']}",
            f"{100 * r['leakage']:.2f} %",
            f"{r['threshold']:.3g}",
            f"{r['median']:.3g}",
            ", ".join(f"{v:.3g}" for v in r["largest"]),
        ]
        for r in rows
    ]
    head = ["layer", "tokens", "protected", "leakage", "threshold", "median", "largest eigenvalues"]
    echo(as_text((head, cells)))
    if any(r["experts"] for r in rows):
        echo("\n" + "\n".join(_of_experts(r["layer"], r["experts"], r["d_in"]) for r in rows))


def _of_experts(layer: int, tokens: Sequence[int], d_in: int) -> str:
    """How the tokens of a layer were spread over its experts, and which are too few."""
    if not tokens:
        return f"Layer {layer} has no experts."
    width, ordered = d_in // len(tokens), sorted(tokens)
    few = sum(number < width for number in tokens)
    left = f"; {few} with fewer than their keys are wide are left alone by edits" if few else ""
    return (
        f"Layer {layer}: {len(tokens)} experts, keys {width} wide; tokens routed to one: "
        f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}{left}."
    )
