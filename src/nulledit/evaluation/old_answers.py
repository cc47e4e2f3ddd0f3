"""The old answer of a fact against what the base says itself."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from nulledit.data.facts import Fact, quote
from nulledit.editing.engine import EditEngine
from nulledit.editing.session import some
from nulledit.evaluation.generation import contains, generate_answers
from nulledit.evaluation.runner import Evaluation

NO_TEXT = "\ufffd"  # stands for bytes that are no character
_CLAUSE = re.compile(r"(?:[^.,;:!?。、，！？]|[.,:](?=\w))+")


def with_base_answers(editor: EditEngine, facts: Sequence[Fact]) -> list[Fact]:
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


def says_old_answer(fact: Fact, answer_text: str) -> bool | None:
    """Whether the old answer of `fact` is in what the base says; None where there is none to say.

    Control characters, which no fact may hold, don't count.
    """
    if fact.old_answer is None or fact.forget:
        return None
    return contains(_printable(answer_text), _printable(fact.old_answer))


def disagreements(facts: Sequence[Fact], base: Evaluation) -> list[str]:
    """A notice where the old answers of `facts` are not what the base says; else nothing."""
    named = [
        (f, said) for f in facts if (said := says_old_answer(f, base.answers[f.id])) is not None
    ]
    wrong = [
        f"{f.id} (says {quote(base.answers[f.id])}, given {quote(f.old_answer or '')})"
        for f, said in named
        if not said
    ]
    if not wrong:
        return []
    return [
        f"old_answer is not what the base says in {len(wrong)} of {len(named)} facts with one, so "
        f"preference says little there: {some(wrong, 3)}; where there is none, --old-answers takes "
        "the base's own"
    ]


def first_clause(answer_text: str) -> str:
    """An answer up to the first mark that ends a clause: "Paris" of "Paris. It is a city".

    Or up to the first bytes that are no character.
    """
    whole = answer_text.partition(NO_TEXT)[0]  # it may be cut within a character
    found = _CLAUSE.match(_printable(whole).strip())
    return found[0].strip() if found else ""


def _printable(text: str) -> str:
    """Without control characters, and with spaces for bytes that are no text."""
    shown = (c for c in text if unicodedata.category(c) not in ("Cc", "Cs"))
    return "".join(shown).replace(NO_TEXT, " ")
