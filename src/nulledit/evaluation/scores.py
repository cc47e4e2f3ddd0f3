"""Preference, strict and token accuracy of answers, and their rates over facts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nulledit.data.facts import Fact, quote
from nulledit.errors import FactError
from nulledit.evaluation.queries import KINDS, Query, queries_of
from nulledit.evaluation.stats import Rate
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import Row, RowEncoder

LOGIT_POSITIONS = 512  # positions whose logits are held at once: 100 MB of float32 for 49,152 ids
MEASURES = tuple(kind + suffix for kind in KINDS for suffix in ("", "_strict", "_tokens"))
"""Of every evaluation; those of other kinds of queries come after, where there are any."""


@dataclass(frozen=True)
class Score:
    """What a model makes of one query."""

    query: Query
    """What was asked."""
    answer_nll: float
    """Mean negative log-probability of the answer's tokens, nats per token."""
    other_nll: float | None
    """The same of the other answer; None where there is none."""
    preferred: bool | None
    """CounterFact's score: the answer is likelier per token than the other; None without one."""
    strict: bool
    """Every token of an accepted answer is the likeliest one after the prompt and the tokens before
    it; where answers are unwanted, that is so of none."""
    tokens: float
    """zsRE's score: the share of the answer's tokens that are the likeliest ones, 0 to 1 (that are
    not, for an answer that is unwanted), of the accepted answer that has the largest. A token in
    front of the text (beginning of sequence) is never the answer's."""


def score(
    model: EditableModel,
    queries: Sequence[Query],
    *,
    positions: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Score `queries`, in their order.

    A text that several queries share is run once, and so is a prompt before two one-token answers.
    `positions` bounds the tokens that run together; results don't depend on it. `progress` receives
    answers done and in all. Raises FactError for a prompt longer than the model's
    context.
    """
    wanted = [_rows(model.encoder, query) for query in queries]
    rows = list(dict.fromkeys(row for asked in wanted for row in asked))
    found = _score_all(model, rows, positions, progress)
    scores = []
    for query, asked in zip(queries, wanted, strict=True):
        right = asked[: 1 + len(query.aliases)]
        nll = found[asked[0]][0]
        tokens = max(found[row][1] for row in right)
        other_nll = None if query.other is None else found[asked[-1]][0]
        preferred = None if other_nll is None else nll < other_nll
        strict, share = tokens == 1, tokens
        if query.unwanted:  # a model whose numbers are broken has forgotten nothing
            known = all(math.isfinite(found[row][0]) for row in right)
            strict, share = known and tokens < 1, 1 - tokens if known else 0.0
        scores.append(Score(query, nll, other_nll, preferred, strict, share))
    return scores


def facts_held(model: EditableModel, facts: Sequence[Fact]) -> list[bool]:
    """Of each fact, whether every token of its target is the likeliest in the model as it is.

    Of one to forget: whether not every token is.
    """
    return [found.strict for found in score(model, [queries_of(fact)[0] for fact in facts])]


def probabilities(model: EditableModel, queries: Sequence[Query]) -> list[float]:
    """Each query's answer's probability per token (geometric mean), in their order."""
    return [math.exp(-item.answer_nll) for item in score(model, queries)]


def row_probabilities(model: EditableModel, rows: Sequence[Row]) -> list[float]:
    """The probability per token (geometric mean) of each row's target, in their order."""
    found = _score_all(model, rows)
    return [math.exp(-found[row][0]) for row in rows]


def per_fact(scores: Iterable[Score]) -> dict[str, dict[str, float]]:
    """For each measure ("efficacy", "efficacy_strict", ...), fact id -> mean over its queries.

    A fact without a query of that kind (or, for preference, without another answer to any of them)
    is not in the measure's dictionary. Measures beyond `MEASURES` are there if a fact has them.
    """
    values: dict[str, dict[str, list[float]]] = {measure: {} for measure in MEASURES}
    for item in scores:
        kind, fact = item.query.kind, item.query.fact_id
        told = {kind: item.preferred, f"{kind}_strict": item.strict, f"{kind}_tokens": item.tokens}
        for measure, value in told.items():
            if value is not None:
                values.setdefault(measure, {}).setdefault(fact, []).append(value)
    return {
        measure: {fact: statistics.fmean(held) for fact, held in facts.items()}
        for measure, facts in values.items()
    }


def rates(scores: Iterable[Score]) -> dict[str, Rate | None]:
    """Each measure's mean over facts of the fact's own mean, as CounterFact's summary does.

    `n` counts the facts that have the measure; None if no fact has it.
    """
    return {
        measure: Rate.of(list(facts.values())) if facts else None
        for measure, facts in per_fact(scores).items()
    }


def token_losses(model: EditableModel, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-probability [n] (nats) of `targets` [n], and whether each is the likeliest [n].

    `states` [n, d] are the normed states that predict them. Softmax in float32 or better; logits
    are held for 512 positions at a time. Both results are on the CPU.
    """
    losses, hits = [], []
    for part, ids in zip(
        states.split(LOGIT_POSITIONS), targets.split(LOGIT_POSITIONS), strict=True
    ):
        logits = model.logits(part)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = ids.to(logits.device)
        loss = functional.cross_entropy(logits, ids, reduction="none")
        losses.append(loss.cpu())
        hits.append(((logits.argmax(-1) == ids) & loss.isfinite()).cpu())
    return torch.cat(losses), torch.cat(hits)


def _rows(encoder: RowEncoder, query: Query) -> list[Row]:
    """The prompt before each accepted answer, then before the other one if there is one."""
    try:
        return [encoder.encode(query.prompt, target=text) for text in query.said]
    except FactError as error:
        raise FactError(f"fact {quote(query.fact_id)}, {query.kind}: {error}") from error


def _carried(rows: Sequence[Row]) -> dict[tuple[int, ...], list[Row]]:
    """Input ids to run -> the rows that can be read off them.

    A row's last token predicts nothing, and a causal model's states don't see what comes later: an
    input that begins another one needs no run of its own. In order of ids, it stands just before
    one that it begins.
    """
    carried: dict[tuple[int, ...], list[Row]] = {}
    longest: tuple[int, ...] = ()
    for row in sorted(rows, key=lambda row: row.ids[:-1], reverse=True):
        ids = row.ids[:-1]
        if longest[: len(ids)] != ids:
            longest = ids
        carried.setdefault(longest, []).append(row)
    return carried


def _score_all(
    model: EditableModel,
    rows: Sequence[Row],
    positions: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Row, tuple[float, float]]:
    """`_score_rows` of all, `positions` tokens at a time."""
    carried = _carried(rows)
    inputs = list(carried)
    found: dict[Row, tuple[float, float]] = {}
    with frozen(model.model), torch.no_grad():
        for chunk in chunks_by_length([len(ids) for ids in inputs], positions):
            found.update(_score_rows(model, {inputs[i]: carried[inputs[i]] for i in chunk}))
            if progress:
                progress(len(found), len(rows))
    return found


def _score_rows(
    model: EditableModel, carried: dict[tuple[int, ...], list[Row]]
) -> dict[Row, tuple[float, float]]:
    """Each row's mean loss over its target, and the share of its tokens that are likeliest."""
    batch = model.collate(list(carried))
    normed = model.run_normed(batch)  # [inputs, length, d]
    rows = [(i, row) for i, group in enumerate(carried.values()) for row in group]
    lengths = [len(row.target_ids) for _, row in rows]
    at_input = [i for i, row in rows for _ in row.target_ids]
    at = [p for _, row in rows for p in range(row.target_start - 1, len(row.ids) - 1)]
    targets = torch.tensor([token for _, row in rows for token in row.target_ids])
    losses, hits = token_losses(model, normed[at_input, at], targets)
    parts = zip(rows, losses.split(lengths), hits.split(lengths), strict=True)
    return {row: (float(loss.mean()), int(hit.sum()) / len(hit)) for (_, row), loss, hit in parts}
