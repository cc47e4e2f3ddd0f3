"""From a fact to the questions that are asked of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from nulledit.data.facts import Fact, Probe, quote
from nulledit.errors import FactError
from nulledit.evaluation.generation import contains
from nulledit.evaluation.preservation import shipped_text
from nulledit.models.tokens import join_target

Kind = Literal[
    "efficacy",
    "generalization",
    "specificity",
    "portability",
    "other_relations",
    "efficacy_distracted",
    "specificity_distracted",
    "forgotten",
    "forgotten_paraphrases",
]
FORGOTTEN: tuple[Kind, ...] = ("forgotten", "forgotten_paraphrases")
"""Asked of facts to forget, in the place of efficacy and generalization: right is not to say it."""
KINDS: tuple[Kind, ...] = ("efficacy", "generalization", "specificity")
MIN_WORDS = 6  # of a sentence that distracts


@dataclass(frozen=True)
class Query:
    """One prompt, the answer it should have, and the answer it should not have."""

    fact_id: str
    """The fact that is asked about."""
    kind: Kind
    """efficacy: the fact's own prompt; generalization: a paraphrase; specificity: a neighbour;
    portability: what follows from the fact; other_relations: what else is true of its subject;
    distracted: after another text; forgotten: the own
    prompt, or the paraphrases, of a fact to forget."""
    prompt: str
    """Full text, no slot."""
    answer: str
    """What should follow; of the forgotten kinds, what should not."""
    other: str | None
    """What should be less likely than `answer`; None where no such answer is known."""
    aliases: tuple[str, ...] = ()
    """Other answers that count as `answer` does, but for preference."""

    @property
    def said(self) -> tuple[str, ...]:
        """Every text that is put after the prompt to score this query."""
        return (self.answer, *self.aliases, *([] if self.other is None else [self.other]))

    @property
    def unwanted(self) -> bool:
        """Whether `answer` is what should not be said."""
        return self.kind in FORGOTTEN


def queries_of(
    fact: Fact, *, distract: bool = False, texts: Sequence[str] | None = None
) -> tuple[Query, ...]:
    """What CounterFact (arXiv:2202.05262) asks about `fact`, and what follows from it.

    The target stands against the old answer on the fact's own prompt and on its paraphrases. A
    neighbour's answer stands against the target; a neighbour that has the target for an answer has
    nothing to stand against, and neighbours without an answer are left out. The same holds of
    other relations of the subject. What follows from the fact stands against nothing.

    Any accepted answer is right where an answer is asked for, the target's aliases included.

    Of a fact to forget, the answer that should be gone is asked for, on the fact's own prompt and
    on its paraphrases, and neighbours' answers stand against nothing.

    `distract` asks again after a text: the fact's own prompt after one of `texts` (by default
    sentences of the text that comes with the package) that has nothing to do with it, and its
    neighbours' after the edited statement, as CounterFact+ (arXiv:2305.17553) does. Facts to
    forget have no statement, so they are not asked again.
    """
    prompt = fact.render(fact.prompt)

    def of_fact(kind: Kind, text: str, other: str | None) -> Query:
        return Query(fact.id, kind, text, fact.target, other, fact.target_aliases)

    def of_probe(kind: Kind, text: str, probe: Probe, other: str | None) -> Query:
        return Query(fact.id, kind, text, probe.answer or "", other, probe.aliases)

    if fact.forget:
        return (
            of_fact("forgotten", prompt, None),
            *(of_fact("forgotten_paraphrases", text, None) for text in fact.paraphrases),
            *(of_probe("specificity", p.prompt, p, None) for p in _answered(fact.neighbours)),
            *(
                of_probe("other_relations", p.prompt, p, None)
                for p in _answered(fact.other_relations)
            ),
        )
    queries = [
        of_fact("efficacy", prompt, fact.old_answer),
        *(of_fact("generalization", text, fact.old_answer) for text in fact.paraphrases),
        *(
            of_probe("specificity", p.prompt, p, _rival(fact, p))
            for p in _answered(fact.neighbours)
        ),
        *(of_probe("portability", p.prompt, p, None) for p in _answered(fact.portability)),
        *(
            of_probe("other_relations", p.prompt, p, _rival(fact, p))
            for p in _answered(fact.other_relations)
        ),
    ]
    if distract:
        before = unrelated(fact, shipped_sentences() if texts is None else texts)
        text = join_target(before, prompt)
        queries.append(of_fact("efficacy_distracted", text, fact.old_answer))
        for probe in _answered(fact.neighbours):
            text, other = join_target(statement(fact), probe.prompt), _rival(fact, probe)
            queries.append(of_probe("specificity_distracted", text, probe, other))
    return tuple(queries)


def statement(fact: Fact) -> str:
    """The edited fact as a sentence: its prompt with the target and a full stop."""
    text = join_target(fact.render(fact.prompt), fact.target)
    return text if text.endswith((".", "!", "?", "。")) else text + "."


def unrelated(fact: Fact, texts: Sequence[str]) -> str:
    """The one of `texts` that a hash of the fact's id falls on, or the next one that suits.

    A text suits that names neither the subject nor an answer, new or old. FactError if none
    does.
    """
    names = [name for name in (fact.subject, *fact.answers, fact.old_answer) if name]
    start = int.from_bytes(sha256(fact.id.encode()).digest()[:8]) % max(len(texts), 1)
    for text in (*texts[start:], *texts[:start]):
        if not any(contains(text, name) for name in names):
            return text.strip()
    raise FactError(
        f"fact {quote(fact.id)}: none of {len(texts)} texts to distract with is free of "
        f"{', '.join(map(quote, names))}: give others"
    )


def shipped_sentences() -> tuple[str, ...]:
    """Sentences of the text that comes with the package, to distract with."""
    sentences = re.split(r"(?<=[.!?])\s+", shipped_text())
    return tuple(text for text in sentences if len(text.split()) >= MIN_WORDS)


def _answered(probes: Sequence[Probe]) -> Iterator[Probe]:
    """Those that have an answer."""
    return (probe for probe in probes if probe.answer is not None)


def _rival(fact: Fact, probe: Probe) -> str | None:
    """What the answer of a neighbour, or of another relation, stands against."""
    right = {answer.casefold() for answer in (probe.answer or "", *probe.aliases)}
    return None if fact.target.casefold() in right else fact.target
