"""One candidate on a clean model: edit a batch of facts, ask, read a text, take it all back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nulledit.config import ContextSettings, Recipe
from nulledit.data.facts import Fact
from nulledit.editing.contexts import make_contexts
from nulledit.editing.engine import EditEngine
from nulledit.evaluation.kept_reading import base_reading
from nulledit.evaluation.reading import Divergence, divergence, read
from nulledit.evaluation.runner import evaluate
from nulledit.evaluation.stats import perplexity_growth
from nulledit.statistics.spectra import Statistics
from nulledit.tuning.objective import Outcome, shares

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Measured:
    """What a recipe did to a batch of facts."""

    outcome: Outcome
    """By fact and by window."""
    growth: float
    """Of the text's perplexity, against the unedited model; 0.01 is one per cent."""
    kl: Divergence
    """Of the text, from the unedited model."""
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
        editor: EditEngine,
        windows: Sequence[Sequence[int]],
        *,
        statistics: Statistics | None = None,
        progress: Progress | None = None,
    ):
        """`editor` has no edits; `windows` are of a text that is neither statistics nor facts.

        `statistics` of the model's keys; left out, they are looked for as by an edit.
        """
        self.editor, self.statistics, self.progress = editor, statistics, progress
        self.base = base_reading(editor, windows)
        self._contexts: dict[ContextSettings, tuple[str, ...]] = {}
        self._with_contexts(editor.recipe)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.editor.editable.depth

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
            asked = evaluate(
                editor.editable, facts, generate=False, progress=self.progress, beside=False
            )
            text = read(editor.editable, self.base.windows, base=self.base)
        apart = text.apart or ()
        passes = sum((column.outcome.steps or 0) + 1 for column in report.columns)
        return Measured(
            outcome=Outcome(shares(asked.scores), tuple(float(part.mean()) for part in apart)),
            growth=perplexity_growth(self.base.losses, text.losses).percent / 100,
            kl=divergence(apart),
            update_share=max(layer.update_share for layer in report.layers),
            passes=passes if report.optimised else 0,
            optimised=report.optimised,
            seconds=time.perf_counter() - wall,
            value_seconds=report.seconds.get("values", 0.0),
            cpu_seconds=time.process_time() - cpu,
        )

    def unedited(self, facts: Sequence[Fact]) -> Outcome:
        """The same of the model as it is."""
        asked = evaluate(
            self.editor.editable, facts, generate=False, progress=self.progress, beside=False
        )
        return Outcome(shares(asked.scores), (0.0,) * len(self.base.windows))

    def _with_contexts(self, recipe: Recipe) -> Recipe:
        """The recipe with the contexts that it would sample, so that they are sampled once."""
        settings = recipe.contexts
        if settings not in self._contexts:
            editor = self.editor
            self._contexts[settings] = make_contexts(editor.editable, settings, seed=editor.seed)
        return replace(recipe, contexts=replace(settings, texts=self._contexts[settings]))
