"""Run some of a model's decoder blocks on states that one holds.

The model's own `forward` does the work, so masks, position embeddings and soft caps are its own:
blocks outside the wanted span pass their input through, and the span's first block is handed the
kept states. Nothing here knows a family's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from nulledit.config import Layout
from nulledit.errors import ModelError
from nulledit.models.accepted import check_model
from nulledit.models.batches import Batch
from nulledit.models.hooks import (
    again,
    collect,
    collect_copy,
    collect_input,
    hooked,
    inject,
    passing,
    read_key,
    replaced_forward,
)
from nulledit.models.layout_tracing import body_of, entries
from nulledit.models.layouts import (
    blocks_of,
    check_layout,
    find_layout,
    is_family_matrix,
    listed,
    mlp_out,
    parameter_name,
)
from nulledit.models.placement import input_device, is_offloaded
from nulledit.models.prefix import Prefix, PrefixLayer
from nulledit.models.tokens import context_length, vocabulary_of


@dataclass
class _BodyOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What a body of blocks gives; whatever else a family's head looks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class PartialModel:
    """A causal language model whose blocks can be run a span at a time. No weight is changed."""

    def __init__(self, model: PreTrainedModel, layout: Layout | None = None):
        """Wraps `model`, read by `layout`, or else by its family's or what tracing finds.

        ModelError if it has no such modules, or can't be taken.
        """
        check_model(model)
        self.model = model
        self.layout = find_layout(model) if layout is None else check_layout(model, layout)
        self.named_matrix = ""
        """The path of W, where `layout` names another than the family's; else empty."""
        if layout is not None and not is_family_matrix(model, layout):
            self.named_matrix = layout.mlp_out
        self.blocks = blocks_of(model, self.layout)
        self._body = body_of(model, self.layout.blocks)
        self._entries = entries(model, self._body, list(self.blocks), self.layout.mlp_out)
        self.context, self.vocabulary = context_length(model.config), vocabulary_of(model)
        self.columns = self.context
        """Most that a kept prefix and the rows after it may have together. 0: none can be kept,
        since recurrent blocks look at more than attention keys and values (`trial.py`)."""
        self.from_below = False
        """Whether blocks take more than states from those below, which run as well, then: attention
        keys and values that several share, for one (`trial.py`)."""

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return input_device(self.model)

    def mlp_out(self, layer: int) -> nn.Module:
        """The module W of block `layer`; ModelError if it does not enter the stream as declared."""
        module = self.matrix(layer)
        found, declared = self._entries[layer].output, self.layout.output
        if not self._entries[layer].linear:
            raise ModelError(
                f"what {self.layout.mlp_out} of block {layer} writes is not its experts' output "
                "matrices times their keys (biases, or routing in another place?), so a value "
                "written there would not come out; can't edit it"
            )
        if not _agrees(found, declared):
            raise ModelError(
                f"what {self.layout.mlp_out} of block {layer} writes enters the residual stream "
                f"{found or 'neither plain, nor scaled, nor normed'}, not {declared} as its layout "
                f"says, so a value written there would not come out; {self._advice(layer)}"
            )
        return module

    def _advice(self, layer: int) -> str:
        """What to do where W of `layer` enters the stream otherwise than its layout says."""
        own = self._entries[layer].output
        like = [i for i, e in enumerate(self._entries) if _agrees(e.output, self.layout.output)]
        alike = [i for i, e in enumerate(self._entries) if own and _agrees(e.output, own)]
        told = []
        if like:
            told.append(f"edit some of {listed(like)}")
        if own:
            among = f" for some of {listed(alike)}" if like else ""
            told.append(f"give the recipe a layout with output: {own}{among}")
        return ", or ".join(told) or "can't edit it"

    def matrix(self, layer: int) -> nn.Module:
        """The module W of block `layer`, however it enters the stream."""
        return mlp_out(self.model, self.layout, layer)

    def parameter_name(self, layer: int) -> str:
        """Name of W's parameter of block `layer` in the state dict."""
        return parameter_name(self.model, self.layout, layer)

    def fits(self, layer: int) -> bool:
        """Whether block `layer` can be edited as its layout says."""
        try:
            self.mlp_out(layer)
        except ModelError:
            return False
        return True

    def run(
        self,
        batch: Batch,
        *,
        states: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Hidden states [rows, length, d] after block `last`, before any final norm.

        From the ids of `batch`, or from `states` at the input of block `first`. With `prefix`, its
        keys and values stand in front and `batch.mask` covers prefix and rows. `last=-1` gives the
        embeddings, the input of block 0.
        """
        return self._forward(batch, states, first, self._top(last), _shown(prefix))[0]

    def run_normed(
        self,
        batch: Batch,
        *,
        states: Tensor | None = None,
        first: int = 0,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """As `run` up to the last block, after the model's final norm: ready for `logits`."""
        return self._forward(batch, states, first, self.depth - 1, _shown(prefix))[1]

    @property
    def values_at_output(self) -> bool:
        """Whether a norm stands between W and the stream.

        No residual of hidden states can be written through it; values are of W's own output then,
        each layer's its own, and what the block does with that output comes after.
        """
        return self.layout.output == "normed"

    def scale(self, layer: int) -> float:
        """What a change of W's output in block `layer` is multiplied by where values stand."""
        return self._entries[layer].scale

    def run_to_values(
        self,
        batch: Batch,
        *,
        layer: int,
        states: Tensor | None = None,
        first: int = 0,
        prefix: Prefix | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after block `layer`, and where its values stand [rows, length, d] each.

        Values stand in the hidden states themselves, or, where a norm follows W, in what the norm
        is given: W's output, and what some families add to it.
        """
        norm = self._entries[layer].norm if self.values_at_output else None
        with nullcontext() if norm is None else self._reading_normed(layer, norm) as given:
            hidden = self.run(batch, states=states, first=first, last=layer, prefix=prefix)
        return hidden, given[0].view(hidden.shape) if given else hidden

    def with_value(self, layer: int, hidden: Tensor, standing: Tensor, delta: Tensor) -> Tensor:
        """`hidden` of `run_to_values` with `delta` added to what is `standing` there [..., d]."""
        norm, share = self._entries[layer].norm, self._entries[layer].share
        if norm is None:
            return hidden + delta.to(hidden)
        before, after = norm(standing.to(hidden)), norm((standing + delta).to(hidden))
        return hidden + share * (after - before).to(hidden)

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [..., vocabulary] of normed states [..., d]."""
        rows = normed.reshape(1, -1, normed.shape[-1])
        output = _BodyOutput(last_hidden_state=rows)
        one = torch.zeros(rows.shape[:2], dtype=torch.long, device=self.device)
        with replaced_forward(self._body, lambda *_args, **_kwargs: output):
            logits: Tensor = self.model(input_ids=one, use_cache=False).logits
        return logits.reshape(*normed.shape[:-1], -1)

    @torch.no_grad()
    def record_prefix(
        self,
        batch: Batch,
        states: Tensor | None = None,
        *,
        first: int = 0,
        last: int | None = None,
        prefix: Prefix | None = None,
    ) -> Prefix:
        """Keys and values of `batch` in the blocks `first` to `last`, run as by `run`.

        Those of `prefix` are not among them: see `Prefix.then`. `batch.mask` is the batch's own.
        """
        nothing: list[tuple[Tensor, Tensor] | None] = [None] * self.depth
        front = prefix or Prefix(nothing, batch.mask[:, :0])
        if batch.ids.shape[1] == 0 or self._top(last) < first:
            return Prefix(nothing, batch.mask)
        cache = front.cache(recording=True)
        self._forward(front.before(batch), states, first, self._top(last), cache)
        recorded = [layer.new if isinstance(layer, PrefixLayer) else None for layer in cache.layers]
        return Prefix(recorded, batch.mask)

    @contextmanager
    def reading_keys(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the input [rows, length, d_in] of W in `layers` of the last run inside.

        Of experts, the virtual key of them all, zero where a token is not routed.
        """
        found: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer in layers:
                shapes: list[Tensor] = []
                block, module = self.blocks[layer], self.mlp_out(layer)
                stack.enter_context(hooked(block, collect_input(shapes), before=True))
                stack.enter_context(hooked(module, read_key(found, layer, shapes), before=True))
            yield found

    @contextmanager
    def reading_output(self, layer: int) -> Iterator[list[Tensor]]:
        """Collect a copy of what W of `layer` gives in each run inside."""
        found: list[Tensor] = []
        with hooked(self.mlp_out(layer), collect_copy(found)):
            yield found

    @contextmanager
    def _reading_normed(self, layer: int, norm: nn.Module) -> Iterator[list[Tensor]]:
        """Collect a copy of what `norm` is given first after W of `layer`, in the last run."""
        found: list[Tensor] = []

        def begin(*_args: Any) -> None:
            found.clear()

        def read(_module: nn.Module, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
            if not found:
                found.append(args[0].clone())

        with hooked(self.mlp_out(layer), begin), hooked(norm, read, before=True):
            yield found

    def _top(self, last: int | None) -> int:
        return self.depth - 1 if last is None else last

    def _forward(
        self,
        batch: Batch,
        states: Tensor | None,
        first: int,
        last: int,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        if states is None and self.vocabulary is not None and batch.ids.numel():
            highest = int(batch.ids.max())
            if highest >= self.vocabulary:
                raise ModelError(
                    f"a text has a piece of number {highest}, but the model embeds "
                    f"{self.vocabulary} pieces only: give the model's own tokenizer"
                )
        after = (batch.mask.flip(1).cumsum(1).flip(1) == 0).to(batch.mask)
        mask = batch.mask | after  # no token sees these; where they see nothing, some models' nan
        with self._span(first, last, states, found):
            source = (
                {"input_ids": batch.ids}
                if states is None or self.from_below
                else {
                    "inputs_embeds": torch.zeros_like(states, device=self.device)
                }  # for its shape
            )
            output = self._body(
                **source,
                attention_mask=mask,
                position_ids=batch.positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return found[0], output[0]

    @contextmanager
    def _span(
        self, first: int, last: int, states: Tensor | None, found: list[Tensor]
    ) -> Iterator[None]:
        """Only blocks `first` to `last` work inside; `found` gets the states after `last`."""
        with ExitStack() as stack:
            for i, block in enumerate(self.blocks):
                if i > last or (i < first and not self.from_below):
                    unchanged = passing(self._entries[i].as_tuple)
                    stack.enter_context(replaced_forward(block, unchanged))
                elif torch.is_grad_enabled() and is_offloaded(block):
                    stack.enter_context(replaced_forward(block, again(block.forward)))
            if states is not None:
                stack.enter_context(hooked(self.blocks[first], inject(states), before=True))
            if last < 0:  # nothing but the embedding
                stack.enter_context(hooked(self.blocks[0], collect_input(found), before=True))
            else:
                stack.enter_context(hooked(self.blocks[last], collect(found)))
            yield


def _agrees(found: str | None, declared: str) -> bool:
    """Whether an output that enters so may be read as declared; plain is scaled by 1."""
    return found == declared or (found == "plain" and declared == "scaled")


def _shown(prefix: Prefix | None) -> Cache | None:
    return prefix.cache() if prefix is not None and prefix.mask.shape[1] else None
