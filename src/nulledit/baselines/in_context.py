"""Facts in the prompt: the unedited model reads the facts, then is asked about them.

In-context editing as in RippleEdits (arXiv:2307.12976, "Imagine that ..."). No weight changes;
each question pays for the tokens in front of it, and the model's context bounds how many facts
there can be.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from nulledit.data.facts import Fact, quote
from nulledit.editing.call_log import Progress
from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.generation import answer_room, generate_answers, says_any
from nulledit.evaluation.queries import Query, queries_of
from nulledit.evaluation.runner import Evaluation
from nulledit.evaluation.scores import rates, score
from nulledit.evaluation.stats import Rate
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import RowEncoder, join_target

SLOT = "{statement}"
CPU_POSITIONS = 512  # small chunks stay in a processor's cache
ACCELERATOR_POSITIONS = 8192


def in_context(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    preface: str = "Imagine that {statement}. ",
    crowd: int = 0,
    seed: int = 0,
    generate: bool = True,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate `model` on `facts` with their statements in front of every prompt, in plain text.

    For the model before its edits, call this inside `with editor.base_weights():`.
    `crowd` 0: a fact's own statement alone, as if a retriever never missed. Above 0: that many of
    the other facts' statements as well, in an order drawn with `seed`; with len(facts) − 1 all
    facts are in every prompt, in one order. A neighbour's prompt gets the same text in front as the
    fact it belongs to, so specificity says what the statements do to questions they don't answer.
    Scores keep the queries without that text, and pair with those of `evaluate`. Perplexity is
    None: the text is of the questions, and other text is read as by the unedited model.

    Raises FactError for an id used twice and for a prompt that doesn't fit the model's context.
    """
    prefaces = prefaces_of(facts, preface=preface, crowd=crowd, seed=seed)
    asked = [query for fact in facts for query in queries_of(fact)]
    told = [replace(query, prompt=prefaces[query.fact_id] + query.prompt) for query in asked]
    heard = facts if generate else []
    prompts = [prefaces[fact.id] + fact.render(fact.prompt) for fact in heard]
    model = model.plain
    _check_room(model.encoder, facts, told, prompts, crowd)
    scores = score(
        model,
        told,
        positions=model.positions(CPU_POSITIONS, ACCELERATOR_POSITIONS),
        progress=partial(progress, "scores") if progress else None,
    )
    said = generate_answers(
        model,
        prompts,
        max_new_tokens=[answer_room(model.encoder, fact) for fact in heard],
        progress=partial(progress, "answers") if progress else None,
    )
    scores = [replace(item, query=query) for item, query in zip(scores, asked, strict=True)]
    answered = list(zip(heard, said, strict=True))
    found = {fact.id: says_any(text, fact.answers) for fact, text in answered}
    return Evaluation(
        scores=tuple(scores),
        answers={fact.id: text for fact, text in answered},
        rates=rates(scores),
        generation=Rate.of([float(hit) for hit in found.values()]) if found else None,
        perplexity=None,
        says_target=found,
    )


def statement_of(fact: Fact) -> str:
    """The fact as one sentence without its full stop: its main prompt and the target."""
    return join_target(fact.render(fact.prompt), fact.target)


def prefaces_of(facts: Sequence[Fact], *, preface: str, crowd: int, seed: int) -> dict[str, str]:
    """Fact id -> the text in front of that fact's prompts.

    All texts keep one order of facts drawn with `seed`; which others stand beside a fact is drawn
    for each, so that it doesn't hang on its place in `facts`.
    """
    by_id = {fact.id: fact for fact in facts}
    if len(by_id) < len(facts):
        ids = [fact.id for fact in facts]
        twice = next(i for i in ids if ids.count(i) > 1)
        raise FactError(f"two facts have the id {quote(twice)}: results are kept by id")
    if preface.count(SLOT) != 1:
        raise ConfigError(f"preface is {preface!r}; expected exactly one {SLOT}")
    if not 0 <= crowd <= max(len(facts) - 1, 0):
        raise ConfigError(
            f"crowd is {crowd}; expected 0 to {max(len(facts) - 1, 0)}, the number of other facts"
        )
    ids = sorted(by_id)
    order = random.Random(seed).sample(ids, len(ids))
    told = {fact.id: preface.replace(SLOT, statement_of(fact), 1) for fact in facts}
    texts = {}
    for own in by_id:
        others = [other for other in ids if other != own]
        chosen = {own, *random.Random(f"{seed} {own}").sample(others, crowd)}
        texts[own] = "".join(told[i] for i in order if i in chosen)
    return texts


def _check_room(
    encoder: RowEncoder,
    facts: Sequence[Fact],
    queries: Sequence[Query],
    prompts: Sequence[str],
    crowd: int,
) -> None:
    """Refuse what doesn't fit before anything runs; generation needs room for its answer."""
    needed = [
        (query.fact_id, len(_ids(encoder, join_target(query.prompt, answer))))
        for query in queries
        for answer in query.said
    ]
    needed += [
        (fact.id, len(_ids(encoder, prompt)) + answer_room(encoder, fact))
        for fact, prompt in zip(facts, prompts, strict=False)
    ]
    for fact_id, length in needed:
        if length > encoder.max_length:
            advice = "lower crowd" if crowd else "shorten the fact's texts or the preface"
            raise FactError(
                f"fact {quote(fact_id)}: with {crowd + 1} statements in front, prompt and answer "
                f"take {length} tokens, more than the model's context of {encoder.max_length}: "
                f"{advice}"
            )


def _ids(encoder: RowEncoder, text: str) -> list[int]:
    return list(encoder.tokenizer(text, verbose=False)["input_ids"])
