"""Studies of size and order: batch size, model width, number of edits; the order of a queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from nulledit.data.facts import Fact
from nulledit.evaluation.measures import PREFERENCE
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.solve import solve_update
from nulledit.linalg.spectrum import Spectrum
from nulledit.report.document import Column, FigureSpec, StudyTable
from nulledit.report.points import Point
from nulledit.studies.context import Lab
from nulledit.studies.methods_table import (
    along_figures,
    cohort_table,
    end_table,
    follow,
    stream_work,
    unedited,
)
from nulledit.studies.results import (
    Outcome,
    StudySpec,
    Work,
    growth,
    intervals,
    rate,
)
from nulledit.studies.scale import chosen
from nulledit.studies.stream import StreamPlan

# -- scale ---------------------------------------------------------------------------------------


def batch_plans(lab: Lab) -> list[StreamPlan]:
    """One zsRE queue in batches of several sizes."""
    if not lab.sources.zsre:
        return []
    queue = lab.facts(lab.settings["zsre"], source="zsre", skip=lab.settings["skip"])
    arm = lab.settings["arm"]
    return [
        lab.plan(arm, queue, label=f"batches of {size}", batch_size=size)
        for size in lab.settings["batch_sizes"]
    ]


def stream_plans(lab: Lab) -> list[StreamPlan]:
    """One long stream on the real model for each arm."""
    queue = lab.facts(lab.settings["facts"], skip=lab.settings["skip"])
    return [lab.plan(arm, queue) for arm in chosen(lab.settings)]


def run_scale(lab: Lab) -> Outcome:
    """Quality by batch size and number of edits; time and memory by width."""
    outcome = Outcome("")
    told = []
    plans = batch_plans(lab)
    if plans:
        queue = plans[0].facts
        before = unedited(lab, queue)
        arms = [follow(lab, plan, [len(queue)]) for plan in plans]
        title = "zsRE by batch size"
        table = end_table("batches", title, len(queue), before, arms, tokens=True)
        outcome.tables.append(table)
        found = [rate(arm.end, "efficacy_tokens") for arm in arms]
        told.append(
            "Token efficacy on zsRE by batch size: "
            + ", ".join(
                f"{plan.batch_size}: {100 * r.mean:.1f} ± {100 * r.standard_error:.1f} %"
                for plan, r in zip(plans, found, strict=True)
                if r
            )
            + "."
        )
    else:
        lab.notices.append("No --zsre was given, so quality by batch size is absent.")
    queue = stream_plans(lab)[0].facts
    before = unedited(lab, queue)
    arms = [follow(lab, plan) for plan in stream_plans(lab)]
    outcome.tables.append(end_table("edits", "A longer stream", len(queue), before, arms))
    size = lab.settings["batch_size"]
    outcome.tables.append(cohort_table("cohorts", arms, size, queue))
    outcome.figures += along_figures("edits", before, arms)
    for arm in arms:
        told.append(_end_of(arm.label, arm, before))
    cost = _costs(lab)
    outcome.tables.append(_cost_table(cost))
    outcome.figures.append(_cost_figure(cost))
    told.append(_growth_of(cost))
    outcome.shows = " ".join(told).strip()
    return outcome


def _end_of(label: str, arm: Any, before: tuple[Any, Any]) -> str:
    end = arm.checkpoints[-1]
    strict = rate(arm.end, "efficacy_strict")
    grown = growth(arm.text[end], before[1])
    said = "absent" if strict is None else f"{100 * strict.mean:.1f} %"
    return f"Behind {end} edits {label} holds {said} (strict)" + (
        f" at {grown:+.1f} % perplexity." if grown is not None else "."
    )


def _costs(lab: Lab) -> list[dict[str, float]]:
    """Seconds (least of three) and bytes of each step by key width, on random keys."""
    found = []
    for d_in in lab.settings["widths"]:
        if lab.progress:
            lab.progress(f"width {d_in}", 0, 1)
        d_out, n = d_in // lab.settings["expansion"], lab.settings["solve_facts"]
        made = torch.Generator().manual_seed(lab.seed)
        rows = torch.randn(1024, d_in, generator=made)
        rows *= torch.linspace(0.05, 1, d_in)  # a spectrum that falls
        moment = SecondMoment(d_in)
        statistics = _seconds(lambda m=moment, r=rows: m.update(r))  # type: ignore[misc]
        value = moment.update(torch.randn(2 * d_in, d_in, generator=made) * 0.2).value
        decomposition = _seconds(lambda v=value: Spectrum.of(v))  # type: ignore[misc]
        spectrum = Spectrum.of(value)
        threshold = float(spectrum.eigenvalues.median())
        gains = (spectrum.eigenvalues < threshold).double() / 10
        metric = spectrum.preconditioner(gains)
        (thin,) = spectrum.reduced(gains).blocks.values()
        keys = torch.randn(d_in, n, generator=made).double()
        residual = torch.randn(d_out, n, generator=made).double()
        solve = _seconds(lambda m=metric, k=keys, r=residual: solve_update(k, r, m))  # type: ignore[misc]
        found.append(
            {
                "d_in": d_in,
                "statistics": statistics,
                "decomposition": decomposition,
                "solve": solve,
                "moment_bytes": 8.0 * d_in**2,
                "thin_bytes": 4.0 * thin.eigenvectors.numel(),
                "column_bytes": 4.0 * (d_in + d_out),
            }
        )
    return found


def _seconds(work: Callable[[], Any]) -> float:
    spent = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


STEPS = ("statistics", "decomposition", "solve")


def _cost_table(costs: Sequence[dict[str, float]]) -> StudyTable:
    columns = (
        Column("d_in", "key width", None, "", 0),
        Column("statistics", "1,024 tokens", "low", "s", 4),
        Column("decomposition", "eigh", "low", "s", 3),
        Column("solve", "solve", "low", "s", 4),
        Column("moment", "second moment", "low", "MB", 1),
        Column("thin", "thin side kept", "low", "MB", 1),
        Column("column", "one fact's column", "low", "kB", 1),
    )
    rows: list[dict[str, Any]] = [
        {
            "d_in": str(int(c["d_in"])),
            **{step: c[step] for step in STEPS},
            "moment": c["moment_bytes"] / 1e6,
            "thin": c["thin_bytes"] / 1e6,
            "column": c["column_bytes"] / 1e3,
        }
        for c in costs
    ]
    caption = (
        "Of one layer on random keys, least of three runs, this machine's threads as set. The "
        "fitted growth is in the findings."
    )
    return StudyTable("width", "Cost by width", caption, columns, tuple(rows))


def _cost_figure(costs: Sequence[dict[str, float]]) -> FigureSpec:
    points = [Point(c["d_in"], c[step], series=step) for step in STEPS for c in costs]
    return FigureSpec(
        "width",
        "Seconds of one layer by key width.",
        "lines",
        "key width d_in",
        "seconds",
        series="step",
        log=("x", "y"),
        points=tuple(points),
    )


def _growth_of(costs: Sequence[dict[str, float]]) -> str:
    if len(costs) < 2:
        return ""
    widths = np.log([c["d_in"] for c in costs])
    parts = []
    for step in STEPS:
        exponent = float(np.polyfit(widths, np.log([c[step] for c in costs]), 1)[0])
        parts.append(f"{step} ~ width^{exponent:.1f}")
    return "Fitted growth of time: " + ", ".join(parts) + "."


# -- order ---------------------------------------------------------------------------------------


def order_plans(lab: Lab) -> list[StreamPlan]:
    """Each arm on a shuffled queue and on the same facts clustered by relation."""
    queue = lab.facts(lab.settings["facts"], skip=lab.settings["skip"])
    clustered = sorted(queue, key=lambda fact: fact.relation_key)
    found = []
    for arm in chosen(lab.settings):
        found.append(lab.plan(arm, queue, label=f"{arm}, shuffled"))
        found.append(lab.plan(arm, clustered, label=f"{arm}, clustered"))
    return found


def run_order(lab: Lab) -> Outcome:
    """Shuffled against clustered queues."""
    plans = order_plans(lab)
    queue: Sequence[Fact] = plans[0].facts
    end = [len(queue)]
    before = unedited(lab, queue)
    arms = {plan.label: follow(lab, plan, end) for plan in plans}
    outcome = Outcome("")
    outcome.tables.append(end_table("order", "By order", len(queue), before, list(arms.values())))
    pairs = []
    told = []
    for arm in chosen(lab.settings):
        shuffled, clustered = (arms[f"{arm}, {how}"] for how in ("shuffled", "clustered"))
        pairs.append((arm, clustered.end, shuffled.end))
        a, b = (rate(x.end, "efficacy_strict") for x in (shuffled, clustered))
        grown = [growth(x.text[end[0]], before[1]) for x in (shuffled, clustered)]
        if a and b:
            text = f"{arm}: strict efficacy {100 * a.mean:.1f} % shuffled, {100 * b.mean:.1f} % "
            text += "clustered"
            if None not in grown:
                text += f", perplexity {grown[0]:+.1f} and {grown[1]:+.1f} %"
            told.append(text + ".")
    outcome.figures.append(
        intervals(
            "order",
            "Shuffled minus clustered, over the same facts; 95 % intervals of a paired bootstrap.",
            pairs,
            [*PREFERENCE, "efficacy_strict"],
        )
    )
    outcome.shows = " ".join(told)
    return outcome


def _scale_work(lab: Lab) -> Work:
    batches = stream_work(lab, batch_plans(lab), every=False)
    streams = stream_work(lab, stream_plans(lab))
    return replace(
        streams,
        plans=[*batches.plans, *streams.plans],
        asked=batches.asked + streams.asked,
        written=batches.written + streams.written,
        perplexities=batches.perplexities + streams.perplexities,
    )


SCALE = StudySpec(
    name="scale",
    title="How it scales",
    question="How does quality depend on batch size and on the number of edits, and how do time "
    "and memory grow with the model's width?",
    needs=("facts",),
    cannot_show="Widths are those of random keys on this machine's processor; what an accelerator "
    "does with a width of 14,336 is not here. One seed: differences between batch sizes within "
    "their standard errors mean nothing.",
    work=_scale_work,
    run=run_scale,
)
ORDER = StudySpec(
    name="order",
    title="Shuffled against clustered queues",
    question="Does it matter whether facts of one relation come together?",
    needs=("facts",),
    cannot_show="One shuffle and one clustering of a short queue; replications that saw shuffled "
    "queues live longer looked behind thousands of edits.",
    work=lambda lab: stream_work(lab, order_plans(lab), every=False),
    run=run_order,
)
