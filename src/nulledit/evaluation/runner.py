"""One evaluation of a model on facts, and the comparison of two."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from nulledit.data.facts import Fact, quote
from nulledit.editor import Editor
from nulledit.errors import FactError
from nulledit.evaluation.generation import contains, generate_answers
from nulledit.evaluation.metrics import MEASURES, Rate, Score, per_fact, rates, score
from nulledit.evaluation.perplexity import Perplexity, perplexity
from nulledit.evaluation.protocols import queries_of
from nulledit.models.tokens import pad_id

CPU_POSITIONS = 512  # small chunks stay in a processor's cache
ACCELERATOR_POSITIONS = 8192

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What a model, as it was, made of some facts."""

    scores: tuple[Score, ...]
    """One per query."""
    answers: dict[str, str]
    """Fact id -> what the model says by itself after the fact's prompt; empty if not asked for."""
    rates: dict[str, Rate | None]
    """Preference and strict rates; None where the facts lack what the measure needs."""
    generation: Rate | None
    """Share of facts whose target is in what the model says; None if not asked for."""
    perplexity: Perplexity | None
    """Of the given windows; None if there were none."""

    def summary(self) -> dict[str, Any]:
        """Rates, generation and perplexity as plain data for JSON; nan and infinity are None."""
        return {
            "rates": {name: _plain(rate) for name, rate in self.rates.items()},
            "generation": _plain(self.generation),
            "perplexity": _plain(self.perplexity),
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary, every answer and every score as plain data for JSON."""
        return {
            **self.summary(),
            "answers": dict(self.answers),
            "scores": [_plain(item) for item in self.scores],
        }

    def rows(self) -> dict[str, dict[str, Any]]:
        """Fact id -> one value per measure, and "answer".

        Efficacy is True or False, the others are shares of the fact's prompts; None where the fact
        lacks what the measure needs. "answer" is None if generation was not asked for.
        """
        values = per_fact(self.scores)
        rows: dict[str, dict[str, Any]] = {}
        for fact_id in dict.fromkeys(item.query.fact_id for item in self.scores):
            row: dict[str, Any] = {measure: values[measure].get(fact_id) for measure in MEASURES}
            for measure in ("efficacy", "efficacy_strict"):
                row[measure] = None if row[measure] is None else row[measure] == 1
            rows[fact_id] = {**row, "answer": self.answers.get(fact_id)}
        return rows


def evaluate(
    editor: Editor,
    facts: Sequence[Fact],
    *,
    windows: Sequence[Sequence[int]] | None = None,
    generate: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate the editor's model, as it is now, on `facts`.

    `windows` of token ids are for perplexity. For the model before its edits, call this inside
    `with editor.base_weights():`. `progress` is told the stage ("scores", "answers", "perplexity"),
    what is done and what there is in all. Raises FactError for an id used twice.
    """
    ids = [fact.id for fact in facts]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise FactError(f"two facts have the id {quote(twice)}: results are kept by id")
    padding = pad_id(editor.tokenizer)
    queries = [query for fact in facts for query in queries_of(fact)]
    scores = score(
        editor.partial,
        editor.encoder,
        queries,
        pad_id=padding,
        positions=CPU_POSITIONS if editor.partial.device.type == "cpu" else ACCELERATOR_POSITIONS,
        progress=_stage(progress, "scores"),
    )
    answers: dict[str, str] = {}
    if generate:
        prompts = [fact.render(fact.prompt) for fact in facts]
        said = generate_answers(
            editor.model, editor.tokenizer, prompts, progress=_stage(progress, "answers")
        )
        answers = dict(zip(ids, said, strict=True))
    found = [float(contains(answers[fact.id], fact.target)) for fact in facts if generate]
    return Evaluation(
        scores=tuple(scores),
        answers=answers,
        rates=rates(scores),
        generation=Rate.of(found) if found else None,
        perplexity=perplexity(
            editor.partial, windows, padding, progress=_stage(progress, "perplexity")
        )
        if windows
        else None,
    )


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, samples: int = 10000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of b − a over pairs (before, after), and the 2.5 % and 97.5 % points of its bootstrap.

    Pairs are drawn with replacement, `samples` times. ValueError for lengths that differ, no pairs,
    or values that are not finite: leave a fact that lacks one of the two out of both.
    """
    before, after = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"expected pairs of numbers, found {before.shape} and {after.shape}")
    difference = after - before
    if not np.isfinite(difference).all():
        raise ValueError("expected finite numbers")
    n = len(difference)
    random = np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, 2**20 // n)  # draws held at once: about 8 MB
    for start in range(0, samples, step):
        size = min(step, samples - start)
        means[start : start + size] = difference[random.integers(n, size=(size, n))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return partial(progress, name) if progress else None


def _plain(value: Any) -> Any:
    """A result dataclass (or None) as plain data, with None for numbers that are not finite."""

    def clean(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return None if value is None else clean(asdict(value))
