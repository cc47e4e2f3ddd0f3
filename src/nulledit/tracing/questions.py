"""Facts to the questions that are traced: those that the model answers as the fact says it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nulledit.data.facts import Fact, quote
from nulledit.errors import FactError
from nulledit.evaluation.queries import Query
from nulledit.evaluation.scores import score
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import RowEncoder


@dataclass(frozen=True)
class Question:
    """A prompt, its subject's tokens, and the token whose probability is traced."""

    fact_id: str
    """Of the fact."""
    ids: tuple[int, ...]
    """Token ids of the prompt."""
    first: int
    """Index of the subject's first token."""
    last: int
    """Index of the subject's last token; the prompt goes on after it."""
    answer: int
    """Id of the answer's first token, the likeliest one after the prompt."""
    text: str
    """The answer, or that token where the fact names none."""
    given: bool
    """Whether the fact names the answer."""


@dataclass(frozen=True)
class Questions:
    """What can be traced, and what was left out."""

    known: tuple[Question, ...]
    """In the facts' order."""
    unknown: tuple[str, ...]
    """Ids of facts whose answer the model does not say."""
    at_the_end: tuple[str, ...]
    """Ids of facts whose prompt ends with its subject: the two places that are to be told apart,
    the subject's last token and the prompt's, are one."""

    @property
    def asked(self) -> int:
        """Number of facts that the model was asked about, known or not."""
        return len(self.known) + len(self.unknown)

    @property
    def unnamed(self) -> int:
        """How many of the known ones name no answer: there, what the model says is traced."""
        return sum(not question.given for question in self.known)


def ask(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    positions: int = 2048,
) -> Questions:
    """The questions of `facts`, each about its main prompt, and whether the model knows the answer.

    The answer is `old_answer`, or the target of a fact to forget; it is known if every token of it
    is the likeliest one. Without it, the model's likeliest token is taken. `positions` bounds the
    tokens that run together. Raises FactError for a prompt longer than the model's context.
    """
    answers = {f.id: f.target if f.forget else f.old_answer for f in facts}
    queries = [
        Query(f.id, "efficacy", f.render(f.prompt), answer, None)
        for f in facts
        if (answer := answers[f.id]) is not None
    ]
    scores = score(model, queries, positions=positions)
    said = {item.query.fact_id: item.strict for item in scores}
    found: list[Question] = []
    unknown, at_the_end = [], []
    for fact in facts:
        question = _question(model.encoder, fact, answers[fact.id])
        if question.last == len(question.ids) - 1:
            at_the_end.append(fact.id)
        elif said.get(fact.id, True):
            found.append(question)
        else:
            unknown.append(fact.id)
    open_ones = [i for i, question in enumerate(found) if not question.given]
    likeliest = _likeliest(model, [found[i] for i in open_ones], positions)
    for i, token in zip(open_ones, likeliest, strict=True):
        text = str(model.tokenizer.decode([token])).strip()
        found[i] = replace(found[i], answer=token, text=text)
    return Questions(tuple(found), tuple(unknown), tuple(at_the_end))


def _question(encoder: RowEncoder, fact: Fact, answer: str | None) -> Question:
    try:
        row = encoder.encode_template(fact.prompt, fact.subject, target=answer)
    except FactError as error:
        raise FactError(f"fact {quote(fact.id)}: {error}") from error
    ids = row.ids if answer is None else row.ids[: row.target_start]
    coded = encoder.tokenizer(fact.render(fact.prompt), return_offsets_mapping=True, verbose=False)
    start = fact.prompt.index("{}")
    spans = enumerate(coded["offset_mapping"])
    # A character that the tokenizer drops is in no token: then the next one's.
    first = next(i for i, (a, b) in spans if a < b and b > start)
    told = -1 if answer is None else row.target_ids[0]
    return Question(
        fact_id=fact.id,
        ids=ids,
        first=first,
        last=row.subject_last,
        answer=told,
        text=answer or "",
        given=answer is not None,
    )


@torch.no_grad()
def _likeliest(model: EditableModel, questions: Sequence[Question], positions: int) -> list[int]:
    """The likeliest token after each prompt."""
    found: dict[int, int] = {}
    for chunk in chunks_by_length([len(q.ids) for q in questions], positions):
        batch = model.collate([questions[i].ids for i in chunk])
        normed = model.run_normed(batch)
        ends = [len(questions[i].ids) - 1 for i in chunk]
        tokens = model.logits(normed[range(len(chunk)), ends]).argmax(-1).tolist()
        found.update(zip(chunk, tokens, strict=True))
    return [found[i] for i in range(len(questions))]
