"""What values and keys rely on, tried on a model when it is taken up.

Two short rows of unequal length go through the model alone and whole; then each block is given what
it was given there, as keys and values run it: in one batch, and after kept beginnings. A family
that can't be run so is far off on a few tokens, and rounding is not. Nothing here knows a family's
name.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nulledit.errors import ModelError
from nulledit.models.batches import Batch, collate, share_beginnings
from nulledit.models.hooks import states_of
from nulledit.models.layouts import differentiating, frozen
from nulledit.models.partial import PartialModel

logger = logging.getLogger(__name__)

LENGTHS, CUTS = (9, 6), (5, 2)
"""Tokens of each row, and of its beginning."""
MISSED = 1e-3  # share of a block's output that may be missed, beside two roundings
_TRIED: WeakKeyDictionary[nn.Module, dict[tuple[str, str | None], Spans]] = WeakKeyDictionary()
"""By model object, path of its blocks and kind of attention."""


@dataclass(frozen=True)
class Spans:
    """How spans of a model's blocks can be run."""

    prefixes: bool
    """After kept prefixes."""
    from_below: bool
    """As `PartialModel.from_below`."""


def try_spans(model: PartialModel) -> Spans:
    """How spans of `model`'s blocks can be run, with a notice where it takes longer.

    ModelError where spans of blocks don't give the model's own numbers, or give no gradient. What
    was found is kept for as long as the model object lives.
    """
    key = (model.layout.blocks, model.model.config._attn_implementation)
    tried = _TRIED.setdefault(model.model, {})
    if key not in tried:
        with frozen(model.model), differentiating():
            tried[key] = _Trial(model).passed()
    return tried[key]


@dataclass
class _Alone:
    """What a row's own run showed."""

    ids: list[int]
    given: list[Tensor]  # to each block [length, d]
    made: list[Tensor]  # by each block [length, d]
    logits: Tensor  # [length, vocabulary]


class _Trial:
    def __init__(self, model: PartialModel):
        self.model = model
        self.kind = f"model type {model.model.config.model_type!r}"

    def passed(self) -> Spans:
        """How spans can be run; ModelError where they can't."""
        if any(parameter.is_inference() for parameter in self.model.model.parameters()):
            raise ModelError(
                "the model was made under torch.inference_mode, so no gradient can be taken "
                "through it, which values need; load it outside"
            )
        rows = self._whole()
        batch = collate([row.ids for row in rows], pad_id=0, device=self.model.device)
        missed = self._in_spans(rows, batch)
        if missed:
            self.model.from_below = True
            if self._in_spans(rows, batch):
                raise ModelError(f"{self.kind} {missed}; can't edit it")
            logger.warning(
                "%s %s: the blocks below run as well, and every row from its start, which takes "
                "longer",
                self.kind,
                missed,
            )
            return Spans(prefixes=False, from_below=True)
        try:
            missed = self._after(rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            missed = _said(error)
        if missed:
            logger.warning(
                "%s can't be run after kept beginnings of rows (%s): every row is run from its "
                "start, which takes longer",
                self.kind,
                missed,
            )
        return Spans(prefixes=not missed, from_below=False)

    def _whole(self) -> list[_Alone]:
        try:
            return [_alone(self.model, ids) for ids in _rows(self.model)]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # anything can go wrong in code that nobody has seen
            raise ModelError(f"{self.kind} can't be run: {_said(error)}; can't edit it") from error

    def _in_spans(self, rows: list[_Alone], batch: Batch) -> str:
        """What is wrong with spans of blocks."""
        try:
            missed = self._blocks(rows, batch) or self._top(rows, batch)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"can't be run a block at a time, as keys and values are: {_said(error)}"
        return missed and f"can't be run a block at a time: {missed}"

    @torch.no_grad()
    def _blocks(self, rows: list[_Alone], batch: Batch) -> str:
        """What is wrong with the embedding and the blocks, run one at a time on all rows."""
        missed = _missed(self.model.run(batch, last=-1), [row.given[0] for row in rows])
        if missed:
            return (
                "tokens are embedded otherwise than in the whole model where their positions are "
                f"given, from 0, or another row is beside them (off by {missed:.1%})"
            )
        for i in range(self.model.depth):
            states = _padded([row.given[i] for row in rows])
            made = self.model.run(batch, states=states, first=i, last=i)
            missed = _missed(made, [row.made[i] for row in rows])
            if missed:
                return (
                    f"block {i} run by itself, with another row beside, gives other states than in "
                    f"the whole model (off by {missed:.1%})"
                )
        return ""

    def _top(self, rows: list[_Alone], batch: Batch) -> str:
        """What is wrong with logits, and with the gradient through the upper blocks."""
        top = self.model.depth - 1
        first = max(0, top - 3)  # some family's blocks are no more than an MLP
        with torch.no_grad():
            last = _padded([row.given[top] for row in rows])
            normed = self.model.run_normed(batch, states=last, first=top)
            missed = _missed(self.model.logits(normed), [row.logits for row in rows])
        if missed:
            return f"logits of its last states are not its own (off by {missed:.1%})"
        states = _padded([row.given[first] for row in rows]).requires_grad_()
        end = len(rows[0].ids) - 1
        normed = self.model.run_normed(batch, states=states, first=first)
        read = normed[0, end]
        loss = F.log_softmax(self.model.logits(read).float(), dim=-1)[0]
        loss = loss.to(read) + read[0]  # a head that is all zero or broken may hand down nothing
        (gradient,) = torch.autograd.grad(loss, states)
        if not bool(gradient[0, end - 1].any()):
            return f"from block {first} on, no gradient comes from a token to the one before it"
        return ""

    @torch.no_grad()
    def _after(self, rows: list[_Alone]) -> str:
        """What is wrong with the blocks after kept beginnings of unequal length."""
        model, ids = self.model, [row.ids for row in rows]
        shared = share_beginnings(
            ids,
            range(len(ids)),
            [min(cut, len(row) - 1) for cut, row in zip(CUTS, ids, strict=True)],
            columns=sum(LENGTHS),
            pad_id=0,
            device=model.device,
        )
        cuts = shared.cuts
        front = model.record_prefix(shared.stems, _padded([r.given[0][: max(cuts)] for r in rows]))
        embedded = model.run(front.before(shared.rests), last=-1, prefix=front)
        missed = _missed(embedded, [r.given[0][cut:] for r, cut in zip(rows, cuts, strict=True)])
        if missed:
            return f"tokens are embedded otherwise there, off by {missed:.1%}"
        for i in range(model.depth):
            given, made = [row.given[i] for row in rows], [row.made[i] for row in rows]
            begun = _padded([states[:cut] for states, cut in zip(given, cuts, strict=True)])
            kept = model.record_prefix(shared.stems, begun, first=i, last=i)
            if kept.entries[i] is None:
                return f"block {i} gives no attention keys and values to keep"
            states = _padded([states[cut:] for states, cut in zip(given, cuts, strict=True)])
            found = model.run(
                kept.before(shared.rests), states=states, first=i, last=i, prefix=kept
            )
            missed = _missed(found, [states[cut:] for states, cut in zip(made, cuts, strict=True)])
            if missed:
                return f"states after block {i} are off by {missed:.1%}"
        return ""


def _rows(model: PartialModel) -> list[list[int]]:
    """Two rows of different tokens that fit the model."""
    most = max(1, min(model.model.config.get_text_config().vocab_size, 200) - 1)
    return [
        [1 + (7 * i + 13 * row) % most for i in range(min(model.context, length))]
        for row, length in enumerate(LENGTHS)
    ]


@torch.no_grad()
def _alone(model: PartialModel, row: list[int]) -> _Alone:
    """The row through the model's own `forward`, its blocks looked at."""
    given: list[Tensor] = []
    made: list[Tensor] = []

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        given.append(states[0].clone())  # some families write into what they are given

    def after(_module: Any, _args: Any, output: Any) -> None:
        made.append(states_of(output)[0])

    ids = torch.tensor([row], device=model.device)
    with ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(after).remove)
        output = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return _Alone(row, given, made, output.logits[0])


def _padded(states: list[Tensor]) -> Tensor:
    """States [length, d] of rows as one batch [rows, longest, d]."""
    return torch.nn.utils.rnn.pad_sequence(states, batch_first=True)


def _missed(found: Tensor, expected: list[Tensor]) -> float:
    """‖found − expected‖/‖expected‖ of a row's tokens, the largest, if more than rounding; else 0.

    A row's median token counts: a rounding may send one to another expert. Broken weights give no
    numbers to compare; that is reported where they are used.
    """
    worst = 0.0
    for row, own in zip(found, expected, strict=True):
        own = own.to(row.device).double()
        share = (row[: len(own)].double() - own).norm(dim=-1) / own.norm(dim=-1)
        worst = max(worst, float(share.nan_to_num(nan=0, posinf=0).median()))
    return worst if worst > MISSED + 2 * torch.finfo(found.dtype).eps else 0.0


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
