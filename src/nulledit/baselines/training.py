"""Gradient descent on facts' targets, batch after batch: what the fine-tuning baselines share."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nulledit.config import ContextSettings
from nulledit.data.facts import Fact, quote
from nulledit.editing.call_log import Progress
from nulledit.editing.contexts import make_contexts
from nulledit.editing.values import plan_rows
from nulledit.errors import FactError, ModelError
from nulledit.io.settings import Count, NotNegative, Positive, Whole, checked
from nulledit.models.batches import chunks_by_length
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import differentiating, frozen
from nulledit.models.tokens import Row

CPU_POSITIONS = 512  # small chunks stay in a processor's cache
ACCELERATOR_POSITIONS = 8192


@checked
@dataclass(frozen=True)
class TrainingSettings:
    """How facts are trained."""

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
    """Of the start, the order of facts and the contexts."""


Settings = TypeVar("Settings", bound=TrainingSettings)


@dataclass(frozen=True)
class TrainingReport:
    """What one call of `train` did."""

    epochs: int
    """Passes made."""
    losses: dict[str, float]
    """Fact id -> its mean loss (nats per target token) when last seen, before that update."""
    seconds: float
    """Wall time."""


class Trained(Generic[Settings]):
    """Parameters on a model, from their making to `close`; also a context manager.

    Evaluate inside with `nulledit.evaluation.evaluate` of the same model: they work wherever the
    model runs. Don't edit the model meanwhile.
    """

    name: ClassVar[str]
    """What progress receives."""
    ends: ClassVar[bool] = False
    """Whether a target's text ends there: the end token is trained after it."""

    def __init__(self, model: EditableModel, settings: Settings):
        """Make the contexts; the model says the same as before until it is trained."""
        self.settings, self.model = settings, model
        self.reports: list[TrainingReport] = []
        self.parameters: list[torch.nn.Parameter] = []
        """What is trained; none once it was closed."""
        with frozen(model.model):
            self.contexts = make_contexts(model, settings.contexts, seed=settings.seed)

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.parameters)

    def train(self, facts: Sequence[Fact], progress: Progress | None = None) -> TrainingReport:
        """Train on `facts` with a fresh optimiser, going on from what the parameters are now.

        Adam on the mean loss over a batch's facts; a fact's loss is the mean over its rows (each
        training prompt in each context) of the mean over its target's tokens. Earlier batches are
        not seen again. `progress` receives the baseline's name, passes done and passes at most.
        Raises FactError for a prompt longer than the model's context, ModelError for a loss that
        is not finite.
        """
        if not self.parameters:
            raise ValueError(f"the {self.name} was closed")
        start, s = time.perf_counter(), self.settings
        rows = [self._rows(fact) for fact in facts]
        if not rows:
            raise FactError("no facts to train on")
        optimiser = torch.optim.Adam(self.parameters, lr=s.learning_rate)
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
                progress(self.name, epoch, s.epochs)
            if statistics.fmean(losses) < s.stop_loss:
                break
        named = {fact.id: loss for fact, loss in zip(facts, losses, strict=True)}
        self.reports.append(TrainingReport(epoch, named, time.perf_counter() - start))
        return self.reports[-1]

    def close(self) -> None:
        """Take the parameters off: the model is as it was, to the bit."""
        if self.parameters:
            self.parameters = []
            self._remove()

    def _remove(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _rows(self, fact: Fact) -> tuple[Row, ...]:
        try:
            rows = plan_rows(fact, self.model.encoder, self.contexts)
        except FactError as error:
            raise FactError(f"fact {quote(fact.id)}: {error}") from error
        end = self.model.encoder.tokenizer.eos_token_id
        if not self.ends or end is None:
            return rows
        room = self.model.encoder.max_length  # a row that fills the context ends without it
        return tuple(replace(r, ids=(*r.ids, end)) if len(r.ids) < room else r for r in rows)

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
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global random state is seeded inside, and as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
