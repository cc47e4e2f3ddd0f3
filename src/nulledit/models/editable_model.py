"""A causal language model and its tokenizer, as everything here reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import replace
from hashlib import sha256
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import ChatSettings, Layout
from nulledit.models.batches import Batch, collate, pad_id
from nulledit.models.hooks import collect_input, hooked
from nulledit.models.layouts import as_out_in
from nulledit.models.mlp import MlpForm, find_form, find_forms
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import Row, RowEncoder
from nulledit.models.trial import try_spans


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
        spans = try_spans(self)
        self.from_below = spans.from_below
        if not spans.prefixes:
            self.columns = 0
        self.tokenizer = tokenizer
        self.encoder = RowEncoder.of(model, tokenizer)
        self.pad_id = pad_id(tokenizer)
        self._forms: dict[int, MlpForm] = {}

    @property
    def chat(self) -> ChatSettings | None:
        """The chat form in which facts are written, alone or beside plain text; None: no chat."""
        form, beside = self.encoder.forms[-1].chat, self.encoder.beside is not None
        return replace(form.settings, plain=beside) if form else None

    def in_chat(self, settings: ChatSettings | None) -> Self:
        """The same model, asked in the chat template, or in plain text (with chat beside it).

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

    def reading(self, rows: Iterable[Row]) -> str:
        """Hash of what decides, beside its weights, what it makes of `rows`.

        That is its configuration, and how its tokenizer reads them.
        """
        config = self.model.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):  # they say who wrote it, and where
            config.pop(name, None)
        read = [[list(row.ids), row.subject_last, row.target_start] for row in rows]
        return sha256(json.dumps([config, read], default=str).encode()).hexdigest()

    def form(self, layer: int) -> MlpForm:
        """How the MLP of block `layer` was built before any edit; ModelError if none explains it.

        Neurons that it is given later are not its own.
        """
        if layer not in self._forms:
            self._forms[layer] = find_form(self, layer)
        return self._forms[layer]

    def width(self, layer: int) -> int:
        """d_in of block `layer`, without neurons that it was given here."""
        known = self._forms.get(layer)
        return known.width if known else as_out_in(self.matrix(layer)).shape[1]

    def forms(self) -> list[MlpForm]:
        """Of all blocks whose MLP a form explains."""
        self._forms |= find_forms(self, set(range(self.depth)) - self._forms.keys())
        return [self._forms[layer] for layer in sorted(self._forms)]

    @contextmanager
    def reading_inputs(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the input [rows, length, d] of the MLPs of `layers` of the last run inside."""
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer in layers:
                shapes: list[Tensor] = []
                block, module = self.blocks[layer], self.form(layer).driven.module
                stack.enter_context(hooked(block, collect_input(shapes), before=True))
                stack.enter_context(hooked(module, _read_input(found, layer, shapes), before=True))
            yield found

    def collate(self, rows: Sequence[Sequence[int]], *, left: bool = False) -> Batch:
        """`rows` of ids, padded on the right (or left), on the model's device."""
        return collate(rows, pad_id=self.pad_id, device=self.device, left=left)

    def positions(self, on_cpu: int, on_accelerator: int) -> int:
        """Token positions to run together: small chunks stay in a processor's cache."""
        return on_cpu if self.device.type == "cpu" else on_accelerator


def _read_input(found: dict[int, Tensor], layer: int, states: list[Tensor]) -> Any:
    """`states`: what the block was given last; some join its rows before they come to the MLP."""

    def hook(_module: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        found[layer] = args[0].detach().view(*states[-1].shape[:2], -1)
        states.clear()

    return hook
