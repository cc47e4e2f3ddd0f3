"""A causal language model and its tokenizer, as everything here reads them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import ChatSettings, Layout
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import Batch, RowEncoder, collate, pad_id
from nulledit.models.trial import keeps_prefixes


class EditableModel(PartialModel):
    """A model that can be run a span of blocks at a time, with the form in which it is asked.

    Prompts are plain text, or stand in the tokenizer's chat template: `in_chat` and `plain` give
    the same model, asked so.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layout: Layout | None = None,
    ):
        """As for `PartialModel`; asked in plain text.

        ModelError, too, if the model can't be run in spans, which is tried.
        """
        super().__init__(model, layout)
        if not keeps_prefixes(self):
            self.columns = 0
        self.tokenizer = tokenizer
        self.encoder = RowEncoder.of(model, tokenizer)
        self.pad_id = pad_id(tokenizer)

    @property
    def chat(self) -> ChatSettings | None:
        """The form in which prompts are asked; None: plain text."""
        return self.encoder.chat.settings if self.encoder.chat else None

    def in_chat(self, settings: ChatSettings | None) -> Self:
        """The same model, asked in the chat template, or in plain text.

        ModelError if the tokenizer has no template, or another one than the settings name.
        """
        return self.asked(self.encoder.in_chat(settings))

    @property
    def plain(self) -> Self:
        """The same model, asked in plain text."""
        return self.in_chat(None)

    def asked(self, encoder: RowEncoder) -> Self:
        """The same model, its texts read by `encoder`."""
        other = copy(self)
        other.encoder = encoder
        return other

    def collate(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> Batch:
        """`rows` of ids, padded on the right (or left), on the model's device."""
        return collate(rows, pad_id=self.pad_id, device=self.device, left=left)

    def positions(self, on_cpu: int, on_accelerator: int) -> int:
        """Token positions to run together: small chunks stay in a processor's cache."""
        return on_cpu if self.device.type == "cpu" else on_accelerator
