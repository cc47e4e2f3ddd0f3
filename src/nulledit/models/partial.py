"""Run some of a model's decoder blocks on states that one holds.

The model's own `forward` does the work, so masks, position embeddings and soft caps are its own:
blocks outside the wanted span pass their input through, and the span's first block is handed the
kept states. Nothing here knows a family's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from nulledit.models.layouts import find_layout
from nulledit.models.tokens import Batch


class _PrefixLayer(DynamicLayer):
    """Keys and values of a prefix; `update` shows them in front of the new ones, stores nothing."""

    def __init__(self, keys: Tensor | None, values: Tensor | None, length: int):
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None or self.length == 0:
            return key_states, value_states
        return (
            torch.cat([self.keys, key_states], dim=-2),
            torch.cat([self.values, value_states], dim=-2),
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length


class Prefix:
    """Attention keys and values of a batch of prefixes in the blocks of a span."""

    def __init__(self, entries: list[tuple[Tensor, Tensor] | None], mask: Tensor):
        """`entries`: per block, or None where not recorded; `mask` [rows, length]."""
        self.entries = entries
        self.mask = mask

    def select(self, rows: Tensor) -> Prefix:
        """The prefixes of `rows` (indices) only."""
        kept = [
            e and (e[0][rows.to(e[0].device)], e[1][rows.to(e[1].device)]) for e in self.entries
        ]
        return Prefix(kept, self.mask[rows])

    def cache(self) -> Cache:
        """A cache that shows the prefix to attention and never grows."""
        length = self.mask.shape[1]
        held = [e or (None, None) for e in self.entries]
        return Cache(layers=[_PrefixLayer(keys, values, length) for keys, values in held])


class PartialModel:
    """A causal language model whose blocks can be run a span at a time. No weight is changed."""

    def __init__(self, model: PreTrainedModel):
        """Wraps `model`; a ModelError if its family has no layout."""
        layout = find_layout(model)
        self.model = model
        blocks = model.get_submodule(layout.blocks)
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        self._mlp_out = layout.mlp_out
        self._tuples = self._which_return_tuples()

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)
        return weight.device

    def mlp_out(self, layer: int) -> nn.Module:
        """The module W of block `layer`."""
        return self.blocks[layer].get_submodule(self._mlp_out)

    def run(
        self,
        batch: Batch,
        *,
        states: Tensor | None = None,
        first: int = 0,
        last: int | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Hidden states [rows, length, d] behind block `last`, before any final norm.

        From the ids of `batch`, or from `states` at the input of block `first`. With `prefix`, its
        keys and values stand in front and `batch.mask` covers prefix and rows. `last=-1` gives the
        embeddings, the input of block 0.
        """
        return self._forward(batch, states, first, self._top(last), prefix)[0]

    def run_normed(
        self,
        batch: Batch,
        *,
        states: Tensor | None = None,
        first: int = 0,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """As `run` up to the last block, behind the model's final norm: ready for `logits`."""
        return self._forward(batch, states, first, self.depth - 1, prefix)[1]

    def logits(self, normed: Tensor) -> Tensor:
        """Logits [..., vocabulary] of normed states [..., d]."""
        head = self.model.get_output_embeddings()
        logits = head(normed.to(head.weight.device))
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    @torch.no_grad()
    def record_prefix(self, batch: Batch, states: Tensor, *, first: int) -> Prefix:
        """Keys and values of `batch` in the blocks from `first` on, from `states` at its input."""
        if batch.ids.shape[1] == 0:
            return Prefix([None] * self.depth, batch.mask)
        cache = DynamicCache()
        self._forward(batch, states, first, self.depth - 1, None, cache=cache)
        entries: list[tuple[Tensor, Tensor] | None] = [None] * self.depth
        for i, layer in enumerate(cache.layers):
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if i >= first and keys is not None and values is not None:
                entries[i] = (keys, values)
        return Prefix(entries, batch.mask)

    @contextmanager
    def reading_keys(self, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the input [rows, length, d_in] of W in `layers` of the last run inside."""
        found: dict[int, Tensor] = {}

        def reader(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                found[layer] = args[0].detach()

            return hook

        handles = [self.mlp_out(i).register_forward_pre_hook(reader(i)) for i in layers]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    def _top(self, last: int | None) -> int:
        return self.depth - 1 if last is None else last

    def _forward(
        self,
        batch: Batch,
        states: Tensor | None,
        first: int,
        last: int,
        prefix: Prefix | None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        with self._span(first, last, states, found):
            cache = prefix.cache() if prefix is not None else cache
            source = {"input_ids": batch.ids} if states is None else {"inputs_embeds": states}
            output = self.model.base_model(
                **source,
                attention_mask=batch.mask,
                position_ids=batch.positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return found[0], output[0]

    @contextmanager
    def _span(
        self, first: int, last: int, states: Tensor | None, found: list[Tensor]
    ) -> Iterator[None]:
        """Only blocks `first` to `last` work inside; `found` gets the states behind `last`."""
        passing = [i for i in range(self.depth) if not first <= i <= last]
        before = {i: self.blocks[i].__dict__.get("forward") for i in passing}
        for i in passing:
            self.blocks[i].forward = _passing(self._tuples[i])
        handles = []
        if states is not None:
            handles.append(
                self.blocks[first].register_forward_pre_hook(_inject(states), with_kwargs=True)
            )
        if last < 0:  # nothing but the embedding
            handles.append(
                self.blocks[0].register_forward_pre_hook(_collect_input(found), with_kwargs=True)
            )
        else:
            handles.append(self.blocks[last].register_forward_hook(_collect(found)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for i in passing:
                if before[i] is None:
                    del self.blocks[i].forward
                else:
                    vars(self.blocks[i])["forward"] = before[i]

    @torch.no_grad()
    def _which_return_tuples(self) -> list[bool]:
        """Whether each block returns a tuple (older families) or a tensor, seen on one token."""
        seen: dict[int, bool] = {}

        def note(index: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                seen[index] = isinstance(output, tuple)

            return hook

        handles = [b.register_forward_hook(note(i)) for i, b in enumerate(self.blocks)]
        try:
            one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            self.model.base_model(input_ids=one, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return [seen[i] for i in range(self.depth)]


def _passing(as_tuple: bool) -> Any:
    def forward(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Any:
        return (hidden_states, None) if as_tuple else hidden_states

    return forward


def _inject(states: Tensor) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (states.to(args[0].device), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states.to(kwargs["hidden_states"].device)}

    return hook


def _collect(found: list[Tensor]) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    return hook


def _collect_input(found: list[Tensor]) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    return hook
