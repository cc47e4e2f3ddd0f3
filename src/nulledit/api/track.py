"""A run's numbers for a tracker of experiments: trackio, wandb, mlflow, or any function."""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, Literal, TypeAlias

from nulledit.editing.call_log import Progress
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.evaluation.kept_reading import base_reading
from nulledit.evaluation.reading import read
from nulledit.evaluation.scores import facts_held
from nulledit.runs.holding import held
from nulledit.runs.measure import Text
from nulledit.runs.pages import Result

Tracker: TypeAlias = Callable[[dict[str, float], int], None]
"""Called with numbers by name, and the step that they are of: how many batches the run has."""
Told: TypeAlias = tuple[Tracker, Text | None]
"""A tracker, and the text that it gets numbers of after each batch."""
TrackerName: TypeAlias = Literal["trackio", "wandb", "mlflow"]
PROJECT = "nulledit"
"""What runs are filed under."""
ENDS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "trackio": ({}, {}),
    "wandb": ({}, {"exit_code": 1}),
    "mlflow": ({"status": "FINISHED"}, {"status": "FAILED"}),
}
"""How a run is ended that went well, and one that failed, by the package's name."""


class Batches:
    """Tells a tracker of each batch: as progress of `Editor.edit`, and of the last one by `end`.

    A batch costs one pass over its facts, and one over the text where there is one. Names are
    `batch/facts`, `batch/held` (facts of it whose every target token is the likeliest),
    `batch/efficacy_strict` (their share), `batch/perplexity`, `batch/kl` (thousandths of a nat per
    token from the base) and `batch/seconds` (since the edit began, without what tracking takes).
    """

    def __init__(
        self, editor: EditEngine, tracker: Tracker, text: Text | None, progress: Progress | None
    ):
        """`progress`: who else receives it."""
        self.editor, self.tracker, self.progress = editor, tracker, progress
        self.windows = text.windows if text else None
        self._told, self._base = len(editor.history.batches), None
        if self.windows:
            self._base = base_reading(editor, self.windows)
        self._begun = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """As of an edit's progress."""
        if stage == "batches":
            self.end()
        if self.progress:
            self.progress(stage, done, total)

    def end(self) -> None:
        """Tell of the last batch, if it was not told of."""
        history, before = self.editor.history, time.perf_counter()
        if len(history.batches) == self._told:
            return
        self._told = len(history.batches)
        last = history.batches[-1].id
        facts = list(dict.fromkeys(c.fact for c in history.active if c.batch == last))
        holds = facts_held(self.editor.editable, facts)
        numbers: dict[str, Any] = {"facts": len(facts), "held": sum(holds)}
        numbers["efficacy_strict"] = sum(holds) / len(holds) if holds else None
        if self.windows:
            reading = read(self.editor.editable, self.windows, base=self._base)
            numbers |= {"perplexity": reading.perplexity, "kl": reading.kl}
        numbers["seconds"] = before - self._begun
        self.tracker(_flat(numbers, "batch/"), self._told)
        self._begun += time.perf_counter() - before


@contextmanager
def batches_told(
    editor: EditEngine, told: Told | None, progress: Progress | None
) -> Iterator[Progress | None]:
    """Progress for an edit inside, after each batch for a tracker, if there is one."""
    if told is None:
        yield progress
        return
    batches = Batches(editor, *told, progress)
    yield batches
    batches.end()


def numbers_of(result: Result) -> dict[str, float]:
    """The flat numbers of a result: rates as shares, perplexity, KL, facts and seconds.

    `facts` are those in the run, `facts_asked` those that were evaluated, and `facts_held` how many
    of these hold; `seconds/...` are by stage, `seconds` all of them. What was not measured is
    absent.
    """
    last = result.summary["runs"][-1]
    told = [line for line in result.lines if line["after"] is not None]
    numbers: dict[str, Any] = {"facts": result.summary["facts"]}
    if told:
        numbers |= {"facts_asked": len(told), "facts_held": sum(map(held, told))}
    after = dict(last["after"] or {})
    numbers |= _flat(after.pop("rates", {})) | _flat(after)
    seconds: Mapping[str, float] = last["seconds"]
    return _flat(numbers | {"seconds": sum(seconds.values())}) | _flat(seconds, "seconds/")


def _flat(found: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Finite numbers by name; of a mean with its error, or a value with one, the first."""
    numbers = {}
    for name, entry in found.items():
        if isinstance(entry, Mapping):
            entry = entry.get("mean", entry.get("value"))
        entry = getattr(entry, "value", entry)
        if isinstance(entry, int | float) and math.isfinite(entry):
            numbers[prefix + name] = float(entry)
    return numbers


def tracker_module(name: TrackerName) -> Any:
    """The package of a tracker; ConfigError with what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"tracker {name} can't be imported: pip install {name} ({error})"
        ) from error


@contextmanager
def tracking(name: TrackerName, run: str, settings: Mapping[str, Any]) -> Iterator[Tracker]:
    """A tracker's run called `run`, as a function; ended as failed where what is inside fails.

    Where it keeps its data is its own affair, by its own environment variables.
    """
    module = tracker_module(name)
    failed = True
    with redirect_stdout(sys.stderr):  # packages greet there, where --json is to be alone
        if name == "mlflow":
            module.set_experiment(PROJECT)
            module.start_run(run_name=run)
            module.log_params(dict(settings))
            log, end = module.log_metrics, module.end_run
        else:  # the two have one interface
            module.init(project=PROJECT, name=run, config=dict(settings))
            log, end = module.log, module.finish

    def tell(numbers: dict[str, float], step: int) -> None:
        with redirect_stdout(sys.stderr):
            log(numbers, step=step)

    try:
        yield tell
        failed = False
    finally:
        with redirect_stdout(sys.stderr):
            end(**ENDS[name][failed])
