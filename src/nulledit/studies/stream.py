"""A stream of edits: what it is, where it is kept, and the model at each of its checkpoints.

A stream's folder is named by a hash of everything that decides it, so settings that several studies
share are edited once. Its ledger is committed batch by batch; any checkpoint's weights are the fold
of the ledger up to there, so what is measured can be asked for later, and is kept beside it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nulledit.config import Recipe
from nulledit.data.facts import Fact
from nulledit.editing.engine import EditEngine
from nulledit.errors import ConfigError
from nulledit.io.files import replacing_folder, write_text
from nulledit.io.jsonfiles import as_json
from nulledit.ledger.store import Store

FORMAT = 1  # raise it when the same plan comes to give another stream
MEASURES = 1  # raise it when the same question comes to get another answer

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StreamPlan:
    """A queue of facts, and how it is edited."""

    label: str
    """What tables call it; decides nothing."""
    recipe: Recipe
    facts: tuple[Fact, ...]
    """The queue, in the order that it is edited in."""
    batch_size: int
    """Facts solved together; a checkpoint follows each batch."""
    seed: int = 0
    """Of the contexts."""
    statistics: Path | None = None
    """A statistics file or folder; None: those found for the model."""
    against: str = ""
    """Label of the stream that a study compares it with; decides nothing."""
    x: float = 0
    """Its place on a figure's axis that is no number of edits; decides nothing."""

    def checkpoints(self) -> list[int]:
        """Numbers of facts edited after each batch, from 0."""
        return [*range(0, len(self.facts), self.batch_size), len(self.facts)]

    def digest(self, model_hash: str) -> str:
        """Names the stream on the model with `model_hash`."""
        statistics = "" if self.statistics is None else _statistics_hash(self.statistics)
        content = [
            FORMAT,
            model_hash,
            self.recipe.to_dict(),
            [fact.to_dict() for fact in self.facts],
            self.batch_size,
            self.seed,
            statistics,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Stream:
    """A plan at work in its folder."""

    def __init__(self, plan: StreamPlan, folder: Path, editor: EditEngine):
        """`editor` holds what the folder's ledger has so far."""
        self.plan, self.folder, self.editor = plan, folder, editor

    def edit(self, progress: Progress | None = None) -> None:
        """Edit what is missing; every finished batch is kept."""
        for _ in self.batches(progress):
            pass

    def batches(self, progress: Progress | None = None) -> Iterator[int]:
        """Each checkpoint but 0, as soon as it is edited: a stream may be left between two."""
        marks = self._marks()
        for start, end in pairwise(self.plan.checkpoints()):
            if str(end) not in marks:
                marks[str(end)] = self._batch(marks, start, end, progress)
                write_text(self.folder / "marks.json", as_json(marks))
                if progress:
                    progress("edited", end, len(self.plan.facts))
            yield end

    def _batch(
        self, marks: Mapping[str, Any], start: int, end: int, progress: Progress | None
    ) -> dict[str, Any]:
        """Edit one batch, and say what it took."""
        known = max((mark["event"] for mark in marks.values()), default=0)
        begun = len(self.editor.history.events) > known  # its time was lost with the process
        report = self.editor.edit(
            self.plan.facts[start:end],
            batch_size=self.plan.batch_size,
            shuffle=False,
            progress=progress,
        )
        return {
            "event": len(self.editor.history.events),
            "seconds": None if begun else report.seconds,
            "optimised": report.optimised,
            "notices": list(report.notices),
        }

    def seconds(self, *stages: str) -> float | None:
        """Wall seconds per fact of the stages `keys` and `solve`, or of a value's optimisation.

        For `values`, over those that were optimised here and not taken from the cache. None where
        there are none, or where an interruption took the time with it.
        """
        marks = list(self._marks().values())
        if any(mark["seconds"] is None for mark in marks):
            return None
        spent = sum(mark["seconds"].get(stage, 0.0) for mark in marks for stage in stages)
        if "values" in stages:
            count = sum(mark.get("optimised", 0) for mark in marks)
        else:
            count = len(self.plan.facts)
        return spent / count if count else None

    @contextmanager
    def at(self, facts: int) -> Iterator[EditEngine]:
        """The model after the first `facts` facts of the queue."""
        event = self._marks()[str(facts)]["event"] if facts else 0
        with self.editor.as_of(event):
            yield self.editor

    def measure(
        self, facts: int, name: str, settings: Mapping[str, Any], ask: Callable[[EditEngine], Any]
    ) -> Any:
        """What `ask` says of the model at a checkpoint, as plain data; kept in the folder.

        `name` and `settings` are everything that decides the answer besides stream and checkpoint.
        """
        asked: list[Any] = [name, settings]
        if MEASURES > 1:
            asked.append(MEASURES)
        content = json.dumps(asked, sort_keys=True, default=str)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        file = self.folder / "measured" / f"{facts:06d}-{name}-{digest}.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        with self.at(facts) as editor:
            found = ask(editor)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, as_json(found))
        return json.loads(file.read_text(encoding="utf-8"))

    def _marks(self) -> dict[str, Any]:
        file = self.folder / "marks.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


class Workbench:
    """One model, lent to one stream after the other."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, name: str
    ):
        """`model` is unedited, loaded by `name`; streams and values are kept in `folder`."""
        self.folder, self.name = folder, name
        self.base = EditEngine(model, tokenizer, recipe=Recipe(layers=(0,)), name=name)
        self.model = self.base.editable
        self._open: Stream | None = None

    def check(self, plan: StreamPlan) -> None:
        """StatisticsError if none serve the recipe of `plan`."""
        self.clear()
        self._editor(plan).check_statistics()

    def stream(self, plan: StreamPlan) -> Stream:
        """The stream of `plan` as far as it was edited; the one lent before ends."""
        self.clear()
        if not plan.facts:
            raise ConfigError(f"{plan.label}: no facts to edit")
        folder = self.folder / "streams" / plan.digest(self.base.history.base.hash)
        cache = self.folder / "values"
        if not Store(folder / "ledger").exists:
            self._fork(plan, folder)
        if Store(folder / "ledger").exists:
            editor = EditEngine.resume(
                folder,
                self.base.model,
                self.base.tokenizer,
                statistics=plan.statistics,
                value_cache=cache,
            )
        else:
            editor = self._editor(plan, cache)
            folder.mkdir(parents=True, exist_ok=True)
            editor.attach(folder)
        about = {"label": plan.label, "facts": len(plan.facts), "batch_size": plan.batch_size}
        write_text(folder / "plan.json", as_json({**about, "recipe": plan.recipe.to_dict()}))
        self._open = Stream(plan, folder, editor)
        return self._open

    def _editor(self, plan: StreamPlan, cache: Path | None = None) -> EditEngine:
        """A new one of the unedited model."""
        return EditEngine(
            self.base.model,
            self.base.tokenizer,
            recipe=plan.recipe,
            statistics=plan.statistics,
            name=self.name,
            seed=plan.seed,
            value_cache=cache,
        )

    def _fork(self, plan: StreamPlan, folder: Path) -> None:
        """Begin with the edits of a finished stream that is the beginning of `plan`, if one is."""
        for count in reversed(plan.checkpoints()[1:-1]):
            shorter = replace(plan, facts=plan.facts[:count])
            source = folder.parent / shorter.digest(self.base.history.base.hash)
            marks = source / "marks.json"
            if marks.is_file() and str(count) in json.loads(marks.read_text(encoding="utf-8")):
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / "marks.json", marks.read_text(encoding="utf-8"))
                if (source / "measured").is_dir():  # of the same model at the same checkpoints
                    shutil.copytree(
                        source / "measured",
                        folder / "measured",
                        dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns(".*"),  # what another process is writing
                    )
                with replacing_folder(
                    folder / "ledger"
                ) as partial:  # last: it says that all is there
                    shutil.copytree(source / "ledger", partial, dirs_exist_ok=True)
                return
        (folder / "marks.json").unlink(missing_ok=True)

    def clear(self) -> None:
        """The model without edits."""
        if self._open is not None:
            self._open.editor.weights.refresh([])
            self._open = None


def shuffled(facts: Sequence[Fact], seed: int, *, block: int = 200) -> list[Fact]:
    """`facts` in an order that a seed fixes.

    Blocks of `block` facts are shuffled each by itself, so that a longer queue begins with a
    shorter one of whole blocks, and its stream with the other's edits. A file that is sorted by
    relation stays so beyond a block.
    """
    mixed: list[Fact] = []
    for start in range(0, len(facts), block):
        part = facts[start : start + block]
        mixed += sorted(part, key=lambda f: hashlib.sha256(f"{seed}/{f.id}".encode()).digest())
    return mixed


def _statistics_hash(path: Path) -> str:
    """Of a compact file, or of the manifest of a folder, which says what the rest was made from."""
    file = path if path.suffix == ".safetensors" else path / "manifest.json"
    if not file.is_file():  # of a plan that is only estimated
        return str(path.name)
    return hashlib.sha256(file.read_bytes()).hexdigest()
