"""A talk with the base and the edited model at once, each in its own words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from nulledit.config import ChatSettings
from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.evaluation.generation import contains, generate_reply
from nulledit.evaluation.scores import row_probabilities
from nulledit.models.chat import QUESTION_MARKS
from nulledit.models.tokens import Row

MOST_TOKENS = 200
"""Of an answer."""
LEAST_TOKENS = 16
"""That the model's context must have left for one; it may have room for fewer than asked for."""
MOST_FACTS = 5
"""Whose targets' probabilities are reported of one prompt."""

Tell = Callable[[str, str], None]
"""Side ("base" or "edited"), and a piece of what it says."""


@dataclass(frozen=True)
class Asked:
    """A fact in the model whose subject stands in a prompt."""

    id: str
    """Of the fact."""
    target: str
    """What it should make the model say."""
    base_probability: float
    """Of the target in the base, per token (geometric mean), where the answer begins: after the
    fact's own prompt, as the first words of the answer, if that is no question."""
    edited_probability: float
    """The same in the edited model."""


@dataclass(frozen=True)
class Exchange:
    """One prompt and both answers."""

    prompt: str
    """As it was given."""
    base: str
    """The base's answer, greedy."""
    edited: str
    """The edited model's."""
    facts: tuple[Asked, ...]
    """Facts whose subjects the prompt names: those whose prompt it is first, five at most."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"facts": [asdict(fact) for fact in self.facts]}


class Conversation:
    """A talk with both sides of an editor, which is as before after each prompt.

    In the chat template each side reads its own earlier answers. As plain text each prompt is a
    text to go on with, up to a newline, and there is no history.
    """

    def __init__(
        self, editor: EditEngine, chat: ChatSettings | None, *, max_tokens: int = MOST_TOKENS
    ):
        """`chat`: the template's settings, of which the system prompt counts; None: plain text.

        `max_tokens`: of the longest answer. ModelError if the tokenizer has no template.
        """
        self.editor, self.max_tokens = editor, max_tokens
        self.model = editor.editable.in_chat(chat and replace(chat, plain=False))
        self.said: dict[str, list[str]] = {"base": [], "edited": []}
        """By side, what the user and the model said in turn."""

    def reset(self) -> None:
        """Forget what was said."""
        for texts in self.said.values():
            texts.clear()

    def say(self, prompt: str, tell: Tell = lambda side, piece: None) -> Exchange:
        """Answer `prompt` on both sides; FactError if the model's context has no room for that.

        A prompt that was not answered on both sides, for whatever reason, leaves no trace.
        """
        facts = self._named(prompt)
        with self.editor.base_weights():
            base, before = self._side("base", prompt, facts, tell)
        edited, after = self._side("edited", prompt, facts, tell)
        if self.model.chat:
            self.said["base"] += [prompt, base]
            self.said["edited"] += [prompt, edited]
        told = zip(facts, before, after, strict=True)
        return Exchange(
            prompt, base, edited, tuple(Asked(f.id, f.target, p, q) for f, p, q in told)
        )

    def _side(
        self, side: str, prompt: str, facts: list[Fact], tell: Tell
    ) -> tuple[str, list[float]]:
        """The answer of the model as it is, and the probability of each fact's target."""
        row = self._row(side, prompt, room=min(self.max_tokens, LEAST_TOKENS))
        text = generate_reply(
            self.model,
            row,
            max_new_tokens=min(self.max_tokens, self.model.context - len(row.ids)),
            first_line=not self.model.chat,
            tell=lambda piece: tell(side, piece),
        )
        return text, row_probabilities(
            self.model, [self._row(side, prompt, fact=fact) for fact in facts]
        )

    def _row(self, side: str, prompt: str, *, fact: Fact | None = None, room: int = 0) -> Row:
        """What the model reads; with a `fact` up to the end of its target."""
        encoder = self.model.encoder.leaving(room)
        own = fact.render(fact.prompt) if fact else ""
        if not self.model.chat:
            return encoder.encode(own or prompt, target=fact.target if fact else None)
        begun = "" if own.endswith(QUESTION_MARKS) else own
        return encoder.reply(
            [*self.said[side], prompt], begun=begun, target=fact.target if fact else None
        )

    def _named(self, prompt: str) -> list[Fact]:
        """Facts in the model whose subjects stand in `prompt`."""
        found = [fact for fact in self.editor.facts if contains(prompt, fact.subject)]
        found.sort(key=lambda fact: not contains(prompt, fact.render(fact.prompt)))
        return found[:MOST_FACTS]
