"""What a model makes of facts before they are edited: tokens, answers, and keys that they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nulledit.data.facts import Fact, quote
from nulledit.errors import BadRecordsError, FactError
from nulledit.evaluation.generation import answer_room, fact_answers, says_any
from nulledit.evaluation.old_answers import says_old_answer
from nulledit.models.editable_model import EditableModel
from nulledit.models.tokens import Row, RowEncoder


@dataclass(frozen=True)
class Outlook:
    """One fact, seen by the model that is to be edited."""

    fact: Fact
    """As it was given."""
    tokens: int
    """Of the target."""
    lone_space: bool
    """The target's first token is nothing but white space, which tells little of the answer."""
    says: str
    """The model's own answer to the fact's prompt, greedy, to the first newline."""
    shares_key: tuple[str, ...]
    """Ids of other facts whose tokens up to the subject's last one are the same: at the first
    edited layer they have one key, and their values are optimised together."""

    @property
    def knows_target(self) -> bool:
        """Whether an answer that is to be written is said already."""
        return says_any(self.says, self.fact.answers)

    @property
    def says_old_answer(self) -> bool | None:
        """Whether the old answer is what the model says; None without an old answer."""
        return says_old_answer(self.fact, self.says)

    @property
    def remarks(self) -> str:
        """What is worth knowing before it is written; empty if nothing is."""
        said = []
        if self.says_old_answer is False:
            said.append(f"not the old answer {self.fact.old_answer}")
        if self.knows_target and not self.fact.forget:
            said.append("the target already")
        if self.lone_space:
            said.append("a lone space first")
        if self.shares_key:
            said.append(f"key of {', '.join(self.shares_key[:2])}")
        return "; ".join(said)


def outlook(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Outlook, ...]:
    """What the model makes of each of `facts`, asked in the model's form.

    BadRecordsError for facts that the tokenizer or the model's context can't hold.
    """
    rows = _rows(model.encoder, facts)
    sharing: dict[tuple[int, ...], list[str]] = {}
    for fact, row in zip(facts, rows, strict=True):
        sharing.setdefault(row.upto_subject().ids, []).append(fact.id)
    said = fact_answers(model, facts, progress)
    return tuple(
        Outlook(
            fact=fact,
            tokens=len(row.target_ids),
            lone_space=not str(model.tokenizer.decode(list(row.target_ids[:1]))).strip(),
            says=answer,
            shares_key=tuple(i for i in sharing[row.upto_subject().ids] if i != fact.id),
        )
        for fact, row, answer in zip(facts, rows, said, strict=True)
    )


def _rows(encoder: RowEncoder, facts: Sequence[Fact]) -> list[Row]:
    rows, bad = [], []
    for fact in facts:
        try:
            encoder.leaving(answer_room(encoder, fact)).encode(fact.render(fact.prompt))
            rows.append(encoder.encode_template(fact.prompt, fact.subject, target=fact.target))
        except FactError as error:
            bad.append(f"fact {quote(fact.id)}: {error}")
    if bad:
        source = f"{len(bad)} of {len(facts)} facts don't fit the model"
        raise BadRecordsError(source, tuple(bad), skippable=0, read_as="")
    return rows
