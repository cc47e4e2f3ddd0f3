"""What a cost is measured from: three passes over all blocks of a model at once.

Text for the second moments of what edits read, the facts at their subjects, and text again for
gradients and for what drives gates. Position 0 of a text, an attention sink, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nulledit.data.facts import Fact
from nulledit.linalg.moments import SecondMoment
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.experts import count_and_width, is_experts
from nulledit.models.hooks import collect, hooked
from nulledit.models.layouts import differentiating
from nulledit.models.tokens import check_embedded

LOGIT_POSITIONS = 512  # whose logits are held at once
Progress = Callable[[str, int, int], None]
Windows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Moments:
    """Second moments over text of what edits read, by layer."""

    keys: dict[int, SecondMoment]
    """Of W's input."""
    inputs: dict[int, SecondMoment]
    """Of the MLP's input."""


@dataclass(frozen=True)
class Subjects:
    """Facts at their subjects' last tokens."""

    keys: dict[int, Tensor]
    """By layer, K [d_in, n], means over contexts as edits have them; float64."""
    inputs: dict[int, Tensor]
    """By layer, X [d, n] in the same way."""
    squares: dict[int, Tensor]
    """By layer, ‖h‖² [n] of what stands where values do, in the bare prompts."""


class _Row(NamedTuple):
    """A prompt of a fact in a context, up to the subject."""

    ids: tuple[int, ...]
    fact: int
    context: int
    of: int  # prompts of the fact
    bare: bool  # the fact's own prompt in no context


@dataclass(frozen=True)
class Passes:
    """The three passes over some blocks of a model."""

    model: EditableModel
    """Run, never changed; its weights frozen by the caller."""
    keys: Sequence[int]
    """Layers whose keys are read."""
    inputs: Sequence[int]
    """Layers whose MLP's inputs are read: each can be given neurons."""
    positions: int
    """Token positions that run together, at most, but for a longer text."""
    progress: Progress
    """Told of a stage, what is done and of how much."""

    def text(self, windows: Windows) -> Moments:
        """Second moments over `windows` of token ids."""
        model, found, done = self.model, Moments({}, {}), 0
        for group in self._groups(windows):
            with torch.no_grad(), ExitStack() as stack:
                of_keys = stack.enter_context(model.reading_keys(self.keys))
                of_inputs = stack.enter_context(model.reading_inputs(self.inputs))
                model.run(model.collate(group), last=max((*self.keys, *self.inputs)))
            for layer, keys in of_keys.items():
                if layer not in found.keys:
                    found.keys[layer] = _empty(keys, model.mlp_out(layer))
                found.keys[layer].update(keys[:, 1:])
            for layer, inputs in of_inputs.items():
                if layer not in found.inputs:
                    found.inputs[layer] = _empty(inputs)
                found.inputs[layer].update(inputs[:, 1:])
            done += sum(map(len, group))
            self.progress("tokens", done, sum(map(len, windows)))
        return found

    def subjects(
        self, facts: Sequence[Fact], contexts: Sequence[str], bare_weight: float
    ) -> Subjects:
        """What `facts` give at their subjects in `contexts`, the bare "{}" first.

        As for edits, a key is the mean over a fact's prompts and the contexts, of which the bare
        one weighs `bare_weight`.
        """
        model, found = self.model, Subjects({}, {}, {})
        rows = [row for i, fact in enumerate(facts) for row in self._rows(i, fact, contexts)]
        shares = [bare_weight, *[(1 - bare_weight) / max(1, len(contexts) - 1)] * len(contexts)]
        layers, done = sorted({*self.keys, *self.inputs}), 0
        for chunk in chunks_by_length([len(row.ids) for row in rows], self.positions):
            mine = [rows[i] for i in chunk]
            batch = model.collate([row.ids for row in mine])
            at = range(len(mine)), [len(row.ids) - 1 for row in mine]
            with torch.no_grad(), ExitStack() as stack:
                made = {i: stack.enter_context(_reading_values(model, i)) for i in layers}
                of_keys = stack.enter_context(model.reading_keys(self.keys))
                of_inputs = stack.enter_context(model.reading_inputs(self.inputs))
                model.run(batch, last=layers[-1])
            weights = torch.tensor(
                [(shares[row.context] if len(contexts) > 1 else 1.0) / row.of for row in mine],
                dtype=torch.float64,
            )
            owners = torch.tensor([row.fact for row in mine])
            for columns, read in ((found.keys, of_keys), (found.inputs, of_inputs)):
                for layer, states in read.items():
                    total = columns.setdefault(layer, _zeros(states.shape[-1], len(facts)))
                    total.index_add_(1, owners, states[at].cpu().double().mT * weights)
            for layer, outputs in made.items():
                squares = outputs[0].view(*batch.ids.shape, -1)[at].cpu().double().square().sum(-1)
                held = found.squares.setdefault(layer, _zeros(len(facts)))
                bare = torch.tensor([row.bare for row in mine])
                held[owners[bare]] = squares[bare]
            done += len(mine)
            self.progress("subjects", done, len(rows))
        return found

    def gradients(
        self, windows: Windows, layers: Sequence[int], gates: Mapping[int, Drives], seed: int
    ) -> dict[int, list[float]]:
        """tr(S)/d of each of `layers`, window by window; `gates` see their MLP's inputs besides.

        S is the second moment of the gradient, by what stands where values do, of the
        log-probability of tokens that the model itself predicts, one drawn at each position: the
        Fisher information. Draws are of `seed` and the window's number, whatever runs together.
        """
        model = self.model
        found: dict[int, list[float]] = {layer: [] for layer in layers}
        done = 0
        for group in self._groups(windows):
            batch = model.collate(group)
            with differentiating(), ExitStack() as stack:
                states = model.run(batch, last=-1).detach().requires_grad_()
                made = {i: stack.enter_context(_reading_values(model, i)) for i in layers}
                inputs = stack.enter_context(model.reading_inputs(list(gates)))
                normed = model.run_normed(batch, states=states)
                drawn = [_chances(len(w), seed, done + i) for i, w in enumerate(group)]
                towards = _drawn_gradient(model, normed.detach(), torch.stack(drawn))
                outputs = [made[layer][0] for layer in layers]
                gradients = torch.autograd.grad(normed, outputs, towards)
            for layer, gradient in zip(layers, gradients, strict=True):
                by_row = gradient.view(*batch.ids.shape, -1)[:, 1:].double().square().mean((1, 2))
                found[layer] += by_row.tolist()
            for layer, drives in gates.items():
                drives.add(inputs[layer][:, 1:])
            done += len(group)
            self.progress("windows", done, len(windows))
        return found

    def _rows(self, i: int, fact: Fact, contexts: Sequence[str]) -> Iterator[_Row]:
        for p, prompt in enumerate(fact.prompts):
            for c, context in enumerate(contexts):
                row = self.model.encoder.encode_template(prompt, fact.subject, context=context)
                yield _Row(row.upto_subject().ids, i, c, len(fact.prompts), p + c == 0)

    def _groups(self, windows: Windows) -> Iterator[Windows]:
        """`windows` in turn, as many together as may be."""
        size = max(1, self.positions // len(windows[0]))
        for start in range(0, len(windows), size):
            group = windows[start : start + size]
            for window in group:
                check_embedded(window, self.model.vocabulary, self.model.tokenizer)
            yield group


class Drives:
    """How far text drives the gates of facts in one block: s = gᵀx at its tokens x."""

    def __init__(self, directions: Tensor, threshold: float, rarest: int):
        """`directions` g [d, n]; above `threshold` a gate is open; the `rarest` s are kept."""
        self.directions, self.threshold, self.rarest = directions, threshold, rarest
        n = directions.shape[1]
        self.squares = torch.zeros(n, dtype=torch.float64)  # Σ s²
        self.squares_open = torch.zeros(n, dtype=torch.float64)  # the same where a gate is open
        self.opened = torch.zeros(n, dtype=torch.long)  # tokens above the threshold
        self.largest = torch.empty(0, n, dtype=torch.float64)  # s, descending
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count `inputs` [..., d] of tokens."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        kind = torch.promote_types(rows.dtype, torch.float32)
        s = (rows.to(kind) @ self.directions.to(rows.device, kind)).cpu().double()  # [tokens, n]
        self.tokens += len(s)
        self.squares += s.square().sum(0)
        is_open = s > self.threshold
        self.squares_open += (s * is_open).square().sum(0)
        self.opened += is_open.sum(0)
        kept = torch.cat([self.largest, s])
        self.largest = kept.topk(min(len(kept), self.rarest), dim=0).values


def _drawn_gradient(model: EditableModel, normed: Tensor, chances: Tensor) -> Tensor:
    """Gradient, by the `normed` states [rows, length, d], of Σ log p of a token drawn at each.

    `chances` [rows, length]: uniform numbers that the draws are made of.
    """
    width = normed.shape[-1]
    drawn = chances.to(normed.device).reshape(-1).split(LOGIT_POSITIONS)
    found = []
    for part, chance in zip(normed.reshape(-1, width).split(LOGIT_POSITIONS), drawn, strict=True):
        leaf = part.clone().requires_grad_()
        logits = model.logits(leaf)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        told = logits.log_softmax(-1)
        with torch.no_grad():
            below = told.exp().cumsum(-1) < chance[:, None].to(told)
            tokens = below.sum(-1).clamp_max(told.shape[-1] - 1)
        total = told.gather(-1, tokens[:, None]).sum()
        found.append(torch.autograd.grad(total, leaf)[0])
    return torch.cat(found).view(normed.shape)


def _chances(length: int, seed: int, window: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + window) % 2**63)
    return torch.rand(length, generator=generator, dtype=torch.float64)


@contextmanager
def _reading_values(model: EditableModel, layer: int) -> Iterator[list[Tensor]]:
    """Collect what stands where values of `layer` do, in each run inside, with its graph."""
    at_w = model.values_at_output
    found: list[Tensor] = []
    with hooked(model.mlp_out(layer) if at_w else model.blocks[layer], collect(found)):
        yield found


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def _empty(like: Tensor, module: nn.Module | None = None) -> SecondMoment:
    """One for states as wide as these; where `module` has experts, one for each."""
    width, experts = like.shape[-1], 0
    if module is not None and is_experts(module):
        experts, width = count_and_width(module)
    device = torch.device("cpu") if like.device.type == "mps" else like.device  # has no float64
    return SecondMoment(width, experts, device=device, chunk=1024)
