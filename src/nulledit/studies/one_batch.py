"""Studies of one batch: every arm writes the same values, so arms differ by the solve alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nulledit.config import StatisticsSettings
from nulledit.data.corpus import open_corpus
from nulledit.data.facts import Fact
from nulledit.evaluation.measures import PREFERENCE
from nulledit.linalg.spectrum import RULES, Spectrum
from nulledit.report.document import Column, FigureSpec, StudyTable
from nulledit.report.points import Point
from nulledit.statistics.collect import collect
from nulledit.studies.context import Lab, hash_of
from nulledit.studies.methods_table import Followed, follow, stream_work, unedited
from nulledit.studies.results import (
    Outcome,
    StudySpec,
    extremes,
    growth,
    rate,
    rate_cells,
    rate_columns,
    text_cells,
    text_columns,
)
from nulledit.studies.stream import StreamPlan

MEASURES = (*PREFERENCE, "efficacy_strict", "generalization_strict", "specificity_strict")


def one_batch(lab: Lab, arms: Mapping[str, Mapping[str, Any]]) -> list[StreamPlan]:
    """A plan per arm, given as its own changes of the base recipe; all facts in one batch."""
    queue = tuple(lab.facts(lab.settings["facts"], skip=lab.settings["skip"]))
    return [
        StreamPlan(label, lab.recipe.with_fields(changes), queue, len(queue), lab.seed)
        for label, changes in arms.items()
    ]


def threshold_arms(lab: Lab) -> dict[str, dict[str, Any]]:
    """Label -> changes: the cut by eigenvalue, by leakage, and how soft it is."""
    arms: dict[str, dict[str, Any]] = {}
    for value in lab.settings["thresholds"]:
        cut = {"null_space.rule": "absolute", "null_space.value": value}
        arms[f"τ = {value:g}"] = {"method.name": "alphaedit", **cut}
    for value in lab.settings["leakages"]:
        cut = {"null_space.rule": "leakage", "null_space.value": value}
        arms[f"leakage ≤ {value:g}"] = {"method.name": "alphaedit", **cut}
    for value in lab.settings["softness"]:
        arms[f"soft p = {value:g}"] = {"method.name": "soft", "method.softness": value}
    return arms


def preservation_arms(lab: Lab) -> dict[str, dict[str, Any]]:
    """Label -> changes: the projection, an explicit penalty, both, and a plain ridge."""
    arms: dict[str, dict[str, Any]] = {
        "ridge only": {"method.name": "alphaedit", "method.projection": "none"},
        "projection": {"method.name": "alphaedit"},
    }
    for value in lab.settings["penalties"]:
        penalty = {"method.name": "memit-history", "method.moment_weight": value}
        both = {"method.name": "betaedit", "method.moment_weight": value}
        arms[f"penalty λ₀ = {value:g}"] = penalty
        arms[f"both, λ₀ = {value:g}"] = both
    return arms


def run_threshold(lab: Lab) -> Outcome:
    """Sensitivity to τ, to the leakage and to the softness."""
    queue, before, arms = _followed(lab, one_batch(lab, threshold_arms(lab)))
    outcome = Outcome("", [_table("threshold", queue, before, arms)], [_trade(before, arms)])
    spread = _spread(arms, before)
    outcome.shows = f"Over {len(arms)} settings of the cut, {spread}"
    return outcome


def run_preservation(lab: Lab) -> Outcome:
    """Projection against an explicit penalty against both."""
    queue, before, arms = _followed(lab, one_batch(lab, preservation_arms(lab)))
    outcome = Outcome("", [_table("preservation", queue, before, arms)], [_trade(before, arms)])
    firm = [a for a in arms if (r := rate(a.end, "efficacy_strict")) and r.mean >= 0.8]
    grown = {a.label: g for a in firm if (g := _growth(a, before)) is not None}
    outcome.shows = _spread(arms, before).capitalize()
    if grown:
        outcome.shows += (
            " Among settings that keep strict efficacy at 80 % or more, the growth of perplexity "
            f"goes {extremes(grown)}."
        )
    return outcome


def corpus_plans(lab: Lab) -> list[tuple[int, StreamPlan]]:
    """(tokens, plan) for each budget of preserved text; statistics are named, not yet made."""
    found = []
    for tokens in lab.settings["tokens"]:
        (plan,) = one_batch(lab, {f"{tokens:,} tokens": {}})
        found.append((tokens, replace(plan, statistics=_statistics(lab, tokens))))
    return found


def run_corpus(lab: Lab) -> Outcome:
    """How few tokens of preserved text suffice."""
    layers = lab.recipe.layers
    corpus = open_corpus(lab.sources.need("corpus"))
    context = lab.bench.model.context
    window = min(StatisticsSettings.window, context)
    if window < StatisticsSettings.window:
        lab.notices.append(f"Statistics are of windows of {context} tokens, the model's context.")
    plans = []
    for tokens in lab.settings["tokens"]:
        if lab.progress:
            lab.progress(f"statistics of {tokens} tokens", 0, 1)
        folder = _statistics(lab, tokens)
        lab.bench.clear()
        statistics = collect(
            lab.bench.model,
            corpus,
            StatisticsSettings(tokens=tokens, window=window),
            layers=layers,
            name=lab.bench.name,
            model_hash=lab.bench.base.history.base.hash,
            folder=folder,
        )
        found = statistics.manifest.tokens
        if found < tokens:
            lab.notices.append(f"The corpus has {found:,} of the {tokens:,} tokens asked for.")
        (plan,) = one_batch(lab, {f"{found:,} tokens": {}})
        plans.append((statistics, replace(plan, statistics=folder)))
    queue, before, arms = _followed(lab, [plan for _, plan in plans])
    table = _table("corpus", queue, before, arms)
    first = layers[0]
    columns = (*table.columns, Column("protected", f"protected, layer {first}", None, "", 0))
    protected = {plan.label: _protected(lab, s.spectra[first]) for s, plan in plans}
    rows = [{**row, "protected": protected.get(str(row["arm"]))} for row in table.rows]
    outcome = Outcome("", [replace(table, columns=columns, rows=tuple(rows))])
    points = []
    for (statistics, _), arm in zip(plans, arms, strict=True):
        for measure in (*PREFERENCE, "efficacy_strict"):
            r = rate(arm.end, measure)
            if r:
                at = statistics.manifest.tokens
                points.append(Point(at, 100 * r.mean, 100 * r.standard_error, r.n, measure))
    outcome.figures.append(
        FigureSpec(
            "corpus",
            "Rates behind one batch, by how many tokens the statistics saw.",
            "lines",
            "tokens of preserved text",
            "mean over facts (%)",
            series="measure",
            log=("x",),
            points=tuple(points),
        )
    )
    fewest, most = arms[0], arms[-1]
    if plans[0][0].manifest.tokens > plans[-1][0].manifest.tokens:
        fewest, most = most, fewest
    small, large = (_growth(arm, before) for arm in (fewest, most))
    spec = [rate(arm.end, "specificity") for arm in (fewest, most)]
    if small is not None and large is not None and spec[0] and spec[1]:
        outcome.shows = (
            f"From {fewest.label} to {most.label}, specificity goes from {100 * spec[0].mean:.1f} "
            f"to {100 * spec[1].mean:.1f} % and the growth of perplexity from {small:.2f} to "
            f"{large:.2f} %."
        )
    return outcome


def _protected(lab: Lab, spectrum: Spectrum) -> int:
    rule = lab.recipe.null_space
    return spectrum.protected(RULES[rule.rule](spectrum.eigenvalues, rule.value))


def _statistics(lab: Lab, tokens: int) -> Path:
    layers = "-".join(map(str, lab.recipe.layers))
    corpus = open_corpus(lab.sources.need("corpus"))
    what = hash_of([lab.bench.base.history.base.hash, corpus.sha256])
    return lab.bench.folder / "statistics" / f"{tokens}-tokens-layers-{layers}-{what}"


def _followed(
    lab: Lab, plans: Sequence[StreamPlan]
) -> tuple[tuple[Fact, ...], tuple[Any, Any], list[Followed]]:
    queue = plans[0].facts
    before = unedited(lab, queue)
    return queue, before, [follow(lab, plan) for plan in plans]


def _table(
    name: str, queue: Sequence[Fact], before: tuple[Any, Any], arms: Sequence[Followed]
) -> StudyTable:
    columns = [Column("arm", "setting"), *rate_columns(MEASURES)]
    if before[1] is not None:
        columns += text_columns(2)
    columns.append(Column("update", "‖Δ‖/‖W‖", None, "%"))
    first = {**rate_cells(before[0], MEASURES), **text_cells(before[1], before[1])}
    rows: list[dict[str, Any]] = [{"arm": "unedited", **first}]
    for arm in arms:
        at = arm.checkpoints[-1]
        row: dict[str, Any] = {"arm": arm.label, **rate_cells(arm.end, MEASURES)}
        row |= text_cells(arm.text[at], before[1])
        rows.append({**row, "update": arm.update_share(at)})
    caption = (
        f"One batch of {len(queue)} facts with the same values in every setting. n counts facts, "
        "for perplexity and KL (from the unedited model) tokens."
    )
    return StudyTable(name, "Settings", caption, tuple(columns), tuple(rows))


def _trade(before: tuple[Any, Any], arms: Sequence[Followed]) -> FigureSpec:
    points = []
    for arm in arms:
        r, grown = rate(arm.end, "efficacy_strict"), _growth(arm, before)
        if r and grown is not None:
            points.append(Point(grown, 100 * r.mean, series=arm.label))
    return FigureSpec(
        "trade-off",
        "What each setting writes against what it disturbs: up and to the left is better.",
        "scatter",
        "growth of perplexity (%)",
        "strict efficacy (%)",
        series="setting",
        points=tuple(points),
    )


def _growth(arm: Followed, before: tuple[Any, Any]) -> float | None:
    return growth(arm.text[arm.checkpoints[-1]], before[1])


def _spread(arms: Sequence[Followed], before: tuple[Any, Any]) -> str:
    parts = []
    for measure in ("efficacy_strict", "specificity"):
        found = [100 * r.mean for arm in arms if (r := rate(arm.end, measure))]
        if found:
            name = measure.replace("_", " ")
            parts.append(f"{name} ranges from {min(found):.1f} to {max(found):.1f} %")
    grown = [g for arm in arms if (g := _growth(arm, before)) is not None]
    if grown:
        parts.append(f"the growth of perplexity from {min(grown):.2f} to {max(grown):.2f} %")
    return " and ".join(parts) + "."


THRESHOLD = StudySpec(
    name="threshold",
    title="How sharp a cut, and where",
    question="How sensitive are edits to the threshold τ, to a bound on leakage, and to the "
    "softness of the cut?",
    needs=("facts",),
    cannot_show="One batch shows what a setting costs at once, not how it holds up in a long "
    "stream, and the best τ of one model says nothing about another's, whose keys have another "
    "scale.",
    work=lambda lab: stream_work(lab, one_batch(lab, threshold_arms(lab))),
    run=run_threshold,
)
PRESERVATION = StudySpec(
    name="preservation",
    title="Projection, penalty, or both",
    question="Is the null-space projection better than an explicit penalty on preserved keys, "
    "and do both together gain anything?",
    needs=("facts",),
    cannot_show="Behind one batch the update is small beside the weights; where penalties add up "
    "over thousands of edits the order may change.",
    work=lambda lab: stream_work(lab, one_batch(lab, preservation_arms(lab))),
    run=run_preservation,
)
CORPUS = StudySpec(
    name="corpus",
    title="How much preserved text",
    question="How few tokens of preserved text do the statistics need?",
    needs=("facts", "corpus"),
    cannot_show="All budgets are of one corpus, and the perplexity text is of its kind: a text of "
    "another kind may need more.",
    work=lambda lab: replace(
        stream_work(lab, [plan for _, plan in corpus_plans(lab)]),
        other_tokens=sum(lab.settings["tokens"]),
    ),
    run=run_corpus,
)
