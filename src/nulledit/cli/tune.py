"""`nulledit tune`: a recipe for a model on given facts, with its evidence."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nulledit.cli.command import Call, command
from nulledit.cli.options import (
    FACTS,
    FORMS,
    MODEL,
    SKIP,
    STATS,
    arg,
    least,
    opt,
    parse_layers,
    seed,
)
from nulledit.errors import ConfigError

if TYPE_CHECKING:
    from nulledit.config import Recipe
    from nulledit.tuning import Candidate, Split, Tuning, Untried

WINDOWS, WINDOW = 12, 128  # of text, read once a candidate


@command(
    "A recipe for a model on given facts, with its evidence.",
    arg("model", "MODEL"),
    arg("facts", "FACTS"),
    "Result:",
    opt("--out RECIPE.yaml", "File to make for the recipe.", required=True),
    "Bounds:",
    opt(
        "--minutes N",
        "Wall time for all of it; nothing is begun that would pass the end.",
        click.FloatRange(0, min_open=True),
        30.0,
    ),
    opt("--candidates N", "At most so many beside the starting recipe.", least(0)),
    "Facts:",
    opt(
        "--facts N",
        "Of the file, chosen by the seed; half are for the report.",
        least(1),
        100,
        name="count",
    ),
    SKIP,
    FACTS,
    seed("Of contexts, and of which facts are for what."),
    "Search:",
    opt("--start FILE|NAME", "Recipe to begin with.  [default: as nulledit edit]"),
    opt("--layers LIST", "Try these, too: 4,5,6 or 4-8, from 0; repeatable.", multiple=True),
    opt("--trace FOLDER", "Try the layers that nulledit locate suggests."),
    opt("--weight X", "What a nat of KL on other text costs.  [default: 2]", click.FloatRange(0)),
    STATS,
    opt("--text FILE", "Text for KL and perplexity.  [default: one that comes with nulledit]"),
    "Form:",
    FORMS,
    "Model:",
    MODEL,
)
def tune(call: Call) -> None:
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
    out = Path(call.out)
    if out.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {out}: expected a file that ends in .yaml")
    _refuse_there(out)
    if call.text and not Path(call.text).exists():
        raise ConfigError(f"--text {call.text}: no such file")
    windows = [tuple(parse_layers(text)) for text in call.layers]
    if call.trace:
        windows.append(_traced(Path(call.trace)))
    read = call.read_facts(call.facts)
    start = call.own_recipe(call.start, call.model)
    start = replace(start, chat=call.chat_form(start.chat))
    call.prepare()
    from nulledit.report.document import Items
    from nulledit.runs.measure import text_name
    from nulledit.tuning import split_facts
    from nulledit.tuning.report import beside, evidence, summary_of, write_tuning

    _refuse_there(*beside(out))
    split = split_facts(read.facts, count=call.count, seed=call.seed)
    found = _searched(call, start, windows, split, begun)
    about = {
        "model": call.model,
        "facts": Path(call.facts).name,
        "text": text_name(call.text),
        "start": call.start or "as nulledit edit begins",
        "seed": str(call.seed),
        "minutes": f"{call.minutes:g}",
    }
    write_tuning(out, found, about)
    page, table = beside(out)
    files = Items((("Recipe", str(out)), ("Report", f"{page}, {table}")))
    call.show(lambda: summary_of(found, about), lambda: [*evidence(found), files])


def _searched(
    call: Call, start: Recipe, windows: Sequence[tuple[int, ...]], split: Split, begun: float
) -> Tuning:
    """Load the model, check what it can't take, and search."""
    from nulledit.editing.recipes import resolve_recipe
    from nulledit.evaluation.preservation import shipped_corpus
    from nulledit.evaluation.reading import read_windows
    from nulledit.runs.measure import check_lengths
    from nulledit.statistics.spectra import Statistics
    from nulledit.tuning import Bench, Search, TuneSettings

    statistics = Statistics.load(Path(call.stats)) if call.stats else None
    with tempfile.TemporaryDirectory() as values:
        editor = call.editor(call.model, recipe=start, statistics=statistics, value_cache=values)
        for layers in windows:
            tried = replace(editor.recipe, layers=layers)
            resolve_recipe(tried, "", editor.editable, editor.history.base.hash)
        weight = {} if call.weight is None else {"weight": call.weight}
        settings = TuneSettings(
            60 * call.minutes, call.candidates, windows=tuple(windows), **weight
        )
        check_lengths(editor, [*split.tuning, *split.report])
        text = read_windows(
            call.text or shipped_corpus(),
            editor.tokenizer,
            windows=WINDOWS,
            window=min(WINDOW, editor.editable.encoder.max_length),
        )
        call.say(f"{len(split.tuning)} facts to tune on, {len(split.report)} to report on")
        with call.progress() as tell:
            bench = Bench(editor, text, statistics=statistics, progress=tell)
            search = Search(bench, split, settings, begun=begun)
            search.tell = lambda done, leads: call.say(_told(search, done, leads))
            return search.run(editor.recipe)


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
