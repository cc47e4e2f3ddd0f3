"""`nulledit stats`: second moments of a model's preserved keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.command import Call, command
from nulledit.cli.common import convert_once, meet, meet_early, own_device, refuse_ranks
from nulledit.cli.options import MODEL, arg, least, model_source, null_space, opt, parse_layers
from nulledit.errors import ConfigError, RankError

if TYPE_CHECKING:
    from nulledit.config import Recipe, StatisticsSettings
    from nulledit.parallel.ranks import Ranks
    from nulledit.report.document import Part
    from nulledit.statistics.spectra import Statistics

OUT = opt("--out FOLDER", "Where to keep them.  [default: the cache]")
COMPACT = opt("--compact FILE", "A small copy, too, for this --null-space only.")
NULL_SPACE = opt(
    "--null-space RULE=VALUE",
    "Which directions count as free: absolute=0.02, leakage=0.1, median=1.",
    default="absolute=0.02",
)


@click.group(short_help="Statistics of a model's preserved keys.")
@click.pass_context
def stats(ctx: click.Context) -> None:
    """Statistics of the keys that a model sees in ordinary text: what edits must not disturb.

    They are made once per model and kept in the cache, where `nulledit edit` finds them.

    \b
    $ nulledit stats make gpt2 --text corpus.txt
    """
    if ctx.invoked_subcommand != "make":
        refuse_ranks(f"stats {ctx.invoked_subcommand}")


@command(
    "Make statistics from a text.",
    arg("model", "MODEL"),
    opt(
        "--text SOURCE",
        "A text file, a JSONL file, a folder of them, or datasets:NAME:CONFIG, such as "
        "datasets:wikimedia/wikipedia:20231101.en.",
        required=True,
    ),
    opt("--layers LIST", "As 4,5,6 or 4-8.  [default: the recipe's, or by depth]"),
    opt("--recipe FILE|NAME", "Whose layers, layout and method.  [default: the model's]"),
    opt("--tokens N", "Token budget.  [default: all]", least(0), 0),
    opt("--window N", "Window in tokens, at most the model's context.", least(1), 512),
    opt(
        "--packing",
        "One stream cut into full windows, or each line on its own.",
        ("packed", "lines"),
        "packed",
    ),
    opt("--inputs", "Of the MLPs' inputs, for gated edits.", bool),
    opt(
        "--keys",
        "Of keys, for updates of W; with --inputs both.  [default: what the recipe's method reads]",
        bool,
    ),
    opt("--skip-first", "Leave out position 0, the attention sink.", bool),
    opt("--names", "Count the last tokens of names alone; give them to edit by --stats.", bool),
    OUT,
    COMPACT,
    NULL_SPACE,
    MODEL,
    group=stats,
)
def make(call: Call) -> None:
    """Sum the keys of all chosen layers in one pass over a text. A killed run goes on where it was.

    Started by torchrun, several processes share the text. --keys --inputs makes both kinds of
    statistics in the same pass, in FOLDER/keys and FOLDER/inputs; --stats FOLDER takes what the
    method needs.

    \b
    $ nulledit stats make gpt2 --text datasets:wikimedia/wikipedia:20231101.en
    $ nulledit stats make smollm2-135m --text wiki.txt --keys --layers 3-5   # for an update of W
    $ nulledit stats make smollm2-135m --text wiki.txt --keys --inputs
    $ torchrun --nproc-per-node 8 -m nulledit stats make gpt2 --text wiki --keys --layers 2-6
    """
    meet_early(call.device)
    from nulledit.config import StatisticsSettings

    _check_out(call)
    null_space(call.null_space)  # a wrong rule is reported now, not when hours are spent
    if call.keys and call.inputs and call.compact:
        raise ConfigError(
            "--compact is a file of one kind: leave out --keys or --inputs here, and make the "
            "other copy by a second command, which reads no text again"
        )
    recipe = call.own_recipe(call.recipe, call.model)
    if call.layers:
        recipe = replace(recipe, layers=tuple(parse_layers(call.layers)))
    first = not call.skip_first
    settings = StatisticsSettings(call.tokens, call.packing, call.window, first, call.names)
    call.prepare()
    ranks = meet(call.device)
    try:
        with ranks.watched():
            found = _made(call, ranks, recipe, settings)
    except RankError as error:
        advice = "start the same command again: it goes on where sums were last saved"
        raise error.advised(advice) from error
    if found is not None:
        _show(call, found)


def _check_out(call: Call) -> None:
    """ConfigError for an --out that holds something else than statistics, also unfinished ones."""
    from nulledit.io.files import check_output
    from nulledit.statistics.manifest import INPUTS, KEYS
    from nulledit.statistics.tensor_files import MOMENTS, PARTIAL, SPECTRA

    names = (MOMENTS, SPECTRA, PARTIAL)
    if call.out:
        marks = [f"{place}/{name}" for place in (".", KEYS, INPUTS) for name in (*names, ".*.part")]
        check_output(Path(call.out), marks, "nulledit stats make")


def _made(
    call: Call, ranks: Ranks, recipe: Recipe, settings: StatisticsSettings
) -> dict[str, Statistics] | None:
    """The statistics by kind, on rank 0."""
    from nulledit.data.corpus import find_files, open_corpus
    from nulledit.editing.recipes import with_layers, with_method
    from nulledit.methods import find_method
    from nulledit.methods.gates import GATED
    from nulledit.models.editable_model import EditableModel
    from nulledit.models.load import model_hash
    from nulledit.statistics.collect import collect_together
    from nulledit.statistics.manifest import INPUTS, KEYS

    find_files(call.text)  # a wrong path needs no model
    name = model_source(call.model)
    convert_once(name, ranks)
    loaded, tokenizer = call.load(call.model, device=own_device(ranks, call.device))
    digest = model_hash(loaded)  # before anything runs, as an editor takes it
    asked = EditableModel(loaded, tokenizer, recipe.layout)
    kinds = [KEYS] * call.keys + [INPUTS] * call.inputs
    named, recipe = bool(recipe.layers), with_layers(recipe, asked)
    if not kinds:
        recipe = with_method(recipe, asked)
        kinds = [INPUTS if find_method(recipe.method.name).apart else KEYS]
    layers = recipe.layers
    if kinds == [INPUTS] and not call.layers:
        layers = GATED.edited(layers)
    if not named:
        call.say(f"Note: layers chosen by depth: {', '.join(map(str, layers))}")
    for layer in layers:
        if layer >= asked.depth:
            raise ConfigError(
                f"layer {layer} is out of range: the model has layers 0 to {asked.depth - 1}"
            )
        asked.mlp_out(layer)
    if settings.window > asked.context:
        call.say(f"Note: windows of {asked.context} tokens, the model's context")
        settings = replace(settings, window=asked.context)
    with call.progress() as tell:
        return collect_together(
            ranks,
            asked,
            open_corpus(call.text),  # read once the model is known to do
            settings,
            layers=layers,
            name=name,
            model_hash=digest,
            folder=Path(call.out) if call.out else None,
            progress=tell,
            of=kinds,
        )


@command(
    "Add statistics of several texts.",
    arg("folders", "FOLDER...", nargs=-1),
    OUT,
    COMPACT,
    NULL_SPACE,
    group=stats,
)
def merge(call: Call) -> None:
    """Add statistics of several texts, made with one model and the same settings.

    The same as one pass over all of the texts. Each FOLDER is one that `stats make --out` made.

    \b
    $ nulledit stats merge wiki-stats code-stats --out both-stats
    """
    null_space(call.null_space)
    call.prepare()
    from nulledit.statistics.merge import merge_statistics

    out = Path(call.out) if call.out else None
    found = merge_statistics([Path(folder) for folder in call.folders], out)
    _show(call, {found.manifest.kind: found})


@command("What statistics hold.", arg("source", "PATH|MODEL"), NULL_SPACE, group=stats)
def show(call: Call) -> None:
    """Per layer: tokens, protected directions, leakage, largest eigenvalues.

    Leakage is the share of the keys' energy that lies in the free directions: what edits may
    disturb. PATH is a folder or file of statistics; of a MODEL's, those that `edit` would find.

    \b
    $ nulledit stats show smollm2-135m --null-space leakage=0.1
    """
    null_space(call.null_space)
    call.prepare()
    from nulledit.statistics.found import named_statistics
    from nulledit.statistics.manifest import parts_of

    parts = parts_of(Path(call.source))
    found = [named_statistics(part) for part in parts.values() or [model_source(call.source)]]
    _show(call, {statistics.manifest.kind: statistics for statistics in found})


def _show(call: Call, found: Mapping[str, Statistics]) -> None:
    """What was found, by the rule of the options; and a small copy of it, if that was asked for."""
    rule = null_space(call.null_space)
    told, page = {}, list[Any]()
    for kind, statistics in found.items():
        if call.given.get("compact"):
            statistics.save_compact(call.compact, statistics.thresholds(rule))
        rows = statistics.rows(rule)
        told[kind] = {
            "manifest": asdict(statistics.manifest),
            "checked": statistics.checked,
            "null_space": asdict(rule),
            "excess": {"now": statistics.excess(), "with_twice": statistics.excess(2)},
            "layers": rows,
        }
        page += _page(statistics, rows)
    call.show(told if len(told) > 1 else next(iter(told.values())), lambda: page)


OF_A_NULL_SPACE = ("protected", "leakage", "threshold")


def _page(found: Statistics, rows: Sequence[dict[str, Any]]) -> list[str | Part]:
    from nulledit.report.document import Items, StudyTable

    manifest, settings = found.manifest, found.manifest.settings
    first = "counted" if settings.count_first else "left out"
    head = (
        f"{manifest.model} (weights {manifest.model_hash[:12]}, {manifest.dtype}) on "
        f"{manifest.corpus}, {settings.packing}, windows of {settings.window}, "
        f"position 0 {first}; "
        f"{'hashes checked' if found.checked else 'no hashes to check them by'}"
    )
    told: dict[str, Callable[[dict[str, Any]], str]] = {
        "layer": lambda r: str(r["layer"]),
        "tokens": lambda r: str(r["tokens"]),
        "protected": lambda r: f"{r['protected']} of {r['d_in']}",
        "leakage": lambda r: f"{100 * r['leakage']:.2f} %",
        "threshold": lambda r: f"{r['threshold']:.3g}",
        "median": lambda r: f"{r['median']:.3g}",
        "largest eigenvalues": lambda r: ", ".join(f"{v:.3g}" for v in r["largest"]),
    }
    if manifest.inputs:  # gates have no null space
        told = {name: cell for name, cell in told.items() if name not in OF_A_NULL_SPACE}
    cells = [[cell(r) for cell in told.values()] for r in rows]
    parts: list[str | Part] = [
        f"Of {manifest.kind}: {head}",
        StudyTable.of("layers", "", list(told), cells),
        _budget(found),
    ]
    if any(r["experts"] for r in rows):
        spread = (_of_experts(r["layer"], r["experts"], r["d_in"]) for r in rows)
        parts.append(Items(tuple(spread)))
    return parts


def _budget(found: Statistics) -> str:
    """What the tokens are worth, and what more would be."""
    from nulledit.io.text import percent

    now, twice = found.excess(), found.excess(2)
    widest = max(spectrum.width for spectrum in found.spectra.values())
    each = " of an expert" if any(spectrum.tokens for spectrum in found.spectra.values()) else ""
    if now is None:
        return (
            f"No more tokens than directions{each} ({widest}): some of these were never seen. Take "
            f"ten times as many tokens{each} as directions, {10 * widest:,} (--tokens)."
        )
    more = f"; twice as many tokens would make that {percent(twice or 0)}"
    return (
        f"Energies kᵀC⁻¹k of other text come out about {percent(now)} too high{more}. Text that "
        "repeats itself counts for less."
    )


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
