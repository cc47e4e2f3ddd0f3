"""A LoRA trained on the facts: the fine-tuning that users would try first.

LoRA (arXiv:2106.09685) by PEFT: W x + (α/r) B A x with A [r, d_in], B [d_out, r] trained and the
model's own weights never touched, so that it is bit for bit the same once the adapter is gone.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from nulledit.baselines.adapter import (
    Adapter,
    Target,
    import_peft,
    linear_modules,
    refuse_adapted,
)
from nulledit.config import ContextSettings
from nulledit.data.facts import Fact, quote
from nulledit.editing.call_log import Progress
from nulledit.editing.contexts import make_contexts
from nulledit.editing.values import plan_rows
from nulledit.errors import FactError, ModelError
from nulledit.io.settings import Count, Expected, NotNegative, Positive, Several, Whole, checked
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import differentiating, frozen
from nulledit.models.tokens import (
    Row,
    chunks_by_length,
)

CPU_POSITIONS = 512  # small chunks stay in a processor's cache
ACCELERATOR_POSITIONS = 8192


Blocks = Annotated[Several[int], Expected("some blocks, or None for all", bool)]
Targets = Annotated[Several[Target], Expected(f"some of {', '.join(get_args(Target))}", bool)]


@checked
@dataclass(frozen=True)
class LoraSettings:
    """How the adapter looks and how it is trained; defaults chosen as docs/baselines.md says."""

    rank: Count = 8
    """r, the rank of each matrix's update."""
    alpha: Positive = 16.0
    """α; the update is scaled by α/r."""
    layers: Blocks | None = None
    """Blocks with an adapter, from 0; None: all."""
    targets: Targets = ("mlp_out",)
    """Linear maps of a block with an adapter: those of attention, of the MLP, or the MLP's last."""
    epochs: Count = 30
    """Passes over the facts at most."""
    learning_rate: Positive = 1e-3
    """Adam's step size; constant, no weight decay."""
    batch_size: Count = 10
    """Facts per update."""
    stop_loss: NotNegative = 0.1
    """Training ends after a pass with a mean loss over facts (nats per target token) below this."""
    contexts: ContextSettings = field(default_factory=lambda: ContextSettings(count=2))
    """Prefix texts, made as for edits (`bare_weight` is of keys, and not read here)."""
    positions: Whole = 0
    """Token positions that run together; 0: by device. Results don't depend on it."""
    seed: Whole = 0
    """Of the adapter's start, the order of facts and the contexts."""


@dataclass(frozen=True)
class LoraReport:
    """What one call of `train` did."""

    epochs: int
    """Passes made."""
    losses: dict[str, float]
    """Fact id -> its mean loss (nats per target token) when last seen, before that update."""
    seconds: float
    """Wall time."""


class LoraBaseline:
    """A LoRA on a model, from its making to `close`; also a context manager.

    Evaluate inside with `nulledit.evaluation.evaluate` of the same model: the adapter
    works wherever the model runs. Don't edit the model meanwhile.
    """

    def __init__(
        self,
        model: EditableModel,
        settings: LoraSettings | None = None,
    ):
        """Put a fresh adapter on `model`, which says the same as before until it is trained."""
        import_peft()
        refuse_adapted(model.model)
        self.settings = s = settings or LoraSettings()
        self.model = model
        self.reports: list[LoraReport] = []
        names = linear_modules(model, s.targets, s.layers)
        with frozen(model.model):
            self.contexts = make_contexts(model, s.contexts, seed=s.seed)
        with _seeded(model.device, s.seed), differentiating():
            self._adapter: Adapter | None = Adapter(model.model, names, rank=s.rank, alpha=s.alpha)

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self._adapter.parameters) if self._adapter else 0

    def train(self, facts: Sequence[Fact], progress: Progress | None = None) -> LoraReport:
        """Train on `facts` with a fresh optimiser, going on from what the adapter is now.

        Adam on the mean loss over a batch's facts; a fact's loss is the mean over its rows (each
        training prompt in each context) of the mean over its target's tokens. Earlier batches are
        not seen again. `progress` is told "lora", passes done and passes at most. Raises FactError
        for a prompt longer than the model's context, ModelError for a loss that is not finite.
        """
        if self._adapter is None:
            raise ValueError("the adapter was closed")
        start, s = time.perf_counter(), self.settings
        rows = [self._rows(fact) for fact in facts]
        if not rows:
            raise FactError("no facts to train on")
        optimiser = torch.optim.Adam(self._adapter.parameters, lr=s.learning_rate)
        order = random.Random(f"{s.seed} {len(self.reports)}")
        losses = [0.0] * len(rows)
        epoch = 0
        while epoch < s.epochs:
            shuffled = order.sample(range(len(rows)), len(rows))
            for at in range(0, len(rows), s.batch_size):
                part = shuffled[at : at + s.batch_size]
                found = self._step(optimiser, [rows[i] for i in part])
                for i, loss in zip(part, found, strict=True):
                    losses[i] = loss
                    if not loss < float("inf"):
                        raise ModelError(
                            f"fact {quote(facts[i].id)}: the loss is not finite in pass {epoch}; "
                            "use a smaller learning rate"
                        )
                optimiser.step()
            epoch += 1
            if progress:
                progress("lora", epoch, s.epochs)
            if statistics.fmean(losses) < s.stop_loss:
                break
        named = {fact.id: loss for fact, loss in zip(facts, losses, strict=True)}
        self.reports.append(LoraReport(epoch, named, time.perf_counter() - start))
        return self.reports[-1]

    def close(self) -> None:
        """Take the adapter off: the model is as it was, to the bit."""
        if self._adapter is not None:
            self._adapter.remove()
            self._adapter = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _rows(self, fact: Fact) -> tuple[Row, ...]:
        try:
            return plan_rows(fact, self.model.encoder, self.contexts)
        except FactError as error:
            raise FactError(f"fact {quote(fact.id)}: {error}") from error

    def _step(
        self, optimiser: torch.optim.Optimizer, facts: Sequence[Sequence[Row]]
    ) -> list[float]:
        """Gradients of the mean loss over `facts`, summed over chunks; each fact's loss, nats."""
        optimiser.zero_grad()
        rows = [(i, row) for i, own in enumerate(facts) for row in own]
        positions = self.model.positions(CPU_POSITIONS, ACCELERATOR_POSITIONS)
        losses = [0.0] * len(facts)
        lengths = [len(row.ids) - 1 for _, row in rows]
        for chunk in chunks_by_length(lengths, self.settings.positions or positions):
            owners = [rows[i][0] for i in chunk]
            counts = torch.tensor([len(facts[i]) for i in owners])
            with differentiating():
                found = target_losses(self.model, [rows[i][1] for i in chunk])
                weighted = found / counts.to(found.device)
                (weighted.sum() / len(facts)).backward()
            for owner, loss in zip(owners, weighted.tolist(), strict=True):
                losses[owner] += loss
        return losses


@contextmanager
def lora_finetune(
    model: EditableModel,
    facts: Sequence[Fact],
    settings: LoraSettings | None = None,
    progress: Progress | None = None,
) -> Iterator[LoraBaseline]:
    """The model with a LoRA trained on `facts` inside; as it was, to the bit, afterwards.

    For a stream, make a LoraBaseline and call `train` once per batch.
    """
    with LoraBaseline(model, settings) as baseline:
        baseline.train(facts, progress)
        yield baseline


def target_losses(model: EditableModel, rows: Sequence[Row]) -> Tensor:
    """Mean negative log-likelihood of each row's target [rows], nats per token.

    Logits only where a target token is predicted; softmax in float32 or better.
    """
    batch = model.collate([row.ids[:-1] for row in rows])
    normed = model.run_normed(batch)  # [rows, length, d]
    lengths = [len(row.target_ids) for row in rows]
    at_row = [i for i, length in enumerate(lengths) for _ in range(length)]
    at = [p for row in rows for p in range(row.target_start - 1, len(row.ids) - 1)]
    logits = model.logits(normed[at_row, at])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids = torch.tensor([token for row in rows for token in row.target_ids], device=logits.device)
    losses = F.cross_entropy(logits, ids, reduction="none")
    return torch.stack([part.mean() for part in losses.split(lengths)])


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state is seeded inside, as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
