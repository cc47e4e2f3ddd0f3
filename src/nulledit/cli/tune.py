"""`nulledit tune`: a recipe for a model on given facts, with its evidence."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from nulledit.cli.common import Bars, echo, emit, facts_of, prepare, say
from nulledit.cli.options import (
    MODEL_OPTIONS,
    Sectioned,
    chat_options,
    chat_settings,
    facts_options,
    model_options,
    model_source,
    output_options,
    parse_layers,
    seed_option,
    skip_option,
)
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.config import Recipe
    from nulledit.tuning import Candidate, TuneSettings, Untried

WINDOWS, WINDOW = 12, 128  # of text, read once a candidate
FACTS = 100


class _Tune(Sectioned):
    sections: ClassVar[Mapping[str, Sequence[str]]] = {
        "Result": ("out",),
        "Bounds": ("minutes", "candidates"),
        "Facts": ("count", "skip", "limit", "on_conflict", "skip_bad", "seed"),
        "Search": ("start", "layers", "trace", "weight", "stats", "text"),
        "Form": ("chat", "system"),
        "Model": MODEL_OPTIONS,
    }


@click.command(cls=_Tune, short_help="A recipe for a model on given facts, with its evidence.")
@click.argument("model", metavar="MODEL")
@click.argument("facts", metavar="FACTS")
@click.option("--out", metavar="RECIPE.yaml", required=True, help="File to make for the recipe.")
@click.option(
    "--minutes",
    metavar="N",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Wall time for all of it; nothing is begun that would pass the end.",
)
@click.option(
    "--candidates",
    metavar="N",
    type=click.IntRange(0),
    help="At most so many beside the starting recipe.",
)
@click.option(
    "--facts",
    "count",
    metavar="N",
    type=click.IntRange(1),
    default=FACTS,
    show_default=True,
    help="Of the file, chosen by the seed; half are for the report.",
)
@facts_options
@skip_option
@seed_option("Of contexts, and of which facts are for what.")
@click.option(
    "--start", metavar="FILE|NAME", help="Recipe to begin with.  [default: as nulledit edit]"
)
@click.option(
    "--layers",
    metavar="LIST",
    multiple=True,
    help="Try these, too: 4,5,6 or 4-8, from 0; repeatable.",
)
@click.option("--trace", metavar="FOLDER", help="Try the layers that nulledit locate suggests.")
@click.option(
    "--weight",
    metavar="X",
    type=click.FloatRange(0),
    help="What a nat of KL on other text costs.  [default: 2]",
)
@click.option("--stats", metavar="PATH", help="Statistics of the model's keys.  [default: found]")
@click.option(
    "--text", metavar="FILE", help="Text for KL and perplexity.  [default: one that comes along]"
)
@chat_options
@model_options
@output_options
def tune(model: str, facts: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Find step size, clamp, layers and null-space threshold for MODEL on FACTS.

    Half of the facts choose: each candidate edits them as one batch on the clean model, and is
    scored by efficacy, paraphrases, neighbours and what it does to other text. The other half, of
    other subjects, judges what was chosen beside the starting recipe. The recipe is for `nulledit
    edit --recipe`; its evidence is in its comments and in a report beside it. See docs/tune.md.

    \b
    $ nulledit tune smollm2-135m facts.yaml --out tuned.yaml --minutes 20
    $ nulledit tune gpt2-xl counterfact.json --facts 200 --layers 13-17 --out tuned.yaml
    """
    begun = time.perf_counter()
    out = Path(given["out"])
    _check(out, given)
    windows = [tuple(parse_layers(text)) for text in given["layers"]]
    if given["trace"]:
        windows.append(_traced(Path(given["trace"])))
    read = facts_of(facts, given, quiet=quiet)
    start = _start(model, given)
    prepare(quiet=quiet)
    from nulledit.editing.editor import Editor
    from nulledit.evaluation.preservation import shipped_corpus
    from nulledit.evaluation.reading import read_windows
    from nulledit.runs.measure import check_lengths
    from nulledit.statistics.spectra import Statistics
    from nulledit.tuning import Bench, Search, split_facts
    from nulledit.tuning.report import beside, outline, summary_of, write_tuning

    _refuse_there(*beside(out))
    split = split_facts(read.facts, count=given["count"], seed=given["seed"])
    statistics = Statistics.load(Path(given["stats"])) if given["stats"] else None
    say(f"Loading {model}", quiet=quiet)
    with tempfile.TemporaryDirectory() as values:
        editor = Editor.from_pretrained(
            model_source(model),
            recipe=start,
            statistics=statistics,
            device=given["device"],
            quantize=given["quantize"] or "",
            dtype=given["dtype"],
            seed=given["seed"],
            value_cache=values,
            trust_remote_code=given["trust_remote_code"],
        )
        settings = _settings(given, windows, editor)
        check_lengths(editor, [*split.tuning, *split.report])
        text = read_windows(
            given["text"] or shipped_corpus(),
            editor.tokenizer,
            windows=WINDOWS,
            window=min(WINDOW, editor.editable.encoder.max_length),
        )
        say(
            f"{len(split.tuning)} facts to tune on, {len(split.report)} to report on",
            quiet=quiet,
        )
        with Bars(quiet=quiet) as bars:
            bench = Bench(editor, text, statistics=statistics, progress=bars)
            search = Search(bench, split, settings, begun=begun)
            search.tell = lambda done, leads: say(_told(search, done, leads), quiet=quiet)
            found = search.run(editor.recipe)
    about = {
        "model": model,
        "facts": Path(facts).name,
        "text": Path(given["text"]).name if given["text"] else "the text that comes with nulledit",
        "start": given["start"] or "as nulledit edit begins",
        "seed": str(given["seed"]),
        "minutes": f"{given['minutes']:g}",
    }
    write_tuning(out, found, about)
    if as_json:
        return emit(summary_of(found, about))
    page, table = beside(out)
    return echo("\n".join([*outline(found), "", f"Recipe: {out}", f"Report: {page}, {table}"]))


def _start(model: str, given: Mapping[str, Any]) -> Recipe:
    """The recipe to begin with, as `nulledit edit` finds it."""
    from dataclasses import replace

    from nulledit.config import Recipe, load_recipe, shipped_recipes

    name = given["start"] or (model if model in shipped_recipes() else None)
    recipe = load_recipe(name) if name else Recipe()
    return replace(recipe, chat=chat_settings(given, recipe.chat))


def _settings(
    given: dict[str, Any], windows: Sequence[tuple[int, ...]], editor: Any
) -> TuneSettings:
    """Bounds of the search; ConfigError or ModelError for layers that the model can't take."""
    from dataclasses import replace

    from nulledit.editing.recipes import resolve_recipe
    from nulledit.tuning import TuneSettings

    for layers in windows:
        resolve_recipe(
            replace(editor.recipe, layers=layers), "", editor.editable, editor.history.base.hash
        )
    more = {} if given["weight"] is None else {"weight": given["weight"]}
    return TuneSettings(60 * given["minutes"], given["candidates"], windows=tuple(windows), **more)


def _traced(folder: Path) -> tuple[int, ...]:
    """The layers that a trace suggests; ConfigError if it suggests none."""
    from nulledit.config import Recipe
    from nulledit.io.untrusted import MAX_DOCUMENT, parse_json, read_text

    file = folder / "summary.json"
    text = read_text(file, most=MAX_DOCUMENT, error=ConfigError, what="summary of a trace")
    data = parse_json(text, source=str(file), error=ConfigError)
    suggestion = data.get("suggestion") if isinstance(data, dict) else None
    layers = suggestion.get("layers") if isinstance(suggestion, dict) else None
    if layers is None:
        raise ConfigError(f"{file}: no summary of a trace; give the folder of `nulledit locate`")
    if not layers:
        raise ConfigError(f"{file}: the trace suggests no layers; give some with --layers")
    return Recipe.from_dict({"layers": layers}).layers


def _check(out: Path, given: dict[str, Any]) -> None:
    """What can be refused before anything is read."""
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: expected a file that ends in .yaml")
    _refuse_there(out)
    if given["text"] and not Path(given["text"]).exists():
        raise ConfigError(f"--text {given['text']}: no such file")


def _refuse_there(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise ConfigError(f"{file}: is there already; choose another --out")


def _told(search: Any, done: Candidate | Untried, leads: int) -> str:
    """A line about one candidate."""
    from nulledit.tuning import Untried, score, score_error

    if isinstance(done, Untried):
        return f"Not tried: {done.label} ({done.reason})"
    number, m = len(search.candidates) - 1, done.measured
    weight = search.settings.weight
    own = f"{score(m.outcome, weight):.3f} ± {score_error(m.outcome, weight):.3f}"
    led = "leads" if leads == number else f"{leads} leads"
    return f"{number}. {done.label}: score {own}, {m.seconds:.0f} s; {led}"
