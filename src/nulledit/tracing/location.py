"""All facts of a file traced, their mean effects and what these suggest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nulledit.data.facts import Fact
from nulledit.errors import ConfigError, FactError, ModelError
from nulledit.evaluation.stats import Rate
from nulledit.models.editable_model import EditableModel
from nulledit.models.layouts import frozen, listed
from nulledit.tracing.questions import Questions, ask
from nulledit.tracing.suggestion import Suggestion, suggest
from nulledit.tracing.trace import KINDS, LAST, PLACES, Trace, TraceSettings, spread_of, trace

LEAST = 20  # facts; below, single ones decide where the peak is


@dataclass(frozen=True)
class Effect:
    """A mean indirect effect over facts."""

    kind: str
    """`state` or `mlp`."""
    place: str
    """One of PLACES."""
    layer: int
    """Restored block, or the middle of the window."""
    rate: Rate
    """Mean over the facts that have such a token, a probability."""


@dataclass(frozen=True)
class Location:
    """What tracing found in a model."""

    settings: TraceSettings
    """How it was traced."""
    window: int
    """Blocks in a whole window."""
    depth: int
    """Blocks of the model."""
    spread: float
    """Standard deviation of the subjects' embeddings; the noise is `settings.noise` times it."""
    questions: Questions
    """What was asked, and what the model did not know."""
    traces: tuple[Trace, ...]
    """One for each known fact."""
    suggestion: Suggestion
    """Layers to try first."""
    wall_seconds: float
    """Of asking and tracing, without loading the model."""
    cpu_seconds: float
    """The same in time of all cores."""

    @property
    def clean(self) -> Rate:
        """Probability of the answer's first token, prompts as they are."""
        return Rate.of([t.clean for t in self.traces])

    @property
    def corrupted(self) -> Rate:
        """The same with noise on the subjects; the difference is the total effect."""
        return Rate.of([t.corrupted for t in self.traces])

    def effects(self) -> list[Effect]:
        """Mean effects by kind, place and layer; a place that no fact has is left out."""
        found = []
        for kind in KINDS:
            by_fact = [t.at_places(kind) for t in self.traces]
            for place in PLACES:
                rows = [places[place].tolist() for places in by_fact if place in places]
                if rows:
                    columns = enumerate(zip(*rows, strict=True))
                    found += [Effect(kind, place, i, Rate.of(values)) for i, values in columns]
        return found


def locate(
    model: EditableModel,
    facts: Sequence[Fact],
    settings: TraceSettings | None = None,
    *,
    least: int = LEAST,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Location:
    """Trace the facts that `model` knows. It is as before afterwards.

    `progress` receives facts done and facts in all. Raises FactError if the model knows fewer
    than `least` of the facts (two, at the least, or there is nothing to compare); ConfigError if
    the window is so large that none leaves out the first and the last block, or if the noise is
    more than the model can bear; ModelError if it has no such block, or an MLP output that does not
    enter the stream as its layout says.
    """
    settings = settings or TraceSettings()
    wall, cpu = time.perf_counter(), time.process_time()
    with frozen(model.model):
        _check(model, settings)
        questions = ask(model, facts)
        _refuse_few(questions, max(least, 2))
        spread = spread_of(model, questions.known)
        traces = []
        for question in questions.known:
            traces.append(trace(model, question, settings, spread=spread))
            progress(len(traces), len(questions.known))
    last = torch.stack([t.at_places("mlp")[LAST] for t in traces])
    return Location(
        settings=settings,
        window=settings.size(model.depth),
        depth=model.depth,
        spread=spread,
        questions=questions,
        traces=tuple(traces),
        suggestion=suggest(last, lowest=settings.lowest(model.depth)),
        wall_seconds=time.perf_counter() - wall,
        cpu_seconds=time.process_time() - cpu,
    )


def _check(model: EditableModel, settings: TraceSettings) -> None:
    """Refuse, before anything is asked, a model or a window with nothing to compare."""
    depth = model.depth
    if not any(model.fits(layer) for layer in range(depth)):
        model.mlp_out(0)
    others = [layer for layer in range(depth) if not model.fits(layer)]
    if others:
        raise ModelError(
            f"tracing puts back what {model.layout.mlp_out} writes in every block; "
            f"{listed(others)} have none that enters the stream as the others' does: can't trace it"
        )
    if depth < 3:
        raise ModelError(
            f"tracing compares the layers between the first and the last: the model has {depth}, "
            "expected 3 or more"
        )
    if settings.lowest(depth) >= depth - 1:
        raise ConfigError(
            f"a window of {settings.size(depth)} of {depth} layers leaves none to compare: give a "
            f"--window of at most {2 * depth - 5}"
        )


def _refuse_few(questions: Questions, least: int) -> None:
    if len(questions.known) >= least:
        return
    left = len(questions.at_the_end)
    beside = f" ({left} more end with their subject and can't be traced)" if left else ""
    raise FactError(
        f"the model says the answer of {len(questions.known)} of {questions.asked} facts{beside}, "
        f"expected at least {least}: give more facts that it knows, with old_answer as the answer "
        f"it says now{'' if least == 2 else ', or --at-least for a smaller number'}"
    )
