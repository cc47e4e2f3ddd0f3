"""What a study will take, from its plans and the costs of its model."""

from __future__ import annotations

from typing import Any

import torch

from nulledit.evaluation.costs import Costs, Shape, count_rows
from nulledit.studies.context import WINDOW, Lab
from nulledit.studies.results import Work
from nulledit.studies.stream import StreamPlan

ITEM = 130  # tokens of one question of a task
PROMPT = 20  # tokens of one whose hidden states are compared
USUAL = 0.55  # share of the allowed steps that a fact takes
SAMPLE = 50  # facts whose rows are counted


def estimate(lab: Lab, work: Work) -> dict[str, Any]:
    """Seconds by stage; values that another stream of the study has in common count once."""
    bench, settings = lab.bench, lab.settings
    model = bench.model
    shape = Shape.of(model.model, model.layout, dtype=model.model.dtype)
    device = model.device.type
    speeds = shape.speed(device), shape.speed(device, torch.float64)

    def costs_of(plan: StreamPlan) -> Costs:
        """Of a sample of its facts."""
        sample = plan.facts[:SAMPLE]
        rows = count_rows(sample, model.encoder, plan.recipe)
        return Costs.of(shape, plan.recipe, rows, len(sample), speeds)

    edits, batches, seen = 0.0, 0, set()
    for plan in work.plans:
        digest = plan.digest(bench.base.history.base.hash)
        if digest in seen or _finished(lab, plan, digest):
            continue
        seen.add(digest)
        n, size, costs = len(plan.facts), plan.batch_size, costs_of(plan)
        batches += len(plan.checkpoints()) - 1
        fresh = n - (min(size, n) if _first_batch(plan) in seen else 0)
        seen.add(_first_batch(plan))
        values = costs.begin + USUAL * plan.recipe.values.steps * costs.step
        edits += (n * costs.keys + fresh * values) / min(n, SAMPLE)
        edits += shape.solving(size, len(plan.recipe.layers), n) / speeds[1]
    asked = costs_of(work.plans[0])
    each = asked.queries / len(work.plans[0].facts[:SAMPLE])
    tokens = {
        "perplexity": WINDOW * settings.get("windows", 0) * work.perplexities,
        "tasks": ITEM * 6 * settings.get("items", 0) * work.capabilities,
        "drift": PROMPT * settings.get("prompts", 0) * work.drifts,
        "other": work.other_tokens,
    }
    seconds = {"edits": edits, "questions": each * work.asked + asked.answer * work.written}
    seconds |= {stage: asked.token * number for stage, number in tokens.items()}
    return {
        "streams": len(work.plans),
        "to_edit": batches,
        "seconds": {name: round(value) for name, value in seconds.items() if value},
        "seconds_in_all": round(sum(seconds.values())),
    }


def _first_batch(plan: StreamPlan) -> tuple[Any, ...]:
    first = tuple(fact.id for fact in plan.facts[: plan.batch_size])
    return (first, plan.recipe.layers[-1:], plan.recipe.values, plan.seed)


def _finished(lab: Lab, plan: StreamPlan, digest: str) -> bool:
    """Whether it was edited to its end before."""
    marks = lab.bench.folder / "streams" / digest / "marks.json"
    return marks.is_file() and f'"{len(plan.facts)}"' in marks.read_text(encoding="utf-8")
