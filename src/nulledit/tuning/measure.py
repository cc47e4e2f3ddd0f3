"""One candidate on a clean model: edit a batch of facts, ask, read a text, take it all back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nulledit.config import ContextSettings, Recipe
from nulledit.data.facts import Fact
from nulledit.editing.contexts import make_contexts
from nulledit.editing.statistics import Statistics
from nulledit.editor import Editor
from nulledit.evaluation.runner import evaluate
from nulledit.models.layouts import frozen
from nulledit.models.partial import PartialModel
from nulledit.models.tokens import chunks_by_length, collate, pad_id
from nulledit.tuning.objective import Outcome, shares

POSITIONS = 2048  # tokens that run together
LOGIT_POSITIONS = 256  # positions of which two models' logits are held at once

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """What a recipe did to a batch of facts."""

    outcome: Outcome
    """By fact and by window."""
    growth: float
    """Of the text's perplexity, against the unedited model; 0.01 is one per cent."""
    update_share: float
    """Largest ‖Δ‖/‖W₀‖ of a layer."""
    passes: int
    """Forward passes that optimised values, over all facts; 0 where the values were kept ones."""
    optimised: int
    """Values that were not kept ones."""
    seconds: float
    """Wall time, all in all."""
    value_seconds: float
    """Of it, optimising values."""
    cpu_seconds: float
    """Processor time of this process, all in all."""


class Bench:
    """Measures one recipe after the other on one model in memory; nothing is kept of the edits."""

    def __init__(
        self,
        editor: Editor,
        windows: Sequence[Sequence[int]],
        *,
        statistics: Statistics | None = None,
        progress: Progress | None = None,
    ):
        """`editor` has no edits; `windows` are of a text that is neither statistics nor facts.

        `statistics` of the model's keys; left out, they are looked for as by an edit.
        """
        self.editor, self.statistics, self.progress = editor, statistics, progress
        self.text = Text(editor.partial, windows, pad_id(editor.tokenizer))
        self._contexts: dict[ContextSettings, tuple[str, ...]] = {}
        self._with_contexts(editor.recipe)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.editor.partial.depth

    def measure(self, recipe: Recipe, facts: Sequence[Fact]) -> Measured:
        """Edit `facts` as one batch with `recipe`, and measure what that does.

        StatisticsError where it needs statistics that are missing; the model is as before then.
        """
        wall, cpu = time.perf_counter(), time.process_time()
        editor = self.editor
        with editor.trial(writing=False):
            editor.next_epoch(self._with_contexts(recipe), statistics=self.statistics)
            report = editor.edit(
                facts, batch_size=len(facts), shuffle=False, progress=self.progress
            )
            asked = evaluate(editor, facts, generate=False, progress=self.progress)
            drift, growth = self.text.moved()
        passes = sum(column.outcome.get("steps", 0) + 1 for column in report.columns)
        return Measured(
            outcome=Outcome(shares(asked.scores), drift),
            growth=growth,
            update_share=max(layer.update_share for layer in report.layers),
            passes=passes if report.optimised else 0,
            optimised=report.optimised,
            seconds=time.perf_counter() - wall,
            value_seconds=report.seconds.get("values", 0.0),
            cpu_seconds=time.process_time() - cpu,
        )

    def unedited(self, facts: Sequence[Fact]) -> Outcome:
        """The same of the model as it is."""
        asked = evaluate(self.editor, facts, generate=False, progress=self.progress)
        return Outcome(shares(asked.scores), (0.0,) * len(self.text.windows))

    def _with_contexts(self, recipe: Recipe) -> Recipe:
        """The recipe with the contexts that it would sample, so that they are sampled once."""
        settings = recipe.contexts
        if settings not in self._contexts:
            editor = self.editor
            self._contexts[settings] = make_contexts(
                editor.model, editor.tokenizer, settings, seed=editor.seed
            )
        return replace(recipe, contexts=replace(settings, texts=self._contexts[settings]))


class Text:
    """Windows of text, and what the unedited model makes of them."""

    def __init__(self, model: PartialModel, windows: Sequence[Sequence[int]], padding: int):
        """`windows` of at least two token ids each; they are read here, on the unedited model."""
        self.model, self.windows, self.padding = model, windows, padding
        self.base = self._states()
        with frozen(model.model), torch.no_grad():
            self.losses = [self._compared(i, self.base[i])[1] for i in range(len(windows))]

    def moved(self) -> tuple[tuple[float, ...], float]:
        """KL(unedited ‖ now) by window, nats a token, and the growth of perplexity."""
        states = self._states()
        with frozen(self.model.model), torch.no_grad():
            found = [self._compared(i, states[i]) for i in range(len(self.windows))]
        tokens = torch.tensor([len(ids) - 1 for ids in self.windows], dtype=torch.float64)
        now = torch.tensor([loss for _, loss in found], dtype=torch.float64)
        before = torch.tensor(self.losses, dtype=torch.float64)
        growth = ((now - before) * tokens).sum() / tokens.sum()
        return tuple(drift for drift, _ in found), float(growth.expm1())

    def _states(self) -> list[Tensor]:
        """Normed states that predict each window's second to last token, by window, on the CPU."""
        found: dict[int, Tensor] = {}
        with frozen(self.model.model), torch.no_grad():
            for chunk in chunks_by_length([len(ids) for ids in self.windows], POSITIONS):
                rows = [list(self.windows[i][:-1]) for i in chunk]
                batch = collate(rows, pad_id=self.padding, device=self.model.device)
                normed = self.model.run_normed(batch)  # [rows, length, d]
                for place, i in enumerate(chunk):
                    mask = batch.mask[place].bool().to(normed.device)
                    found[i] = normed[place][mask].cpu()
        return [found[i] for i in range(len(self.windows))]

    def _compared(self, window: int, states: Tensor) -> tuple[float, float]:
        """KL of the window's predictions from the unedited ones, and its loss, nats a token."""
        targets = torch.tensor(self.windows[window][1:])
        drift, loss = 0.0, 0.0
        parts = (x.split(LOGIT_POSITIONS) for x in (self.base[window], states, targets))
        for base, now, ids in zip(*parts, strict=True):
            then = self._log_probabilities(base)
            told = self._log_probabilities(now)
            apart = (then.exp() * (then - told)).masked_fill(
                then.isneginf(), 0
            )  # p = 0 adds nothing
            drift += float(apart.sum())
            loss -= float(told.gather(1, ids[:, None].to(told.device)).sum())
        return drift / len(targets), loss / len(targets)

    def _log_probabilities(self, states: Tensor) -> Tensor:
        logits = self.model.logits(states.to(self.model.device))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
