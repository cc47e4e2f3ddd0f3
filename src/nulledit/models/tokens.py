"""Text to token ids: where a subject ends, where a target begins, and batches of rows."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import ChatSettings
from nulledit.errors import FactError, ModelError
from nulledit.models.chat import ChatForm, Framed

# Scripts written without spaces between words: a target in them joins its prompt directly.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


@dataclass(frozen=True)
class Row:
    """One tokenised text."""

    ids: tuple[int, ...]
    """Token ids, special tokens in front included, none behind."""
    subject_last: int = -1
    """Index of the token that holds the subject's last character; -1 if no subject was given."""
    target_start: int = -1
    """Index of the target's first token; -1 if no target was given."""

    @property
    def target_ids(self) -> tuple[int, ...]:
        """Token ids of the target."""
        return self.ids[self.target_start :] if self.target_start >= 0 else ()

    def upto_subject(self) -> Row:
        """The row cut behind the subject's last token."""
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


def fill(template: str, subject: str) -> tuple[str, int]:
    """The template with `subject` in its slot, and the index behind its last character."""
    start = template.index("{}")
    return template.replace("{}", subject, 1), start + len(subject)


class RowEncoder:
    """Tokenises texts for one model; positions come from the offsets of the full text.

    With a chat form, every text is a prompt and stands in the model's chat template, whose special
    tokens are all there are: none are added.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        chat: ChatForm | None = None,
        vocabulary: int | None = None,
    ):
        """`max_length`: tokens that fit the model's context; `vocabulary`: ids that it embeds."""
        if not tokenizer.is_fast:
            raise ModelError(
                f"{type(tokenizer).__name__} gives no character offsets; a fast tokenizer is needed"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.chat = chat
        self.vocabulary = vocabulary

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RowEncoder:
        """Of plain text, for `model`."""
        return cls(
            tokenizer,
            max_length=context_length(model.config),
            vocabulary=vocabulary_of(model),
        )

    def in_chat(self, settings: ChatSettings | None) -> RowEncoder:
        """The same with prompts in the chat template, or as plain text.

        ModelError if the tokenizer has no template, or another one than the settings name.
        """
        form = None if settings is None else ChatForm(self.tokenizer, settings)
        return self._with(self.max_length, form)

    def leaving(self, tokens: int) -> RowEncoder:
        """The same for texts that leave room for so many tokens behind them."""
        return self._with(self.max_length - tokens, self.chat)

    def _with(self, max_length: int, chat: ChatForm | None) -> RowEncoder:
        return RowEncoder(
            self.tokenizer, max_length=max_length, chat=chat, vocabulary=self.vocabulary
        )

    def encode(
        self, text: str, *, subject_end: int | None = None, target: str | None = None
    ) -> Row:
        """Tokenise `text`, followed by `target` if given, as one text.

        The subject's last token is the last one that covers its last character, so a token that
        merges it with what follows (36 of 21,919 CounterFact prompts) counts as the subject's.
        The target's first token is the first one that reaches past the prompt.

        Raises FactError if the text is longer than the model's context.
        """
        return self._row(self._framed(text), subject_end, target)

    def encode_template(
        self, template: str, subject: str, *, context: str = "{}", target: str | None = None
    ) -> Row:
        """Tokenise `template` with `subject` in its slot, inside a prefix `context`."""
        text, end = fill(template, subject)
        return self._row(self._framed(text, context), end, target)

    def subject_tokens(
        self, template: str, subject: str, *, context: str = "{}", target: str | None = None
    ) -> tuple[int, ...]:
        """Indices of the subject's tokens in the row of `encode_template`, wherever it stands."""
        text, end = fill(template, subject)
        framed = self._framed(text, context)
        spans = [(start + end - len(subject), start + end) for start in framed.starts]
        _, offsets = self._joined(framed, target)
        return tuple(
            i
            for i, (a, b) in enumerate(offsets)
            if any(a < last and first < b for first, last in spans)
        )

    def _framed(self, text: str, context: str = "{}") -> Framed:
        if self.chat:
            return self.chat.frame(text, context=context)
        before, after = context.split("{}", 1)
        return Framed(before + text + after, (len(before),), None)

    def _row(self, framed: Framed, subject_end: int | None, target: str | None) -> Row:
        """`subject_end`: index in the prompt behind the subject's last character."""
        text = framed.text
        ids, offsets = self._joined(framed, target)
        if not ids:
            raise FactError(f"text {text!r} has no tokens")
        if len(ids) > self.max_length:
            raise FactError(
                f"prompt of {len(ids)} tokens is longer than the model's context of "
                f"{self.max_length}, shorten it: {text[:60]!r}..."
            )
        check_embedded(ids, self.vocabulary, self.tokenizer)
        subject_last = target_start = -1
        if subject_end is not None:
            answered = self.chat is not None and self.chat.settings.subject == "assistant"
            character = framed.starts[-1 if answered else 0] + subject_end - 1
            covering = [i for i, (a, b) in enumerate(offsets) if a <= character < b]
            if not covering:
                raise FactError(f"the subject's last character is in no token of {text!r}")
            subject_last = covering[-1]
        if target is not None:
            target_start = next(i for i, (a, b) in enumerate(offsets) if b > len(text) and a < b)
            if target_start == 0:
                raise FactError(
                    f"the target of {text!r} begins at the first token: nothing predicts it"
                )
        return Row(tuple(ids), subject_last, target_start)

    def _joined(
        self, framed: Framed, target: str | None
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans of the framed prompt and the target."""
        text = framed.text
        if target is None:
            return self._tokens(text)
        full = join_target(text, target) if framed.gap is None else text + framed.gap + target
        ids, offsets = self._tokens(full)
        if any(a < len(text) < b for a, b in offsets):
            # A token across the border would ask the model for half of what it has already read.
            ids, offsets = self._tokens(text)
            tail = self.tokenizer(full[len(text) :], add_special_tokens=False, verbose=False)
            offsets += [(len(text), len(full))] * len(tail["input_ids"])
            ids += tail["input_ids"]
        return ids, offsets

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character spans of `text`, without an end-of-text token behind it."""
        coded = self.tokenizer(
            text,
            return_offsets_mapping=True,
            add_special_tokens=self.chat is None,  # the template has written them
            verbose=False,
        )
        ids, offsets = list(coded["input_ids"]), [tuple(o) for o in coded["offset_mapping"]]
        while ids and offsets[-1][0] == offsets[-1][1]:
            ids.pop()
            offsets.pop()
        return ids, offsets


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


@dataclass(frozen=True)
class Batch:
    """Rows padded to one length."""

    ids: Tensor
    """[rows, length]."""
    mask: Tensor
    """[rows, length], 1 at tokens and 0 at padding."""
    positions: Tensor
    """[rows, length], position of each token in its own row."""


def collate(
    rows: Sequence[Sequence[int]], *, pad_id: int, device: torch.device, left: bool = False
) -> Batch:
    """Pad `rows` of ids on the right (or left) to the longest."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row)
        mask[i, where] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return Batch(ids.to(device), mask.to(device), positions.to(device))


@dataclass(frozen=True)
class Shared:
    """Rows cut in two: beginnings that several have in common, and the rests."""

    stems: Batch
    """The beginnings, one per label."""
    stem: Tensor
    """Index of each row's stem [rows]."""
    cuts: list[int]
    """Length of each row's stem."""
    rests: Batch
    """What comes behind; its mask is the rests' own, its positions count the stem."""


def share_beginnings(
    rows: Sequence[Sequence[int]],
    labels: Sequence[int],
    limits: Sequence[int],
    *,
    columns: int,
    pad_id: int,
    device: torch.device,
) -> Shared:
    """Cut `rows` of ids behind the longest beginning that all rows of a label have in common.

    `limits`: what a row's stem may hold at most; fewer tokens than the row has. `columns`: what the
    longest stem and the longest rest may have together (`PartialModel.columns`); nothing is cut off
    where they would have more.
    """
    names = list(dict.fromkeys(labels))
    stems: list[Sequence[int]] = []
    for name in names:
        mine = [i for i, label in enumerate(labels) if label == name]
        common = min(limits[i] for i in mine)
        first = rows[mine[0]]
        for i in mine[1:]:
            same = (a == b for a, b in zip(first[:common], rows[i], strict=False))
            common = next((k for k, equal in enumerate(same) if not equal), common)
        stems.append(first[:common])
    stem = [names.index(label) for label in labels]
    cuts = [len(stems[s]) for s in stem]
    rests = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    if max(cuts) + max(map(len, rests)) > columns:
        stems, cuts, rests = [() for _ in stems], [0] * len(rows), list(rows)
    behind = collate(rests, pad_id=pad_id, device=device)
    return Shared(
        collate(stems, pad_id=pad_id, device=device),
        torch.tensor(stem, device=device),
        cuts,
        replace(behind, positions=behind.positions + torch.tensor(cuts, device=device)[:, None]),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to fill padding with; masked everywhere, so any valid one serves."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts in front of every text by itself."""
    coded = list(tokenizer("a", verbose=False)["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    starts = (i for i in range(len(coded)) if coded[i : i + len(plain)] == plain)
    return coded[: next(starts, 0)]


def chunks_by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices sorted by length and cut so that rows × longest stays within `budget` tokens."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    chunks: list[list[int]] = []
    current: list[int] = []
    for index in order:
        if current and (len(current) + 1) * lengths[index] > budget:
            chunks.append(current)
            current = []
        current.append(index)
    if current:
        chunks.append(current)
    return chunks
