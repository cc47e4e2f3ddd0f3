"""From a fact to the questions that are asked of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nulledit.data.facts import Fact

Kind = Literal["efficacy", "generalization", "specificity"]
KINDS: tuple[Kind, ...] = ("efficacy", "generalization", "specificity")


@dataclass(frozen=True)
class Query:
    """One prompt, the answer it should have, and the answer it should not have."""

    fact_id: str
    """The fact that is asked about."""
    kind: Kind
    """efficacy: the fact's own prompt; generalization: a paraphrase; specificity: a neighbour."""
    prompt: str
    """Full text, no slot."""
    answer: str
    """What should follow."""
    other: str | None
    """What should be less likely than `answer`; None where no such answer is known."""


def queries_of(fact: Fact) -> tuple[Query, ...]:
    """What CounterFact (arXiv:2202.05262) asks about `fact`.

    The target stands against the old answer on the fact's own prompt and on its paraphrases. A
    neighbour's answer stands against the target; a neighbour that has the target for an answer has
    nothing to stand against, and neighbours without an answer are left out.
    """
    queries = [
        Query(fact.id, "efficacy", fact.render(fact.prompt), fact.target, fact.old_answer),
        *(
            Query(fact.id, "generalization", text, fact.target, fact.old_answer)
            for text in fact.paraphrases
        ),
    ]
    for probe in fact.neighbours:
        if probe.answer is not None:
            same = probe.answer.casefold() == fact.target.casefold()
            other = None if same else fact.target
            queries.append(Query(fact.id, "specificity", probe.prompt, probe.answer, other))
    return tuple(queries)
