"""Causal tracing of one fact: which hidden states carry it (ROME, arXiv:2202.05262, Section 2).

Three kinds of runs on one prompt. Clean: as it is. Corrupted: Gaussian noise on the embeddings of
the subject's tokens, so that the answer's probability falls. Restored: corrupted, but with the
state after one block at one token, or the MLP's output in a window of blocks at one token
(Appendix B), put back from the clean run. What comes back of the probability is the indirect
effect.

The published code runs the whole model for each restoration. Here, with the same result:

- the clean run and the corrupted ones go through the model once, together; their states, MLP
  outputs and attention keys and values are kept;
- a restoration at a token changes nothing before it, so only the positions from there on are run,
  with the corrupted run's kept keys and values in front (all positions, where a model can't be run
  after these);
- nor anything below its block: the restorations of a token, of all layers, kinds and draws, form
  one batch that is taken up block by block, each joining where it differs first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from nulledit.data.facts import quote
from nulledit.errors import ConfigError, ModelError
from nulledit.io.settings import Count, Positive, Whole, checked
from nulledit.models.batches import Batch
from nulledit.models.editable_model import EditableModel
from nulledit.models.experts import comes_apart
from nulledit.models.hooks import states_of
from nulledit.models.layouts import frozen
from nulledit.models.prefix import Prefix
from nulledit.tracing.questions import Question

KINDS = ("state", "mlp")
"""What is put back: the hidden state after a block, or MLP outputs in a window of blocks."""
PLACES = ("subject, first", "subject, middle", "subject, last", "prompt, last")
"""Tokens that effects are reported for. A subject of one token has only a last one, one of two has
no middle; several tokens in the middle count with their mean."""
FIRST, MIDDLE, LAST, END = PLACES


@checked
@dataclass(frozen=True)
class TraceSettings:
    """How a fact is traced."""

    draws: Count = 3
    """Corrupted runs a fact; ROME takes ten."""
    noise: Positive = 3.0
    """Standard deviation of the noise, in those of the embeddings of the facts' subjects."""
    window: Whole = 0
    """Blocks whose MLP outputs are put back together; 0: as ROME's ten of GPT-2 XL's 48."""
    seed: Whole = 0
    """Of the noise; a fact's own is made from it and the fact's id."""
    positions: Count = 4096
    """Token positions that run through a block together; results don't depend on it."""

    def size(self, depth: int) -> int:
        """Blocks of a whole window in a model of `depth` blocks."""
        return self.window or max(1, round(depth * 10 / 48))

    def lowest(self, depth: int) -> int:
        """Middle of the lowest window that leaves the first block out."""
        return self.size(depth) // 2 + 1

    def blocks(self, layer: int, depth: int) -> range:
        """Blocks of the window around `layer` in a model of `depth` blocks, shorter at its ends.

        As published: an even window reaches one block less far up than down.
        """
        size = self.size(depth)
        return range(max(0, layer - size // 2), min(depth, layer + (size + 1) // 2))


@dataclass(frozen=True)
class Trace:
    """What restoring does for one fact, in means over the draws."""

    question: Question
    """What was traced."""
    clean: float
    """Probability of the answer's first token as the prompt is."""
    corrupted: float
    """The same with noise on the subject."""
    tokens: tuple[int, ...]
    """Indices of the restored tokens: the subject's, then the prompt's last."""
    effects: dict[str, Tensor]
    """Kind -> indirect effects [tokens, layers], p(restored) − p(corrupted), float64."""

    def at_places(self, kind: str) -> dict[str, Tensor]:
        """Effects [layers] by place, those that the fact has."""
        *subject, end = self.effects[kind]
        found = {LAST: subject[-1], END: end}
        if len(subject) > 1:
            found[FIRST] = subject[0]
        if len(subject) > 2:
            found[MIDDLE] = torch.stack(subject[1:-1]).mean(0)
        return found


def noise_of(question: Question, width: int, settings: TraceSettings) -> Tensor:
    """Standard normal noise [draws, subject tokens, width], the same for a fact in any company."""
    digest = sha256(f"{settings.seed}/{question.fact_id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(
        settings.draws, question.last + 1 - question.first, width, generator=generator
    )


@torch.no_grad()
def spread_of(model: EditableModel, questions: Sequence[Question]) -> float:
    """Standard deviation of the embeddings of the questions' subjects, over all their entries."""
    ids = [token for q in questions for token in q.ids[q.first : q.last + 1]]
    embedding = model.model.get_input_embeddings()
    rows = embedding(torch.tensor(ids, device=model.device)[None])
    return float(rows.double().std())


@torch.no_grad()
def trace(
    model: EditableModel, question: Question, settings: TraceSettings, *, spread: float
) -> Trace:
    """Trace one fact at each token of its subject and at the prompt's last token.

    `spread`: standard deviation of the subjects' embeddings (`spread_of`). No weight is changed.
    Raises ModelError if the model's logits are not finite, or its blocks take more than states from
    those below; ConfigError if logits are not finite with noise.
    """
    kind = f"model type {model.model.config.model_type!r}"
    if model.from_below:
        raise ModelError(
            f"{kind}: its blocks take more than states from those below, so states can't be put "
            "back alone and it can't be traced: name its layers"
        )
    if any(comes_apart(model.matrix(i)) for i in range(model.depth) if model.fits(i)):
        raise ModelError(
            f"{kind}: its experts' outputs come apart, so they can't be put back and it can't be "
            "traced: name its layers"
        )
    with frozen(model.model):
        return _Runs(model, question, settings, spread).trace()


@dataclass(frozen=True)
class _Restoration:
    """One state or window, put back in every draw."""

    kind: str
    layer: int
    first: int  # block whose input is the first thing that is run
    blocks: range  # whose MLP outputs are put back


class _Runs:
    """The kept clean and corrupted runs of one prompt, and the restored ones made from them."""

    def __init__(
        self, model: EditableModel, question: Question, settings: TraceSettings, spread: float
    ):
        self.model, self.question, self.settings = model, question, settings
        rows = [question.ids] * (1 + settings.draws)  # the clean one first
        self.batch = model.collate(rows)
        with self._corrupting(settings.noise * spread):
            embedded = model.run(self.batch, last=-1)
        self.states: list[Tensor] = [embedded]  # at the input of each block [1 + draws, length, d]
        self.mlp: list[Tensor] = []  # W's output in each block, the clean run's [length, d]
        self.kept: Prefix | None = None
        with self._reading():
            if model.columns:
                self.kept = model.record_prefix(self.batch, embedded, first=0)
            else:
                model.run(self.batch, states=embedded)
        ends = model.run_normed(self.batch, states=self.states[-2], first=model.depth - 1)
        self.clean, *corrupted = self._answers(ends[:, -1]).tolist()
        self.corrupted = sum(corrupted) / len(corrupted)
        self._check_finite()

    def trace(self) -> Trace:
        """All effects of the prompt."""
        question, depth = self.question, self.model.depth
        tokens = (*range(question.first, question.last + 1), len(question.ids) - 1)
        effects = {kind: torch.zeros(len(tokens), depth, dtype=torch.float64) for kind in KINDS}
        for row, token in enumerate(tokens):
            for item, found in self._restored(token):
                effects[item.kind][row, item.layer] = found - self.corrupted
            # After the last block nothing moves between tokens any more: its state is the answer's
            # where it predicts it, and nothing elsewhere.
            whole = self.clean - self.corrupted if token == tokens[-1] else 0.0
            effects["state"][row, depth - 1] = whole
        return Trace(question, self.clean, self.corrupted, tokens, effects)

    def _check_finite(self) -> None:
        if not math.isfinite(self.clean):
            raise ModelError(
                f"fact {quote(self.question.fact_id)}: the model's logits are not finite: its "
                "weights are broken, or --dtype float32 is needed"
            )
        if not math.isfinite(self.corrupted):
            raise ConfigError(
                f"fact {quote(self.question.fact_id)}: with noise {self.settings.noise:g} the "
                "model's logits are not finite: give a smaller --noise, or --dtype float32"
            )

    def _restored(self, token: int) -> Iterator[tuple[_Restoration, float]]:
        """Each restoration at `token`, with the answer's mean probability over the draws."""
        depth = self.model.depth
        asked = [_Restoration("state", i, i + 1, range(0)) for i in range(depth - 1)]
        for i in range(depth):
            blocks = self.settings.blocks(i, depth)
            asked.append(_Restoration("mlp", i, blocks.start, blocks))
        asked.sort(key=lambda item: item.first)
        length = len(self.question.ids) - self._begin(token)
        size = max(1, self.settings.positions // (self.settings.draws * length))
        for start in range(0, len(asked), size):
            chunk = asked[start : start + size]
            yield from zip(chunk, self._run(token, chunk), strict=True)

    def _run(self, token: int, asked: Sequence[_Restoration]) -> list[float]:
        """Take `asked`, ordered by their first block, up to the top together."""
        draws, depth = self.settings.draws, self.model.depth
        begin = self._begin(token)
        states: Tensor | None = None  # [joined * draws, positions from `begin` on, d]
        joined = 0
        for block in range(asked[0].first, depth):
            coming = []
            while joined < len(asked) and asked[joined].first == block:
                start = self.states[block][1:, begin:]
                if asked[joined].kind == "state":
                    start = start.clone()
                    start[:, token - begin] = self.states[block][0, token]
                coming.append(start)
                joined += 1
            before = [] if states is None else [states.to(self.states[block].device)]
            states = torch.cat([*before, *coming])
            inside = [i for i, item in enumerate(asked[:joined]) if block in item.blocks]
            rows = torch.tensor([i * draws + d for i in inside for d in range(draws)])
            prefix, batch = self._front(block, begin, joined)
            with self._putting_back(block, token, rows.long(), batch.ids.shape):
                if block < depth - 1:
                    states = self.model.run(
                        batch, states=states, first=block, last=block, prefix=prefix
                    )
                else:
                    states = self.model.run_normed(batch, states=states, first=block, prefix=prefix)
        assert states is not None
        found = self._answers(states[:, -1]).view(-1, draws).mean(1)
        return [float(x) for x in found]

    def _begin(self, token: int) -> int:
        """The first position that is run for restorations at `token`."""
        return 0 if self.kept is None else token

    def _front(self, block: int, begin: int, joined: int) -> tuple[Prefix, Batch]:
        """What stands before `begin` in the corrupted runs, seen by `block`; rows after it."""
        draws = self.settings.draws
        device = self.batch.ids.device
        rows = torch.arange(1, draws + 1, device=device).repeat(joined)
        entries: list[tuple[Tensor, Tensor] | None] = [None] * self.model.depth
        held = self.kept and self.kept.entries[block]
        if held and begin > 0:
            entries[block] = (held[0][:, :, :begin], held[1][:, :, :begin])
        prefix = Prefix(entries, self.batch.mask[:, :begin]).select(rows)
        batch = Batch(
            self.batch.ids[rows, begin:], self.batch.mask[rows], self.batch.positions[rows, begin:]
        )
        return prefix, batch

    def _answers(self, normed: Tensor) -> Tensor:
        """Probability of the answer's token [rows] after normed states [rows, d], float64."""
        logits = self.model.logits(normed)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        return logits.softmax(-1)[:, self.question.answer].double().cpu()

    @contextmanager
    def _corrupting(self, deviation: float) -> Iterator[None]:
        """Noise on the embeddings of the subject's tokens in all rows but the clean one.

        On the embedding module's output, as published: what a family does with it afterwards
        (positions, scale) stays its own.
        """
        hidden = slice(self.question.first, self.question.last + 1)

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            noise = noise_of(self.question, output.shape[-1], self.settings)
            output = output.clone()
            output[1:, hidden] += (deviation * noise.double()).to(output)
            return output

        embedding = self.model.model.get_input_embeddings()
        assert isinstance(embedding, nn.Module)
        handle = embedding.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Collect states after each block, and W's outputs in the clean row."""

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self.states.append(states_of(output))

        def written(_module: nn.Module, _args: Any, output: Tensor) -> None:
            rows = output.view(*self.batch.ids.shape, -1)  # some families join rows before W
            self.mlp.append(rows[0].clone())  # and some add to its output in place

        with ExitStack() as stack:
            for i, block in enumerate(self.model.blocks):
                stack.callback(block.register_forward_hook(after).remove)
                stack.callback(self.model.mlp_out(i).register_forward_hook(written).remove)
            yield

    @contextmanager
    def _putting_back(
        self, block: int, token: int, rows: Tensor, shape: torch.Size
    ) -> Iterator[None]:
        """The clean output of W in `block` at `token`, in `rows`.

        `shape` [rows, length] of what is run: some families join rows before they come to W.
        """

        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            at = rows.to(output.device), token - self._begin(token)
            output.view(*shape, -1)[at] = self.mlp[block][token].to(output)
            return output

        if not len(rows):
            yield
            return
        handle = self.model.mlp_out(block).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()
