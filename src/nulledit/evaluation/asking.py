"""One prompt on the base and on the edited model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nulledit.editing.engine import EditEngine
from nulledit.evaluation.generation import generate_answers
from nulledit.evaluation.queries import Query
from nulledit.evaluation.scores import probabilities
from nulledit.io.notebook import html_table
from nulledit.models.editable_model import EditableModel

MOST_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """What both models say."""

    prompt: str
    """As it was asked."""
    base: str
    """The base's answer, greedy, to the first newline."""
    edited: str
    """The edited model's."""
    target: str | None = None
    """A text whose probability after the prompt was asked for."""
    base_probability: float | None = None
    """Of the target in the base, per token (geometric mean); None without a target."""
    edited_probability: float | None = None
    """The same in the edited model."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what was not asked for is left out."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def _repr_html_(self) -> str:
        p = (self.base_probability, self.edited_probability)
        odds = ["" if x is None else f"{x:.3g}" for x in p]
        head = ("", "answer", *([f"p of {self.target}"] if self.target else []))
        rows = [("base", self.base, odds[0]), ("edited", self.edited, odds[1])]
        return html_table(self.prompt, head, [row[: len(head)] for row in rows])


def ask(
    editor: EditEngine,
    prompt: str,
    *,
    target: str | None = None,
    max_tokens: int = MOST_TOKENS,
    model: EditableModel | None = None,
) -> Answer:
    """Ask `prompt` of the base and the edited model of `editor`, which is as before afterwards.

    `max_tokens`: of the longest answer. `target`: a text whose probability is asked for. `model`:
    the editor's, asked in another form than facts are edited in.
    """
    model = model or editor.editable

    def one() -> tuple[str, float | None]:
        said = generate_answers(model, [prompt], max_new_tokens=max_tokens)[0]
        if target is None:
            return said, None
        return said, probabilities(model, [Query("asked", "efficacy", prompt, target, None)])[0]

    edited, after = one()
    with editor.base_weights():
        base, before = one()
    return Answer(prompt, base, edited, target, before, after)
