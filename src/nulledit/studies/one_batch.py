"""Studies of one batch: every arm writes the same values, so arms differ by the solve alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nulledit.config import StatisticsSettings
from nulledit.data.corpus import open_corpus
from nulledit.data.facts import Fact
from nulledit.evaluation.measures import PREFERENCE, STRICT
from nulledit.linalg.spectrum import RULES
from nulledit.report.points import Point
from nulledit.statistics.collect import collect
from nulledit.statistics.manifest import read_manifest
from nulledit.statistics.spectra import Statistics
from nulledit.studies.build import against, head, lines, point, scatter
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.declaration import Cells, Columns, Part, StudySpec, Table
from nulledit.studies.methods_table import end_table
from nulledit.studies.results import Results, Spot, best_and_worst, growth, quantity
from nulledit.studies.stream import StreamPlan

SPREAD = best_and_worst("efficacy_strict", "specificity", "growth")
FIRM = best_and_worst(
    *("efficacy_strict", "growth"),
    first="Among settings that keep strict efficacy at 80 % or more",
    least=80,
)
STRICTLY = (*PREFERENCE, *STRICT)
ALPHAEDIT = {"method.name": "alphaedit"}
TRADE_OFF = scatter(
    "trade-off",
    "What each setting writes against what it disturbs: up and to the left is better.",
    "growth of perplexity (%)",
    "strict efficacy (%)",
    against(growth, quantity("efficacy_strict")),
    series="setting",
)


def at_once(
    lab: Lab, queue: list[Fact], label: str, changes: Mapping[str, Any], **given: Any
) -> StreamPlan:
    """A stream of one batch, of changes of the base recipe."""
    return lab.plan(changes, queue, label=label, batch_size=len(queue), **given)


def _cuts(lab: Lab, queue: list[Fact]) -> Iterator[StreamPlan]:
    """The cut by eigenvalue, by leakage, and how soft it is."""
    cuts = {"absolute": ("thresholds", "τ ="), "leakage": ("leakages", "leakage ≤")}
    for rule, (setting, label) in cuts.items():
        for value in lab.settings[setting]:
            cut = {"null_space.rule": rule, "null_space.value": value}
            yield at_once(lab, queue, f"{label} {value:g}", {**ALPHAEDIT, **cut})
    for value in lab.settings["softness"]:
        changes = {"method.name": "soft", "method.softness": value}
        yield at_once(lab, queue, f"soft p = {value:g}", changes)


def _penalties(lab: Lab, queue: list[Fact]) -> Iterator[StreamPlan]:
    """A plain ridge, the projection, an explicit penalty, and both."""
    yield at_once(lab, queue, "ridge only", {**ALPHAEDIT, "method.projection": "none"})
    yield at_once(lab, queue, "projection", ALPHAEDIT)
    for value in lab.settings["penalties"]:
        for label, name in (("penalty", "memit-history"), ("both,", "betaedit")):
            changes = {"method.name": name, "method.moment_weight": value}
            yield at_once(lab, queue, f"{label} λ₀ = {value:g}", changes)


def _settings(name: str, *more: Columns) -> Table:
    return end_table(name, "Settings", *more, measures=STRICTLY, names="setting")


THRESHOLD = StudySpec(
    name="threshold",
    title="How sharp a cut, and where",
    question="How sensitive are edits to the threshold τ, to a bound on leakage, and to the "
    "softness of the cut?",
    needs=("facts",),
    cannot_show="One batch shows what a setting costs at once, not how it holds up in a long "
    "stream, and the best τ of one model says nothing about another's, whose keys have another "
    "scale.",
    parts=(Part(_cuts, tables=(_settings("threshold"),), figures=(TRADE_OFF,), shows=SPREAD),),
)
PRESERVATION = StudySpec(
    name="preservation",
    title="Projection, penalty, or both",
    question="Is the null-space projection better than an explicit penalty on preserved keys, "
    "and do both together gain anything?",
    needs=("facts",),
    cannot_show="After one batch the update is small beside the weights; where penalties add up "
    "over thousands of edits the order may change.",
    parts=(
        Part(
            _penalties,
            tables=(_settings("preservation"),),
            figures=(TRADE_OFF,),
            shows=lambda results: f"{SPREAD(results)} {FIRM(results)}",
        ),
    ),
)


# -- statistics of few tokens --------------------------------------------------------------------


def _statistics(lab: Lab, tokens: int) -> Path:
    layers = "-".join(map(str, lab.recipe.layers))
    corpus = open_corpus(lab.sources.need("corpus"))
    what = hash_of([lab.bench.base.history.base.hash, corpus.sha256])
    return lab.bench.folder / "statistics" / f"{tokens}-tokens-layers-{layers}-{what}"


def _collect(lab: Lab) -> None:
    """Statistics of each budget of preserved text; what was collected before is kept."""
    corpus = open_corpus(lab.sources.need("corpus"))
    context = lab.bench.model.context
    window = min(StatisticsSettings.window, context)
    if window < StatisticsSettings.window:
        lab.notices.append(f"Statistics are of windows of {context} tokens, the model's context.")
    for tokens in lab.settings["tokens"]:
        lab.tell(f"statistics of {tokens} tokens")
        lab.bench.clear()
        statistics = collect(
            lab.bench.model,
            corpus,
            StatisticsSettings(tokens=tokens, window=window),
            layers=lab.recipe.layers,
            name=lab.bench.name,
            model_hash=lab.bench.base.history.base.hash,
            folder=_statistics(lab, tokens),
        )
        found = statistics.manifest.tokens
        if found < tokens:
            lab.notices.append(f"The corpus has {found:,} of the {tokens:,} tokens asked for.")


def _budgets(lab: Lab, queue: list[Fact]) -> Iterable[StreamPlan]:
    """The base recipe on each budget; labels say how many tokens there were, once it is known."""
    for tokens in lab.settings["tokens"]:
        folder = _statistics(lab, tokens)
        made = (folder / "manifest.json").is_file()
        found = read_manifest(folder)[0].tokens if made else tokens
        yield at_once(lab, queue, f"{found:,} tokens", {}, statistics=folder, x=found)


def _protected(spot: Spot) -> int | None:
    """Directions of the first edited layer that the rule protects."""
    if spot.base is None or spot.plan is None or spot.plan.statistics is None:
        return None
    recipe = spot.plan.recipe
    spectrum = Statistics.load(spot.plan.statistics).spectra[recipe.layers[0]]
    rule = recipe.null_space
    return spectrum.protected(RULES[rule.rule](spectrum.eigenvalues, rule.value))


def _protection(results: Results) -> Iterable[Cells]:
    title = f"protected, layer {results.lab.recipe.layers[0]}"
    yield Cells(head("protected", title, "", 0), _protected)


def _by_tokens(results: Results) -> Iterable[Point]:
    for spot in results.ends:
        for measure in (*PREFERENCE, "efficacy_strict"):
            if (found := quantity(measure)(spot)) and spot.plan:
                yield point(spot.plan.x, found, measure)


CORPUS = StudySpec(
    name="corpus",
    title="How much preserved text",
    question="How few tokens of preserved text do the statistics need?",
    needs=("facts", "corpus"),
    cannot_show="All budgets are of one corpus, and the perplexity text is of its kind: a text of "
    "another kind may need more.",
    parts=(
        Part(
            _budgets,
            tables=(_settings("corpus", _protection),),
            figures=(
                lines(
                    "corpus",
                    "Rates after one batch, by how many tokens the statistics saw.",
                    "mean over facts (%)",
                    _by_tokens,
                    x="tokens of preserved text",
                    series="measure",
                    log=("x",),
                ),
            ),
            shows=SPREAD,
            prepare=_collect,
            more=lambda lab: {"other_tokens": sum(lab.settings["tokens"])},
        ),
    ),
)
