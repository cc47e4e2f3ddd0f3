"""Text to token ids: where a subject ends, and where a target begins."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import ChatSettings
from nulledit.data.facts import quote
from nulledit.errors import FactError, ModelError
from nulledit.models.chat import ChatForm, Framed
from nulledit.models.pieces import Pieces, Span, overlaps, untrimmed

logger = logging.getLogger(__name__)

# Scripts written without spaces between words: a target in them joins its prompt directly.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
# What a target is tokenised after, where it can't be tokenised after its prompt: the first that
# stays a piece of its own.
LEADS = ("\n", ".", ",", "x")
_LONE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One tokenised text."""

    ids: tuple[int, ...]
    """Token ids, special tokens in front included, none after."""
    subject_last: int = -1
    """Index of the token that holds the subject's last character; -1 if no subject was given."""
    target_start: int = -1
    """Index of the target's first token; -1 if no target was given."""

    @property
    def target_ids(self) -> tuple[int, ...]:
        """Token ids of the target."""
        return self.ids[self.target_start :] if self.target_start >= 0 else ()

    def upto_subject(self) -> Row:
        """The row cut after the subject's last token."""
        return replace(self, ids=self.ids[: self.subject_last + 1], target_start=-1)


def join_target(prompt: str, target: str) -> str:
    """`prompt` and `target` as one text, with a space between where the script uses one."""
    if not prompt or prompt[-1].isspace() or target[:1].isspace():
        return prompt + target
    first = unicodedata.name(target[0], "")
    last = unicodedata.name(prompt[-1], "")
    unspaced = first.startswith(UNSPACED) or (first.startswith("FULLWIDTH"))
    if unspaced and (last.startswith(UNSPACED) or not prompt[-1].isascii()):
        return prompt + target
    return f"{prompt} {target}"


def fill(template: str, subject: str) -> tuple[str, Span]:
    """The template with `subject` in its slot, and where it stands there."""
    start = template.index("{}")
    return template.replace("{}", subject, 1), (start, start + len(subject))


class RowEncoder:
    """Tokenises texts for one model; positions come from the offsets of the full text.

    With a chat form, every text is a prompt and stands in the model's chat template, whose special
    tokens are all there are: none are added. `beside` is an encoder of another form in which facts
    are written and judged as well; what it makes of a text is asked of it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        chat: ChatForm | None = None,
        vocabulary: int | None = None,
        room: int = 0,
        beside: RowEncoder | None = None,
    ):
        """`max_length`: tokens that fit the model's context; `vocabulary`: ids that it embeds.

        `room`: how many of the context's tokens every text leaves free. `beside`: as above.
        """
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat = chat
        self.vocabulary = vocabulary
        self.room = room
        self.beside = beside

    @property
    def forms(self) -> tuple[RowEncoder, ...]:
        """This encoder, and the one beside it."""
        return (self,) if self.beside is None else (self, self.beside)

    def placed(self, contexts: Sequence[str]) -> list[tuple[RowEncoder, str]]:
        """Where a prompt is in a fact's rows: in all `contexts`; then bare in the form beside."""
        return [(self, context) for context in contexts] + [(e, "{}") for e in self.forms[1:]]

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Of plain text, for `model`."""
        return cls(
            tokenizer,
            max_length=context_length(model.config),
            vocabulary=vocabulary_of(model),
        )

    def in_chat(self, settings: ChatSettings | None) -> RowEncoder:
        """The same with prompts in the chat template, as plain text, or as text with chat beside.

        ModelError if the tokenizer has no template, or another one than the settings name; where
        these are optional, plain text.
        """
        if settings is None or (settings.optional and self.tokenizer.chat_template is None):
            return self._with(None, self.room)
        named = replace(settings, plain=False, optional=False)
        try:
            chat = self._with(ChatForm(self.tokenizer, named), self.room)
        except ModelError as error:
            if not settings.optional:
                raise
            logger.warning("facts are plain text alone: %s", error)
            return self._with(None, self.room)
        return self._with(None, self.room, chat) if settings.plain else chat

    def leaving(self, tokens: int) -> RowEncoder:
        """The same for texts that leave room for so many tokens after them."""
        return self._with(self.chat, tokens, self.beside and self.beside.leaving(tokens))

    def _with(
        self, chat: ChatForm | None, room: int, beside: RowEncoder | None = None
    ) -> RowEncoder:
        return RowEncoder(
            self.tokenizer,
            max_length=self.max_length,
            chat=chat,
            vocabulary=self.vocabulary,
            room=room,
            beside=beside,
        )

    def encode(self, text: str, *, subject: Span | None = None, target: str | None = None) -> Row:
        """Tokenise `text`, followed by `target` if given, as one text.

        The subject's last token is the last one that covers its last character, so a token that
        merges it with what follows (36 of 21,919 CounterFact prompts) counts as the subject's. An
        accent that the tokenizer composes with its letter has no token of its own: there it is the
        letter's. The target's first token is the first one that reaches past the prompt.

        Raises FactError if the text is longer than the model's context.
        """
        return self._row(self._framed(text), subject, target)[0]

    def encode_template(
        self, template: str, subject: str, *, context: str = "{}", target: str | None = None
    ) -> Row:
        """Tokenise `template` with `subject` in its slot, inside a prefix `context`.

        Raises FactError as `encode` does, and where the tokenizer has no pieces for the subject or
        the target: all subjects in a script that it lacks would be one.
        """
        text, span = fill(template, subject)
        framed = self._framed(text, context)
        row, pieces = self._row(framed, span, target)
        held = [
            i for i, piece in enumerate(pieces.spans) if overlaps(piece, self._at(framed, span))
        ]
        if all(i in pieces.unknown for i in held):
            raise FactError(
                f"the tokenizer has no pieces for the subject {subject!r}: the model can't tell it "
                "from other unknown words"
            )
        if target is not None and any(i >= row.target_start for i in pieces.unknown):
            raise FactError(
                f"the tokenizer has no pieces for the target {target!r}, or a part of it: the "
                "model can't say it"
            )
        return row

    def reply(self, texts: Sequence[str], *, begun: str = "", target: str | None = None) -> Row:
        """Tokenise a conversation up to the model's answer (`ChatForm.reply`), and `target` there.

        ModelError for plain text, which has no turns; FactError as `encode` does.
        """
        if self.chat is None:
            raise ModelError("plain text has no turns: ask it in the chat template")
        return self._row(self.chat.reply(texts, begun=begun), None, target)[0]

    def subject_tokens(
        self, template: str, subject: str, *, context: str = "{}", target: str | None = None
    ) -> tuple[int, ...]:
        """Indices of the subject's tokens in the row of `encode_template`, wherever it stands."""
        text, (first, last) = fill(template, subject)
        framed = self._framed(text, context)
        places = [(start + first, start + last) for start in framed.starts]
        return tuple(
            i
            for i, piece in enumerate(self._joined(framed, target).spans)
            if any(overlaps(piece, place) for place in places)
        )

    def _framed(self, text: str, context: str = "{}") -> Framed:
        if self.chat:
            return self.chat.frame(text, context=context)
        before, after = context.split("{}", 1)
        return Framed(before + text + after, (len(before),), None)

    def _at(self, framed: Framed, subject: Span) -> Span:
        """Where the subject that is edited stands in the framed text; `subject`: in the prompt."""
        answered = self.chat is not None and self.chat.settings.subject == "assistant"
        start = framed.starts[-1 if answered else 0]
        return start + subject[0], start + subject[1]

    def _check_length(self, tokens: int, text: str, target: str | None = None) -> None:
        with_target = "" if target is None else ", the target's included,"
        if tokens > self.max_length:
            what = f"is longer than the model's context of {self.max_length}, shorten it"
        elif tokens > self.max_length - self.room:
            what = (
                f"leaves no room for an answer of {self.room} in the model's context of "
                f"{self.max_length}, shorten one of them"
            )
        else:
            return
        raise FactError(f"prompt of {tokens} tokens{with_target} {what}: {text[:60]!r}...")

    def _row(self, framed: Framed, subject: Span | None, target: str | None) -> tuple[Row, Pieces]:
        """`subject`: where it stands in the prompt."""
        text = framed.text
        pieces = self._joined(framed, target)
        if not pieces.ids:
            raise FactError(f"text {text!r} has no tokens")
        self._check_length(len(pieces.ids), text, target)
        check_embedded(pieces.ids, self.vocabulary, self.tokenizer)
        subject_last = target_start = -1
        if subject is not None:
            subject_last = pieces.last_of(self._at(framed, subject))
            if subject_last < 0:
                raise FactError(f"the subject is in no token of {text!r}")
        if target is not None:
            target_start = pieces.first_after(len(text))
            if target_start < 0:
                raise FactError(f"the target {target!r} of {text!r} has no tokens")
            if target_start == 0:
                raise FactError(
                    f"the target of {text!r} begins at the first token: nothing predicts it"
                )
        return Row(tuple(pieces.ids), subject_last, target_start), pieces

    def _joined(self, framed: Framed, target: str | None) -> Pieces:
        """The framed prompt and the target."""
        text = framed.text
        if target is None:
            return self._pieces(text)
        full = join_target(text, target) if framed.gap is None else text + framed.gap + target
        pieces = self._pieces(full)
        if not any(a < len(text) < b for a, b in pieces.spans):
            return pieces
        before = self._pieces(text)
        if pieces.ids[: len(before.ids)] == before.ids:
            return pieces  # only a space that the tokenizer drops lies across the border
        # A token across the border would ask the model for half of what it has already read.
        after = self._continued(full[len(text) :])
        count = len(before.ids)
        return Pieces(
            before.ids + after.ids,
            before.spans + [(len(text), len(full))] * len(after.ids),
            before.unknown | {i + count for i in after.unknown},
        )

    def _continued(self, text: str) -> Pieces:
        """`text` as it is tokenised inside a longer one: without the mark of a beginning."""
        for lead in LEADS:
            count = len(self._pieces(lead, special=False).ids)
            pieces = self._pieces(lead + text, special=False)
            # A lead that is dropped, as newlines are by some, leaves its mark to what follows.
            kept = count > 0 and all(b <= len(lead) for _, b in pieces.spans[:count])
            if kept and all(a >= len(lead) for a, _ in pieces.spans[count:]):
                return pieces.after(count)
        return self._pieces(text, special=False)

    def _pieces(self, text: str, *, special: bool | None = None) -> Pieces:
        """`text` without an end-of-text token after it.

        `special`: whether the tokenizer adds its special tokens; left out, where no chat template
        has written them.
        """
        try:
            coded = self.tokenizer(
                text,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                add_special_tokens=self.chat is None if special is None else special,
                verbose=False,
            )
        except (TypeError, UnicodeError):
            if (lone := _LONE.search(text)) is None:
                raise
            raise FactError(
                f"text is not Unicode: {quote(text[:60])} holds the lone surrogate "
                f"U+{ord(lone.group()):04X} at character {lone.start()}"
            ) from None
        ids, added = list(coded["input_ids"]), coded["special_tokens_mask"]
        spans = untrimmed(text, coded["offset_mapping"], added)
        while ids and added[len(ids) - 1] and spans[-1][0] == spans[-1][1]:
            ids.pop()
            spans.pop()
        # The unknown piece may be a special token, too, which a text can name: GPT-2's.
        mark, name = self.tokenizer.unk_token_id, self.tokenizer.unk_token
        unknown = {
            i
            for i, (found, (a, b)) in enumerate(zip(ids, spans, strict=True))
            if found == mark and not added[i] and text[a:b].strip() != name
        }
        return Pieces(ids, spans, unknown)


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """Number of ids that the model embeds; None where nothing says."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.ndim == 2 else None


def check_embedded(
    ids: Sequence[int], vocabulary: int | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """ModelError if a model with `vocabulary` embedded ids can't read the text of `ids`."""
    highest = max(ids, default=-1)
    if vocabulary is not None and highest >= vocabulary:
        raise ModelError(
            f"the tokenizer's piece {tokenizer.convert_ids_to_tokens(highest)!r} in "
            f"{tokenizer.decode(list(ids))[:60]!r} has number {highest}, but the model embeds "
            f"{vocabulary} pieces only, of the tokenizer's {len(tokenizer)}: give the model's own "
            "tokenizer, or enlarge its embedding (resize_token_embeddings) and train it"
        )


def context_length(model_config: object) -> int:
    """Longest input in tokens that the model's positions allow; 2,048 where nothing says.

    Of a model of several kinds of input, those of its text.
    """
    own = getattr(model_config, "get_text_config", lambda: model_config)()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        length = getattr(own, name, None)
        if isinstance(length, int) and length > 0:
            return length
    return 2048


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts in front of every text by itself."""
    coded = list(tokenizer("a", verbose=False)["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    starts = (i for i in range(len(coded)) if coded[i : i + len(plain)] == plain)
    return coded[: next(starts, 0)]
