"""The old answer of a fact against what the base says itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from nulledit.data.facts import Fact, quote
from nulledit.editing.editor import Editor
from nulledit.editing.session import some
from nulledit.evaluation.generation import contains, generate_answers
from nulledit.evaluation.runner import Evaluation

_CLAUSE = re.compile(r"(?:[^.,;:!?。、，！？]|[.,:](?=\w))+")


def with_base_answers(editor: Editor, facts: Sequence[Fact]) -> list[Fact]:
    """`facts`, where those that name no old answer have the base's own.

    One that already says the target, or nothing, gets none.
    """
    lacking = [f for f in facts if f.old_answer is None and not f.forget]
    prompts = [fact.render(fact.prompt) for fact in lacking]
    with editor.base_weights():
        said = generate_answers(editor.editable, prompts)
    own = {f.key: first_clause(answer) for f, answer in zip(lacking, said, strict=True)}
    return [
        replace(f, old_answer=own[f.key])
        if own.get(f.key) and not any(contains(own[f.key], answer) for answer in f.answers)
        else f
        for f in facts
    ]


def disagreements(facts: Sequence[Fact], base: Evaluation) -> list[str]:
    """A notice where the old answers of `facts` are not what the base says; else nothing."""
    wrong = [
        f"{f.id} (says {quote(base.answers[f.id])}, given {quote(f.old_answer)})"
        for f in facts
        if f.old_answer and not f.forget
        if not contains(_printable(base.answers[f.id]), f.old_answer)
    ]
    if not wrong:
        return []
    return [
        f"old_answer is not what the base says in {len(wrong)} of {len(facts)} facts, so "
        f"preference says little there: {some(wrong, 3)}; where there is none, --old-answers takes "
        "the base's own"
    ]


def first_clause(answer_text: str) -> str:
    """An answer up to the first mark that ends a clause: "Paris" of "Paris. It is a city"."""
    found = _CLAUSE.match(_printable(answer_text).strip())
    return found[0].strip() if found else ""


def _printable(text: str) -> str:
    """Without control characters, which no fact may hold."""
    return "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))
