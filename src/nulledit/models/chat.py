"""A prompt in the model's chat template: where it stands in the rendered text, what follows it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nulledit.config import ChatSettings
from nulledit.errors import ModelError

TODAY = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(
        f" | replace('%{code}', '{text}')"
        for code, text in {
            **{"d": "26", "m": "07", "y": "24", "Y": "2024", "b": "Jul", "B": "July"},
            **{"a": "Fri", "A": "Friday", "H": "12", "M": "00", "S": "00"},
        }.items()
    )
    + " }}{% endmacro %}"
)
"""In front of a template that writes the date, so that a run renders the same text on any day: the
day that Llama 3's templates write where they know none. A function can't be given to a template."""
QUESTION_MARKS = ("?", "？", "؟")
_PROBE = "nulleditprobe"
_THOUGHT = re.compile(
    r"(<\|?|\[|◁)([\w:]*(?:think|thought|reason)\w*)(\|?>|\]|▷)\s*\Z", re.IGNORECASE
)
"""What begins a thought, where a template ends with one for the model to go on with: `<think>`,
`[THINK]`, `◁think▷`, `<|START_THINKING|>`."""
_BEGINS = re.compile(r"start|begin", re.IGNORECASE)


@dataclass(frozen=True)
class Framed:
    """A prompt inside the text that the model reads."""

    text: str
    """All of it, up to where the target begins."""
    starts: tuple[int, ...]
    """Indices in it where the prompt begins: in the user's turn, and in the assistant's if it
    begins with the prompt, too."""
    gap: str | None
    """What stands between it and a target; None: a space where the script uses one."""


class ChatForm:
    """Renders prompts by a tokenizer's own chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings):
        """ModelError if there is no template, or another one than `settings` were used with."""
        self.tokenizer = tokenizer
        try:
            template = tokenizer.get_chat_template()
        except ValueError as error:
            raise ModelError(
                "the model's tokenizer has no chat template: this is no chat model, ask it as "
                "plain text (leave --chat, or a recipe's chat, out; nulledit chat: --plain)"
                if tokenizer.chat_template is None
                else f"the model's chat template can't be used: {_line(error)}"
            ) from error
        found = hashlib.sha256(template.encode()).hexdigest()
        if settings.template not in ("", found):
            raise ModelError(
                f"the tokenizer's chat template has hash {found[:12]}, the recipe's "
                f"{settings.template[:12]}: put the tokenizer's own template back"
            )
        self.settings = replace(settings, template=found)
        """With the template's hash."""
        self._template = TODAY + template if "strftime_now" in template else template
        self._system, self._fold = self._system_turn()
        self._head, self._tail = self._frame([*self._system, _user(_PROBE)])

    @cached_property
    def default_system(self) -> str | None:
        """The system prompt that the template writes by itself where none is given."""
        try:
            before, after = self._frame([_system(_PROBE), _user("x")])
            plain = self._rendered([_user("x")])
        except (TemplateError, ModelError):
            return None  # no system role: nothing of the kind is written
        if not (plain.startswith(before) and plain.endswith(after)):
            return None  # no system turn without a system message
        return plain[len(before) : len(plain) - len(after)].strip() or None

    @property
    def can_be_bare(self) -> bool:
        """Whether the template writes no system prompt of its own if it is given an empty one."""
        default = self.default_system
        return default is None or default not in self._rendered([_system(""), _user(_PROBE)])

    @cached_property
    def gap(self) -> str:
        """What the template writes between the beginning of the assistant's turn and its text."""
        messages = [*self._system, _user(self._fold + "x")]
        between = self._between(messages, self._rendered(messages))
        return between if between.isspace() else ""

    @cached_property
    def _thought(self) -> str:
        """What closes a thought that the template opens: as its own assistant turns have it, if
        they begin with an empty one; else an empty line, as templates with a switch write it."""
        messages = [_user("x")]
        begun = self._said(messages, answering=True)
        opened = _THOUGHT.search(begun)
        if opened is None:
            return ""
        between, end = self._between(messages, begun), _end_of_thought(*opened.groups())
        return between if between.strip() == end else f"\n{end}\n\n"

    def _between(self, messages: list[dict[str, str]], begun: str) -> str:
        """What the template writes after `begun` and in front of an assistant's text."""
        spoken = [*messages, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._said(spoken, answering=False)
        except TemplateError:
            return ""
        if not text.startswith(begun) or _PROBE not in text:
            return ""
        return text[len(begun) : text.index(_PROBE)]

    def frame(self, prompt: str, *, context: str = "{}") -> Framed:
        """`prompt`, after what stands before the slot of `context`, as the user's turn.

        A prompt that ends with a question mark is asked as it is and answered from the beginning of
        the assistant's turn. ModelError if the template changes the text.
        """
        asks = prompt.endswith(QUESTION_MARKS)
        before, after = ("", "") if asks else self.settings.user.split("{}")
        prefix, suffix = context.split("{}", 1)
        lead = self._fold + prefix + before
        content = lead + prompt + after + suffix
        text = self._rendered([*self._system, _user(content)])
        shift = self._shift(text, content)
        starts = [len(self._head) + len(lead) - shift]
        if asks or not self.settings.assistant:
            return Framed(text, tuple(starts), self.gap)
        before, after = self.settings.assistant.split("{}")
        text += self.gap + before
        starts.append(len(text))
        return Framed(text + prompt + after, tuple(starts), None)

    def reply(self, texts: Sequence[str], *, begun: str = "") -> Framed:
        """A conversation up to where the model answers, in words that begin with `begun`.

        `texts`: the user's and the model's in turn; the first and the last are the user's. They
        stand as they are, without the wording around a prompt. ModelError if the template fails.
        """
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        turns[0] = _user(self._fold + texts[0])
        try:
            text = self._rendered([*self._system, *turns])
        except TemplateError as error:
            raise ModelError(f"the chat template fails on this talk: {_line(error)}") from error
        return Framed(text + self.gap + begun, (), None) if begun else Framed(text, (), self.gap)

    @cached_property
    def end(self) -> str:
        """What the template writes after an assistant's text; empty where it can't be told."""
        try:
            text = self._said(
                [_user("x"), {"role": "assistant", "content": _PROBE}], answering=False
            )
        except TemplateError:
            return ""
        return text.rpartition(_PROBE)[2].strip() if _PROBE in text else ""

    def _shift(self, text: str, content: str) -> int:
        """How many spaces the template took off the beginning of the user's turn."""
        if text.startswith(self._head) and text.endswith(self._tail):
            middle = text[len(self._head) : len(text) - len(self._tail)]
            if middle == content:
                return 0
            if middle == content.strip():
                return len(content) - len(content.lstrip())
        raise ModelError(
            f"the chat template changes a message, so no subject is found: {content!r}"
        )

    def _system_turn(self) -> tuple[list[dict[str, str]], str]:
        """Messages before the user's, and what stands before the user's text instead of them."""
        wanted = self.settings.system
        if wanted == "default":
            return [], ""
        if wanted != "none":
            try:
                text = self._rendered([_system(wanted), _user(_PROBE)])
            except TemplateError:
                text = ""  # Gemma's raises
            if wanted.strip() in text:
                return [_system(wanted)], ""
            return [], f"{wanted}\n\n"  # as templates without a system role do that fold it in
        default = self.default_system
        if default is None:
            return [], ""
        if not self.can_be_bare:
            raise ModelError(
                "the chat template writes its own system prompt also where an empty one is given: "
                "give --system default or a text"
            )
        return [_system("")], ""

    def _frame(self, messages: list[dict[str, str]]) -> tuple[str, str]:
        """What stands before and after the probe in `messages`."""
        try:
            parts = self._rendered(messages).split(_PROBE)
        except TemplateError as error:
            if messages[0]["role"] == "system":
                raise
            raise ModelError(f"the chat template fails on one question: {_line(error)}") from error
        if len(parts) != 2:
            raise ModelError(
                f"the chat template writes a message {len(parts) - 1} times; expected once"
            )
        return parts[0], parts[1]

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        """`messages`, and the beginning of the assistant's turn up to where an answer goes."""
        text = self._said(messages, answering=True)
        return text + self._thought if _THOUGHT.search(text) else text

    def _said(self, messages: list[dict[str, str]], *, answering: bool) -> str:
        text: Any = self.tokenizer.apply_chat_template(
            messages,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=answering,
            enable_thinking=False,  # templates that don't know it pass it over
        )
        return str(text)


def _end_of_thought(left: str, name: str, right: str) -> str:
    """What ends the thought that begins with `left`, `name`, `right`."""
    word = _BEGINS.search(name)
    if word is None:
        return f"{left}/{name}{right}"
    end = "END" if word[0].isupper() else "end"
    return left + name[: word.start()] + end + name[word.end() :] + right


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
