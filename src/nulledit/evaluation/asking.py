"""One prompt on the base and on the edited model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.evaluation.generation import generate_answers
from nulledit.evaluation.queries import Query
from nulledit.evaluation.scores import probabilities
from nulledit.io.notebook import html_table
from nulledit.models.editable_model import EditableModel

MOST_TOKENS = 24
Heard = Callable[[str, str], None]
"""Called with a side, `edited` or `base`, and its answer so far."""


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
    heard: Heard | None = None,
) -> Answer:
    """Ask `prompt` of the base and the edited model of `editor`, which is as before afterwards.

    `max_tokens`: of the longest answer. `target`: a text whose probability is asked for. `model`:
    the editor's, asked in another form than facts are edited in. `heard` is called at each token.
    ConfigError for fewer tokens than one.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; expected a whole number of at least 1")
    model = model or editor.editable

    def one(side: str) -> tuple[str, float | None]:
        ear = partial(heard, side) if heard else None
        said = generate_answers(model, [prompt], max_new_tokens=max_tokens, heard=ear)[0]
        if target is None:
            return said, None
        return said, probabilities(model, [Query("asked", "efficacy", prompt, target, None)])[0]

    edited, after = one("edited")
    with editor.base_weights():
        base, before = one("base")
    return Answer(prompt, base, edited, target, before, after)


def parting(model: EditableModel, answer: Answer) -> tuple[str, str, str]:
    """What both answers begin with, and how the base's and the edited one go on, by tokens."""
    tokenizer = model.tokenizer
    base, edited = (
        list(tokenizer(f" {text}", add_special_tokens=False)["input_ids"])
        for text in (answer.base, answer.edited)
    )
    pairs = enumerate(zip(base, edited, strict=False))
    same = next((i for i, (x, y) in pairs if x != y), min(len(base), len(edited)))
    parts = (base[:same], base[same:], edited[same:])
    first, second, third = (str(tokenizer.decode(ids)) for ids in parts)
    return first, second, third
