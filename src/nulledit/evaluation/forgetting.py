"""Whether an answer that a model should have forgotten still comes up in what it says."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from nulledit.data.facts import Fact, quote
from nulledit.editing.ignorance import blinded, telling
from nulledit.editor import Editor
from nulledit.errors import FactError
from nulledit.evaluation.fluency import generation_entropy
from nulledit.evaluation.generation import contains, generate_answers
from nulledit.evaluation.metrics import Rate, token_losses
from nulledit.models.layouts import frozen
from nulledit.models.tokens import chunks_by_length, collate, pad_id

TOKENS = 20  # of a greedy continuation
ANSWER_TOKENS = 8  # of an answer that is found
_END = re.compile(r"[.,;:!?。、，；：！？\n(]")


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
    """Probability of the answer's first token behind the prompt, 0 to 1."""


@dataclass(frozen=True)
class Recall:
    """What a model still knows of one answer."""

    fact_id: str
    """The fact."""
    answer: str
    """What should be gone."""
    own: Said
    """Behind the fact's own prompt."""
    paraphrases: tuple[Said, ...]
    """Behind its paraphrases."""
    entropy: float | None
    """Mean generation entropy of the texts with their prompts, bits (`fluency`); None where all are
    too short."""


def recall_of(
    editor: Editor,
    facts: Sequence[Fact],
    *,
    tokens: int = TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Recall]:
    """What the editor's model, as it is now, still says of the facts' targets.

    Greedy continuations of `tokens` tokens behind the own prompt and each paraphrase. For the model
    before its edits, call this inside `with editor.base_weights():`. `progress` is told of texts
    done and texts in all. FactError for a prompt that leaves no room in the model's context.
    """
    asked = [(f, text) for f in facts for text in (f.render(f.prompt), *f.paraphrases)]
    prompts = [text for _, text in asked]
    told = generate_answers(
        editor.model,
        editor.tokenizer,
        prompts,
        max_new_tokens=tokens,
        first_line=False,
        encoder=editor.encoder,
        progress=progress,
    )
    chances = _chances(editor, asked)
    said: dict[int, list[Said]] = {}
    places = [i for i, fact in enumerate(facts) for _ in range(1 + len(fact.paraphrases))]
    for place, (fact, prompt), says, chance in zip(places, asked, told, chances, strict=True):
        leaks = contains(_without_subject(says, fact), fact.target)
        one = Said(prompt, says, leaks, chance)
        said.setdefault(place, []).append(one)
    return [_recall(fact, said[i]) for i, fact in enumerate(facts)]


def summary(recalls: Sequence[Recall]) -> dict[str, Any]:
    """Rates over facts as plain data: leaks behind own prompts and paraphrases, chance, entropy.

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


def find_answer(editor: Editor, subject: str, prompt: str) -> str:
    """What the editor's model, as it is now, answers to `prompt` about `subject`.

    `prompt` is a template with one slot. Of the greedy continuation, the words up to the one that
    gains most by knowing the subject, and what goes on its name behind it: "the Atlantic Ocean" of
    "the Atlantic Ocean which lies between". FactError where the model says no word.
    """
    question = Fact(subject=subject, prompt=prompt, target="?")
    text = question.render(question.prompt)
    (told,) = generate_answers(
        editor.model,
        editor.tokenizer,
        [text],
        max_new_tokens=ANSWER_TOKENS,
        encoder=editor.encoder,
    )
    words = _END.split(told, maxsplit=1)[0].split()
    if not words:
        raise FactError(
            f"the model says {quote(told)} to {quote(text)}, which is no answer: "
            "give the answer to forget"
        )
    asked = replace(question, target=" ".join(words))
    row, hidden = blinded(editor.encoder, asked, asked.prompt)
    with frozen(editor.model):
        place = telling(editor.partial, row, hidden)
    end = row.target_start + place + 1
    upto = str(editor.tokenizer.decode(list(row.ids[row.target_start : end]))).split()
    n = max(1, len(upto))
    while n < len(words) and words[n][0].isupper():
        n += 1
    return " ".join(words[:n])


def _without_subject(text: str, fact: Fact) -> str:
    """`text` without the subject, where that would be taken for the answer ("Dutch Velm": Dutch).

    An answer may hold the subject in turn ("Mexico City" of Mexico): then all of the text counts.
    """
    return text.replace(fact.subject, "|") if contains(fact.subject, fact.target) else text


def _recall(fact: Fact, said: Sequence[Said]) -> Recall:
    bits = [generation_entropy(f"{s.prompt} {s.says}") for s in said]
    known = [b for b in bits if b is not None]
    entropy = statistics.fmean(known) if known else None
    return Recall(fact.id, fact.target, said[0], tuple(said[1:]), entropy)


def _chances(editor: Editor, asked: Iterable[tuple[Fact, str]]) -> list[float]:
    """Probability of the target's first token behind each prompt."""
    rows = [editor.encoder.encode(prompt, target=fact.target) for fact, prompt in asked]
    inputs = [row.ids[: row.target_start] for row in rows]
    found = [0.0] * len(rows)
    with frozen(editor.model), torch.no_grad():
        for chunk in chunks_by_length([len(ids) for ids in inputs], 1024):
            batch = collate(
                [inputs[i] for i in chunk],
                pad_id=pad_id(editor.tokenizer),
                device=editor.partial.device,
            )
            normed = editor.partial.run_normed(batch)
            last = [len(inputs[i]) - 1 for i in chunk]
            first = torch.tensor([rows[i].target_ids[0] for i in chunk])
            losses, _ = token_losses(editor.partial, normed[range(len(chunk)), last], first)
            for i, loss in zip(chunk, losses.tolist(), strict=True):
                found[i] = math.exp(-loss)
    return found
