"""What a study will take, from its plans and a short timing of the model."""

from __future__ import annotations

import time
from typing import Any

import torch

from nulledit.models.layouts import frozen
from nulledit.studies.context import WINDOW, Lab
from nulledit.studies.results import Work
from nulledit.studies.stream import StreamPlan

ASKED = 60  # tokens of one fact's questions and answers
WRITTEN = 60  # tokens' worth of reading that a free answer of 12 tokens costs
ITEM = 130  # tokens of one question of a task
BACKWARD = 2.2  # a step there and back over reading alone
TAIL = 25  # positions of one fact that a step runs
HEAD = 160  # tokens of one fact that are read once
USUAL = 0.55  # share of the allowed steps that a fact takes


def estimate(lab: Lab, work: Work) -> dict[str, Any]:
    """Seconds by stage; values that another stream of the study has in common count once."""
    rate = _seconds_per_token(lab)
    optimised, batches, seen = 0.0, 0, set()
    for plan in work.plans:
        digest = plan.digest(lab.bench.base.history.base.hash)
        if digest in seen or _finished(lab, plan, digest):
            continue
        seen.add(digest)
        batches += len(plan.checkpoints()) - 1
        optimised += _values(plan, rate, shared=_first_batch(plan) in seen)
        seen.add(_first_batch(plan))
    seconds = {
        "edits": optimised + 6 * batches * rate * 100,
        "questions": rate * (ASKED * work.asked + WRITTEN * work.written),
        "perplexity": rate * WINDOW * lab.settings.get("windows", 0) * work.perplexities,
        "tasks": rate * ITEM * 6 * lab.settings.get("items", 0) * work.capabilities,
        "drift": rate * 20 * lab.settings.get("prompts", 0) * work.drifts,
        "other": rate * work.other_tokens,
    }
    return {
        "streams": len(work.plans),
        "to_edit": batches,
        "seconds": {name: round(value) for name, value in seconds.items() if value},
        "seconds_in_all": round(sum(seconds.values())),
    }


def _values(plan: StreamPlan, rate: float, *, shared: bool) -> float:
    facts = len(plan.facts) - (min(plan.batch_size, len(plan.facts)) if shared else 0)
    places = len(plan.recipe.layers) if plan.recipe.values.at == "each" else 1
    each = HEAD + plan.recipe.values.steps * USUAL * TAIL * BACKWARD
    return rate * facts * places * each


def _first_batch(plan: StreamPlan) -> tuple[Any, ...]:
    first = tuple(fact.id for fact in plan.facts[: plan.batch_size])
    return (first, plan.recipe.layers[-1:], plan.recipe.values, plan.seed)


def _finished(lab: Lab, plan: StreamPlan, digest: str) -> bool:
    """Whether it was edited to its end before."""
    marks = lab.bench.folder / "streams" / digest / "marks.json"
    return marks.is_file() and f'"{len(plan.facts)}"' in marks.read_text(encoding="utf-8")


def _seconds_per_token(lab: Lab) -> float:
    model, spent = lab.bench.model, []
    length = min(200, lab.bench.model.encoder.max_length)
    batch = model.collate([[0] * length])
    with frozen(model.model), torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            model.run(batch)
            spent.append(time.perf_counter() - start)
    return sorted(spent)[1] / length
