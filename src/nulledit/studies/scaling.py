"""Studies of size and order: batch size, model width, number of edits; the order of a queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from nulledit.data.facts import Fact
from nulledit.evaluation.measures import PREFERENCE
from nulledit.evaluation.stats import power_of
from nulledit.linalg.moments import SecondMoment
from nulledit.linalg.solve import solve_update
from nulledit.linalg.spectrum import Spectrum
from nulledit.report.points import Point
from nulledit.studies.build import OF_TOKENS, head, intervals, lines, paired
from nulledit.studies.context import Lab
from nulledit.studies.declaration import Part, StudySpec, Table, named
from nulledit.studies.methods_table import along_figures, cohort_table, end_table
from nulledit.studies.results import Results, best_and_worst, changes
from nulledit.studies.scale import chosen
from nulledit.studies.stream import StreamPlan

STEPS = ("statistics", "decomposition", "solve")
MEASURES = (*PREFERENCE, "efficacy_strict")


def _batches(lab: Lab, queue: list[Fact]) -> Iterable[StreamPlan]:
    """One arm in batches of several sizes."""
    for size in lab.settings["batch_sizes"]:
        yield lab.plan(lab.settings["arm"], queue, label=f"batches of {size}", batch_size=size)


def _costs(lab: Lab) -> list[dict[str, Any]]:
    """Seconds (least of three) and bytes of each step by key width, on random keys."""
    found: list[dict[str, Any]] = []
    for d_in in lab.settings["widths"]:
        lab.tell(f"width {d_in}")
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
                "d_in": str(d_in),
                **dict(zip(STEPS, (statistics, decomposition, solve), strict=True)),
                "moment": 8e-6 * d_in**2,
                "thin": 4e-6 * thin.eigenvectors.numel(),
                "column": 4e-3 * (d_in + d_out),
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


def _powers(results: Results) -> str:
    costs: Sequence[Mapping[str, Any]] = results.made
    if len(costs) < 2:
        return ""
    widths = [float(cost["d_in"]) for cost in costs]
    powers = {step: power_of(widths, [cost[step] for cost in costs]) for step in STEPS}
    told = ", ".join(f"{step} ~ width^{power:.1f}" for step, power in powers.items())
    return f"Fitted growth of time: {told}."


WIDTHS = Part(
    prepare=_costs,
    tables=(
        Table(
            "width",
            "Cost by width",
            "Of one layer on random keys, least of three runs, this machine's threads as set. The "
            "fitted growth is in the findings.",
            (
                head("d_in", "key width", "", 0),
                head("statistics", "1,024 tokens", "s", 4, "low"),
                head("decomposition", "eigh", "s", 3, "low"),
                head("solve", "solve", "s", 4, "low"),
                head("moment", "second moment", "MB", 1, "low"),
                head("thin", "thin side kept", "MB", 1, "low"),
                head("column", "one fact's column", "kB", 1, "low"),
            ),
            rows=lambda results: results.made,
        ),
    ),
    figures=(
        lines(
            "width",
            "Seconds of one layer by key width.",
            "seconds",
            lambda results: [
                Point(int(cost["d_in"]), cost[step], series=step)
                for step in STEPS
                for cost in results.made
            ],
            x="key width d_in",
            series="step",
            log=("x", "y"),
        ),
    ),
    shows=_powers,
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
    parts=(
        Part(
            _batches,
            tables=(end_table("batches", "{data} by batch size", measures=OF_TOKENS),),
            shows=best_and_worst("efficacy_tokens", first="By batch size on {data}"),
            source="zsre",
        ),
        Part(
            named(),
            tables=(end_table("edits", "A longer stream"), cohort_table("cohorts")),
            figures=along_figures("edits"),
            shows=best_and_worst("efficacy_strict", "growth"),
            along=True,
        ),
        WIDTHS,
    ),
)


def _orders(lab: Lab, queue: list[Fact]) -> Iterable[StreamPlan]:
    """Each arm on a shuffled queue and on the same facts clustered by relation."""
    for arm in chosen(lab.settings):
        yield lab.plan(arm, queue, label=f"{arm}, shuffled", against=f"{arm}, clustered")
        clustered = sorted(queue, key=lambda fact: fact.relation_key)
        yield lab.plan(arm, clustered, label=f"{arm}, clustered")


ORDER = StudySpec(
    name="order",
    title="Shuffled against clustered queues",
    question="Does it matter whether facts of one relation come together?",
    needs=("facts",),
    cannot_show="One shuffle and one clustering of a short queue; replications that saw shuffled "
    "queues live longer looked after thousands of edits.",
    parts=(
        Part(
            _orders,
            tables=(end_table("order", "By order"),),
            figures=(
                intervals(
                    "order",
                    "Shuffled minus clustered, over the same facts; 95 % intervals of a paired "
                    "bootstrap.",
                    paired(*MEASURES),
                ),
            ),
            shows=changes(*MEASURES, first="Shuffled minus clustered, in points"),
        ),
    ),
)
