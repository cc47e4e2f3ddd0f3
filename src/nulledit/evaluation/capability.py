"""General capability: six classification tasks as in the AlphaEdit paper (arXiv:2410.02355).

An answer is the choice with the highest log-likelihood. Beside weighted F1, each task has the
probability of the right answer, which still moves where a small model's choices are at chance.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.queries import Query
from nulledit.evaluation.runner import _plain
from nulledit.evaluation.scores import score
from nulledit.evaluation.stats import Rate, paired_bootstrap
from nulledit.evaluation.tasks import Item
from nulledit.io.settings import check_whole
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import RowEncoder, join_target

BOOTSTRAP_SAMPLES = 2000


@dataclass(frozen=True)
class ItemResult:
    """What a model makes of one item."""

    id: str
    """As in the item."""
    answer: int
    """Place of the right answer among the choices."""
    predicted: int | None
    """Place of the likeliest choice; None where two are equally likely or none is finite."""
    probability: float
    """Of the right answer, normalised over the choices; nan where the model gives no number."""
    log_likelihood: float
    """Of the right answer, summed over its tokens, nats; nan where it is not finite."""


@dataclass(frozen=True)
class TaskResult:
    """What a model makes of one task."""

    task: str
    """Name of the task."""
    n: int
    """Items."""
    f1: float
    """Weighted F1: each class's F1, weighted by its share of the items."""
    f1_standard_error: float
    """Of `f1`, by a seeded bootstrap of the items of each class; nan where a class has one item."""
    accuracy: Rate
    """Share of items whose likeliest choice is right."""
    chance_accuracy: float
    """Accuracy of always saying the commonest class."""
    chance_f1: float
    """Weighted F1 of always saying the commonest class."""
    probability: Rate
    """Mean probability of the right answer, normalised over the choices."""
    log_likelihood: Rate
    """Mean log-likelihood of the right answer, nats."""
    predicted: dict[str, int]
    """Choice -> how often it was the likeliest: shows a model that always says one thing."""
    undecided: int
    """Items without a likeliest choice; they count as wrong."""
    shortened: int
    """Items that were too long for the model's context and lost their beginning."""
    items: tuple[ItemResult, ...]
    """One per item, in the order asked."""

    def summary(self) -> dict[str, Any]:
        """All but the items as plain data for JSON; nan is None."""
        return {name: value for name, value in self.to_dict().items() if name != "items"}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data for JSON; nan is None."""
        found: dict[str, Any] = _plain(self)
        found["items"] = [_plain(item) for item in self.items]
        return found


@dataclass(frozen=True)
class _Prompt:
    text: str
    tokens: tuple[int, ...]  # of each choice
    shortened: bool


def capability(
    model: EditableModel,
    items: Sequence[Item],
    *,
    positions: int = 2048,
    shots: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, TaskResult]:
    """Ask `items` and return each task's result, by name.

    Log-likelihoods are summed over a choice's tokens, not divided by their number. The choices of
    an item share one run up to where they differ. `shots`: so many items of each task, its first,
    are shown with their answers in front of the others and not asked. A prompt too long for the
    model loses examples first, then the beginning of its passage. `positions` bounds the tokens
    that run together; `seed` is the bootstrap's; `progress` receives answers done and in all.
    """
    check_whole("seed", seed)
    asked, examples = _split(items, shots)
    prompts = [_fit(model.encoder, item, examples[item.task.name]) for item in asked]
    queries = [
        Query(item.id, "efficacy", prompt.text, choice, None)
        for item, prompt in zip(asked, prompts, strict=True)
        for choice in item.task.choices
    ]
    scores = iter(score(model, queries, positions=positions, progress=progress))
    results: dict[str, list[ItemResult]] = {}
    shortened: dict[str, int] = {}
    for item, prompt in zip(asked, prompts, strict=True):
        likelihoods = [-next(scores).answer_nll * tokens for tokens in prompt.tokens]
        name = item.task.name
        results.setdefault(name, []).append(_judge(item, likelihoods))
        shortened[name] = shortened.get(name, 0) + prompt.shortened
    choices = {item.task.name: item.task.choices for item in asked}
    return {
        name: _summarise(name, choices[name], found, shortened[name], seed)
        for name, found in results.items()
    }


def compare(
    before: Mapping[str, TaskResult], after: Mapping[str, TaskResult], *, seed: int = 0
) -> dict[str, tuple[float, float, float] | None]:
    """By task, how the right answer's probability moved: mean, and 2.5 % and 97.5 % points.

    Paired over items by `paired_bootstrap`. Items for which either model gives no number are left
    out; None where that leaves none. ValueError if the two did not answer the same items.
    """
    moved: dict[str, tuple[float, float, float] | None] = {}
    for name in before.keys() | after.keys():
        sides = [side[name].items if name in side else () for side in (before, after)]
        if [item.id for item in sides[0]] != [item.id for item in sides[1]]:
            raise ValueError(f"{name}: the two results are not of the same items")
    for name in before:
        pairs = [
            (a.probability, b.probability)
            for a, b in zip(before[name].items, after[name].items, strict=True)
            if math.isfinite(a.probability) and math.isfinite(b.probability)
        ]
        moved[name] = (
            paired_bootstrap([a for a, _ in pairs], [b for _, b in pairs], seed=seed)
            if pairs
            else None
        )
    return moved


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """Weighted F1 [...] of counts [..., classes, answers]: rows are truth, columns what was said.

    Answers beyond the classes (none given) are wrong for every class. F1 of a class is
    2·TP/(2·TP + FP + FN), 0 where nothing was right; its weight is the class's share of all.
    """
    classes = confusion.shape[-2]
    right = np.diagonal(confusion[..., :classes], axis1=-2, axis2=-1)  # TP [..., classes]
    true = confusion.sum(-1)  # TP + FN
    said = confusion[..., :classes].sum(-2)  # TP + FP
    f1 = 2 * right / np.maximum(true + said, 1)
    total: np.ndarray = (f1 * true).sum(-1) / true.sum(-1)
    return total


def _split(items: Sequence[Item], shots: int) -> tuple[list[Item], dict[str, list[str]]]:
    """The items to ask, and each task's solved examples."""
    if shots < 0:
        raise ConfigError(f"shots is {shots}; expected 0 or more examples")
    tasks: dict[str, list[Item]] = {}
    for item in items:
        tasks.setdefault(item.task.name, []).append(item)
    for name, found in tasks.items():
        if len(found) <= shots:
            raise ConfigError(
                f"{name}: {len(found)} items leave none to ask after {shots} examples: read more"
            )
    examples = {name: [_solved(item) for item in found[:shots]] for name, found in tasks.items()}
    return [item for found in tasks.values() for item in found[shots:]], examples


def _solved(item: Item) -> str:
    text = item.task.render(item.record)
    return join_target(text, item.task.choices[item.answer]) + "\n"


def _fit(encoder: RowEncoder, item: Item, examples: Sequence[str]) -> _Prompt:
    """The item's prompt in a form that leaves room for each choice in the model's context."""
    unbounded = RowEncoder(encoder.tokenizer, max_length=sys.maxsize, vocabulary=encoder.vocabulary)
    task = item.task
    kept, passage = list(examples), str(item.record[task.passage]).strip()
    shortened = False
    while True:
        text = "".join(kept) + task.render(item.record, **{task.passage: passage})
        rows = [unbounded.encode(text, target=choice) for choice in task.choices]
        over = max(len(row.ids) for row in rows) - encoder.max_length
        if over <= 0:
            return _Prompt(text, tuple(len(row.target_ids) for row in rows), shortened)
        shortened = True
        if kept:
            del kept[0]
        elif passage:
            passage = _without_beginning(encoder, passage, over)
        else:
            raise FactError(
                f"{item.id}: without its {task.passage} the prompt is still {over} tokens longer "
                f"than the model's context of {encoder.max_length}: leave the item out"
            )


def _without_beginning(encoder: RowEncoder, text: str, tokens: int) -> str:
    """`text` without its first `tokens` tokens; always shorter."""
    coded = encoder.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    starts = [start for start, _ in coded["offset_mapping"][tokens:]]
    return text[next((start for start in starts if start), len(text)) :].lstrip()


def _judge(item: Item, likelihoods: Sequence[float]) -> ItemResult:
    """The result of an item from its choices' log-likelihoods."""
    values = np.array(likelihoods)
    if not np.isfinite(values).all():
        return ItemResult(item.id, item.answer, None, math.nan, math.nan)
    weights = np.exp(values - values.max())
    best = np.flatnonzero(values == values.max())
    return ItemResult(
        item.id,
        item.answer,
        int(best[0]) if len(best) == 1 else None,
        float(weights[item.answer] / weights.sum()),
        float(values[item.answer]),
    )


def _summarise(
    task: str, choices: Sequence[str], items: Sequence[ItemResult], shortened: int, seed: int
) -> TaskResult:
    classes, n = len(choices), len(items)
    confusion = np.zeros((classes, classes + 1), dtype=np.int64)  # last column: undecided
    for item in items:
        confusion[item.answer, classes if item.predicted is None else item.predicted] += 1
    true, said = confusion.sum(1), confusion.sum(0)
    always = np.zeros_like(confusion)
    always[:, true.argmax()] = true
    return TaskResult(
        task=task,
        n=n,
        f1=float(weighted_f1(confusion)),
        f1_standard_error=_f1_error(confusion, seed),
        accuracy=Rate.of([float(item.predicted == item.answer) for item in items]),
        chance_accuracy=float(true.max() / n),
        chance_f1=float(weighted_f1(always)),
        probability=_rate([item.probability for item in items]),
        log_likelihood=_rate([item.log_likelihood for item in items]),
        predicted={choice: int(count) for choice, count in zip(choices, said, strict=False)},
        undecided=int(said[classes]),
        shortened=shortened,
        items=tuple(items),
    )


def _rate(values: Sequence[float]) -> Rate:
    """The mean; nan if one of the values is: leaving it out would flatter a broken model."""
    whole = all(map(math.isfinite, values))
    return Rate.of(values) if whole else Rate(math.nan, math.nan, len(values))


def _f1_error(confusion: np.ndarray, seed: int) -> float:
    """Standard error of weighted F1 over items drawn with replacement within their class.

    `read_tasks` fixes how many items a class has, so the draws do too. Drawing items of a class is
    drawing cells of its row of counts: one multinomial a sample.
    """
    true = confusion.sum(1)
    present = true > 0
    if (true[present] < 2).any():
        return math.nan
    draw = np.random.default_rng(seed)
    counts = np.zeros((BOOTSTRAP_SAMPLES, *confusion.shape), dtype=np.int64)
    for row in np.flatnonzero(present):
        shares = confusion[row] / true[row]
        counts[:, row] = draw.multinomial(true[row], shares, size=BOOTSTRAP_SAMPLES)
    return float(weighted_f1(counts).std(ddof=1))
