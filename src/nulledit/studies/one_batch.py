"""Studies of one batch: every arm writes the same values, so arms differ by the solve alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nulledit.config import StatisticsSettings
from nulledit.data.corpus import open_corpus
from nulledit.evaluation.measures import PREFERENCE, STRICT
from nulledit.evaluation.stats import Rate
from nulledit.linalg.spectrum import RULES
from nulledit.report.document import FigureSpec
from nulledit.report.points import Point
from nulledit.statistics.collect import collect
from nulledit.statistics.manifest import read_manifest
from nulledit.statistics.spectra import Statistics
from nulledit.studies.build import against, head, point
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.declaration import (
    Arms,
    Cells,
    Columns,
    Figure,
    Part,
    StudySpec,
    Table,
    both,
    fixed,
    swept,
)
from nulledit.studies.methods_table import UPDATE
from nulledit.studies.results import (
    OF_TEXT,
    Arm,
    Results,
    Spot,
    extremes,
    growth,
    number,
    numbers,
    quantity,
)

FIRM = quantity("efficacy_strict")
TRADE_OFF = Figure(
    FigureSpec(
        "trade-off",
        "What each setting writes against what it disturbs: up and to the left is better.",
        "scatter",
        "growth of perplexity (%)",
        "strict efficacy (%)",
        series="setting",
    ),
    against(growth, FIRM),
)


def _table(name: str, *more: Columns) -> Table:
    return Table(
        name,
        "Settings",
        "One batch of {edits} facts with the same values in every setting. n counts facts, for "
        "perplexity and KL (from the unedited model) tokens.",
        (*PREFERENCE, *STRICT, *OF_TEXT, UPDATE, *more),
        names="setting",
        digits={"growth": 2},
    )


def _spread(results: Results) -> str:
    parts = []
    for measure in ("efficacy_strict", "specificity"):
        if found := numbers(results.ends, quantity(measure)).values():
            name = measure.replace("_", " ")
            parts.append(f"{name} ranges from {min(found):.1f} to {max(found):.1f} %")
    if grown := numbers(results.ends, growth).values():
        parts.append(f"the growth of perplexity from {min(grown):.2f} to {max(grown):.2f} %")
    return " and ".join(parts) + "."


def _firm(results: Results) -> str:
    """The spread, and the growth among settings that write most of the facts."""
    told = _spread(results).capitalize()
    found = [(spot, FIRM(spot)) for spot in results.ends]
    firm = [spot for spot, r in found if isinstance(r, Rate) and r.mean >= 0.8]
    if grown := numbers(firm, growth):
        told += (
            " Among settings that keep strict efficacy at 80 % or more, the growth of perplexity "
            f"goes {extremes(grown)}."
        )
    return told


def _cut(rule: str) -> dict[str, str]:
    return {"method.name": "alphaedit", "null_space.rule": rule}


CUTS: Arms = both(
    swept("thresholds", "null_space.value", {"τ = {:g}": _cut("absolute")}),
    swept("leakages", "null_space.value", {"leakage ≤ {:g}": _cut("leakage")}),
    swept("softness", "method.softness", {"soft p = {:g}": {"method.name": "soft"}}),
)
"""The cut by eigenvalue, by leakage, and how soft it is."""
PENALTIES: Arms = both(
    fixed(
        {
            "ridge only": {"method.name": "alphaedit", "method.projection": "none"},
            "projection": {"method.name": "alphaedit"},
        }
    ),
    swept(
        "penalties",
        "method.moment_weight",
        {
            "penalty λ₀ = {:g}": {"method.name": "memit-history"},
            "both, λ₀ = {:g}": {"method.name": "betaedit"},
        },
    ),
)
"""The projection, an explicit penalty, both, and a plain ridge."""

THRESHOLD = StudySpec(
    name="threshold",
    title="How sharp a cut, and where",
    question="How sensitive are edits to the threshold τ, to a bound on leakage, and to the "
    "softness of the cut?",
    needs=("facts",),
    cannot_show="One batch shows what a setting costs at once, not how it holds up in a long "
    "stream, and the best τ of one model says nothing about another's, whose keys have another "
    "scale.",
    parts=(
        Part(
            CUTS,
            tables=(_table("threshold"),),
            figures=(TRADE_OFF,),
            shows=lambda results: (
                f"Over {len(results.arms)} settings of the cut, {_spread(results)}"
            ),
            one_batch=True,
        ),
    ),
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
            PENALTIES,
            tables=(_table("preservation"),),
            figures=(TRADE_OFF,),
            shows=_firm,
            one_batch=True,
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
            progress=False,
        )
        found = statistics.manifest.tokens
        if found < tokens:
            lab.notices.append(f"The corpus has {found:,} of the {tokens:,} tokens asked for.")


def _budgets(lab: Lab) -> Iterable[Arm]:
    """The base recipe on each budget; labels say how many tokens there were, once it is known."""
    for tokens in lab.settings["tokens"]:
        folder = _statistics(lab, tokens)
        made = (folder / "manifest.json").is_file()
        found = read_manifest(folder)[0].tokens if made else tokens
        yield Arm(f"{found:,} tokens", {}, statistics=folder, x=found)


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
    for arm in results.arms:
        for measure in (*PREFERENCE, "efficacy_strict"):
            if found := quantity(measure)(arm.end):
                yield point(arm.arm.x or 0, found, measure)


def _fewest_to_most(results: Results) -> str:
    ends = (results.arms[0], results.arms[-1])
    few, many = sorted(ends, key=lambda arm: arm.arm.x or 0)
    grown = [growth(arm.end) for arm in (few, many)]
    kept = [number(quantity("specificity")(arm.end)) for arm in (few, many)]
    if None in (*grown, *kept):
        return ""
    return (
        f"From {few.label} to {many.label}, specificity goes from {kept[0]:.1f} to {kept[1]:.1f} % "
        f"and the growth of perplexity from {grown[0]:.2f} to {grown[1]:.2f} %."
    )


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
            tables=(_table("corpus", _protection),),
            figures=(
                Figure(
                    FigureSpec(
                        "corpus",
                        "Rates after one batch, by how many tokens the statistics saw.",
                        "lines",
                        "tokens of preserved text",
                        "mean over facts (%)",
                        series="measure",
                        log=("x",),
                    ),
                    _by_tokens,
                ),
            ),
            shows=_fewest_to_most,
            one_batch=True,
            prepare=_collect,
            more=lambda lab: {"other_tokens": sum(lab.settings["tokens"])},
        ),
    ),
)
