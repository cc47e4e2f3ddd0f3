"""Whether an answer that a model should have forgotten still comes up in what it says."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nulledit.data.facts import Fact, quote
from nulledit.data.readers import FactFile, Facts
from nulledit.editing.engine import EditEngine
from nulledit.editing.unlearning import blinded, telling
from nulledit.errors import FactError
from nulledit.evaluation.fluency import generation_entropy
from nulledit.evaluation.generation import contains, generate_answers
from nulledit.evaluation.scores import token_losses
from nulledit.evaluation.stats import Rate
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen
from nulledit.models.tokens import Row

TOKENS = 20  # of a greedy continuation
ANSWER_TOKENS = 16  # of an answer that is found: a date may take ten
LIKELY = 0.1  # chance of a telling token from which on the answer is often said
# What ends an answer; not within "9,001", "July 20, 1969", "3.5" or "10:30".
_END = re.compile(r"[.;:!?](?=\s|$)|,(?=\s+\D|\s*$)|[。、，；：！？\n(]")


@dataclass(frozen=True)
class Said:
    """What a model says after one prompt."""

    prompt: str
    """Full text, no slot."""
    says: str
    """The greedy continuation, over newlines, without the prompt."""
    leaks: bool
    """Whether the answer stands in it as whole words, but within the subject's own name."""
    chance: float
    """Probability of the answer's telling token after the prompt and what of the answer comes
    before it, 0 to 1."""


@dataclass(frozen=True)
class Recall:
    """What a model still knows of one answer."""

    fact_id: str
    """The fact."""
    answer: str
    """What should be gone."""
    place: int
    """Which of its tokens tells it, from 0 (`telling`)."""
    token: str
    """That token, without the space in front."""
    own: Said
    """After the fact's own prompt."""
    paraphrases: tuple[Said, ...]
    """After its paraphrases."""
    entropy: float | None
    """Mean generation entropy of the texts with their prompts, bits (`fluency`); None where all are
    too short."""


def recall_of(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    tokens: int = TOKENS,
    before: Sequence[Recall] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Recall]:
    """What the model, as it is now, still says of the facts' targets.

    Greedy continuations of `tokens` tokens after the own prompt and each paraphrase. For the model
    before its edits, call this inside `with editor.base_weights():`. `before`: what was found of
    the same facts earlier, to read the same tokens again: a model that has forgotten can't show
    which of them tells the answer. `progress` receives texts done and texts in all. FactError for
    a prompt that leaves no room in the model's context.
    """
    places = [r.place for r in before] if before else [_telling(model, fact) for fact in facts]
    asked = [
        (i, fact, text)
        for i, fact in enumerate(facts)
        for text in (fact.render(fact.prompt), *fact.paraphrases)
    ]
    prompts = [text for *_, text in asked]
    told = generate_answers(
        model, prompts, max_new_tokens=tokens, first_line=False, progress=progress
    )
    chances = _chances(model, [(text, fact.target, places[i]) for i, fact, text in asked])
    said: dict[int, list[Said]] = {}
    for (i, fact, prompt), says, chance in zip(asked, told, chances, strict=True):
        rest = _without_subject(says, fact)
        leaks = any(contains(rest, answer) for answer in fact.answers)
        said.setdefault(i, []).append(Said(prompt, says, leaks, chance))
    return [
        _recall(fact, place, _token(model, fact, place), said[i])
        for i, (fact, place) in enumerate(zip(facts, places, strict=True))
    ]


def doubts(recalls: Sequence[Recall]) -> list[str]:
    """A line for each fact whose text and whose chance do not agree on whether it is forgotten."""
    lines = []
    for recall in recalls:
        own, answer = recall.own, quote(recall.answer)
        if own.chance >= LIKELY and not own.leaks:
            lines.append(
                f"{recall.fact_id}: the text no longer holds {answer}, but {quote(recall.token)}, "
                f"which tells it, still has a chance of {own.chance:.2g}: it is hardly forgotten"
            )
        if own.leaks and own.chance < LIKELY:
            lines.append(
                f"{recall.fact_id}: {quote(recall.token)} has a chance of only {own.chance:.2g} "
                f"right after the prompt, but the text comes to {answer} all the same: it is not "
                "forgotten"
            )
    return lines


def summary(recalls: Sequence[Recall]) -> dict[str, Any]:
    """Rates over facts as plain data: leaks after own prompts and paraphrases, chance, entropy.

    A fact's share of paraphrases counts once; None where no fact has the measure.
    """
    bits = [r.entropy for r in recalls if r.entropy is not None]
    shares = [statistics.fmean(s.leaks for s in r.paraphrases) for r in recalls if r.paraphrases]
    values = {
        "leaks": [float(r.own.leaks) for r in recalls],
        "leaks_in_paraphrases": shares,
        "chance": [r.own.chance for r in recalls],
        "entropy": bits,
    }
    return {name: asdict(Rate.of(held)) if held else None for name, held in values.items()}


def find_answer(model: EditableModel, subject: str, prompt: str) -> str:
    """What the model, as it is now, answers to `prompt` about `subject`.

    `prompt` is a template with one slot. Of the greedy continuation, the words up to the one that
    gains most by knowing the subject, and what goes on its name or its number after it: "the
    Atlantic Ocean" of "the Atlantic Ocean which lies between". FactError where the model says no
    word, or control characters.
    """
    question = Fact(subject=subject, prompt=prompt, target="?")
    text = question.render(question.prompt)
    (told,) = generate_answers(model, [text], max_new_tokens=ANSWER_TOKENS)
    words = _END.split(told, maxsplit=1)[0].split()
    if not words or not all(word.isprintable() for word in words):
        raise FactError(
            f"the model says {quote(told)} to {quote(text)}, which is no answer: "
            "give the answer to forget"
        )
    asked = replace(question, target=" ".join(words))
    row, hidden = blinded(model.encoder, asked, asked.prompt)
    with frozen(model.model):
        place = telling(model, row, hidden)
    end = row.target_start + place + 1
    upto = str(model.tokenizer.decode(list(row.ids[row.target_start : end]))).split()
    n = max(1, len(upto))
    while n < len(words) and (words[n][0].isupper() or words[n][0].isdigit()):
        n += 1
    return " ".join(words[:n])


def asked_to_forget(
    editor: EditEngine, subject: str, prompt: str, target: str | None
) -> tuple[Fact, str]:
    """The fact to forget, as the one in the model that asks the same if there is one.

    And where its answer comes from: if none was given, from the edit that is in the model, else
    from what the base says. What was forgotten already stays so.
    """
    asked = Fact(subject, prompt, target or "?")
    same = (f for f in editor.facts if f.subject == asked.subject and asked.prompt in f.prompts)
    held = next(same, None)
    if target is not None:
        return (held or asked).forgotten(target), "as --target says"
    if held and held.forget:
        return held, f"which {held.id} suppresses already"
    if held:
        return held.forgotten(), f"which the edit {held.id} wrote"
    with editor.base_weights():
        target = find_answer(editor.editable, asked.subject, asked.prompt)
    return asked.forgotten(target), f"which the base says to {asked.render(asked.prompt)!r}"


def with_answers(editor: EditEngine, given: Facts) -> Facts:
    """`given`, where records without a target have the answer that `asked_to_forget` finds."""
    if isinstance(given, Mapping):
        return _answered(editor, given)
    if isinstance(given, str | bytes | Path | Fact | FactFile) or not isinstance(given, Iterable):
        return given  # a file's facts name theirs
    return [_answered(editor, item) for item in given]


def _answered(editor: EditEngine, record: Any) -> Any:
    """The fact of a record with subject and prompt alone, to be forgotten; others as they are."""
    asks = isinstance(record, Mapping) and {"subject", "prompt"} <= set(record)
    if not asks or record.get("target") is not None:
        return record
    more = {name: held for name, held in record.items() if name != "target"}
    fact, _ = asked_to_forget(editor, record["subject"], record["prompt"], None)
    return {**more, "target": fact.target} if len(more) > 2 else fact


def _without_subject(text: str, fact: Fact) -> str:
    """`text` without the subject, where that would be taken for the answer ("Dutch Velm": Dutch).

    An answer may hold the subject in turn ("Mexico City" of Mexico): then all of the text counts.
    """
    return text.replace(fact.subject, "|") if contains(fact.subject, fact.target) else text


def _telling(model: EditableModel, fact: Fact) -> int:
    """Place of the telling token in the fact's target, as the model is now."""
    row, hidden = blinded(model.encoder, fact, fact.prompt)
    with frozen(model.model):
        return telling(model, row, hidden)


def _token(model: EditableModel, fact: Fact, place: int) -> str:
    row = model.encoder.encode_template(fact.prompt, fact.subject, target=fact.target)
    return str(model.tokenizer.decode([row.target_ids[place]])).strip()


def _recall(fact: Fact, place: int, token: str, said: Sequence[Said]) -> Recall:
    bits = [generation_entropy(f"{s.prompt} {s.says}") for s in said]
    known = [b for b in bits if b is not None]
    entropy = statistics.fmean(known) if known else None
    return Recall(fact.id, fact.target, place, token, said[0], tuple(said[1:]), entropy)


def _chances(model: EditableModel, asked: Iterable[tuple[str, str, int]]) -> list[float]:
    """Probability of the target's token at the place, for each prompt, target and place."""
    rows: list[Row] = []
    ends: list[int] = []  # where the token stands; after another prompt a target may have fewer
    for prompt, target, place in asked:
        row = model.encoder.encode(prompt, target=target)
        rows.append(row)
        ends.append(row.target_start + min(place, len(row.target_ids) - 1))
    inputs = [row.ids[:end] for row, end in zip(rows, ends, strict=True)]
    found = [0.0] * len(rows)
    with frozen(model.model), torch.no_grad():
        for chunk in chunks_by_length([len(ids) for ids in inputs], 1024):
            normed = model.run_normed(model.collate([inputs[i] for i in chunk]))
            last = [len(inputs[i]) - 1 for i in chunk]
            token = torch.tensor([rows[i].ids[ends[i]] for i in chunk])
            losses, _ = token_losses(model, normed[range(len(chunk)), last], token)
            for i, loss in zip(chunk, losses.tolist(), strict=True):
                found[i] = math.exp(-loss)
    return found
