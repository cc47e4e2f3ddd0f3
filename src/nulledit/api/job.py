"""A job: what a pipeline does with a model, in one YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from nulledit.api.editor import Editor
from nulledit.api.run import Refused, Run
from nulledit.api.track import Tracker, TrackerName, tracker_module, tracking
from nulledit.config import Recipe, read_recipe
from nulledit.data.readers import read_facts
from nulledit.errors import ConfigError
from nulledit.export.updates import Export
from nulledit.export.write import EXPORTS, Kind, check_options, write_export
from nulledit.io.settings import (
    Expected,
    Several,
    Whole,
    checked,
    read_settings,
)
from nulledit.io.untrusted import MAX_SETTINGS, one_line, parse_yaml, read_text
from nulledit.ledger.store import Store
from nulledit.runs.limits import Limits, load_limits
from nulledit.runs.pages import Result
from nulledit.runs.report import collect, write_report
from nulledit.runs.talk import Talk

Name = Annotated[str, Expected("a name or a path", bool)]


@checked
@dataclass(frozen=True, kw_only=True)
class ExportJob:
    """One export of a job."""

    kind: Kind
    """As of `nulledit export --as`."""
    out: Name
    """Folder to make."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its own options, by their names: rank, dtype, tensor_type, text, ..."""

    def __post_init__(self) -> None:
        own = EXPORTS[self.kind].options
        if wrong := sorted(set(self.options) - set(own)):
            raise ConfigError(
                f"exports: {', '.join(wrong)} can't be given for {self.kind}; it takes "
                f"{', '.join(own)}"
            )
        try:
            check_options(self.options)
        except ConfigError as error:
            raise ConfigError(f"exports: {error}") from None


@checked
@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, facts, how they are written, what must hold, and what is handed over.

    Paths are relative to the file's folder.
    """

    model: Name
    """A name, a Hub id, a folder, or a GGUF file."""
    facts: Several[Name]
    """Files of facts."""
    out: Name
    """The run's folder. If a run is there, facts that it lacks are written into it."""
    recipe: str | None = None
    """A recipe's file or name; left out: the model's."""
    set: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the recipe that are otherwise, by dotted names."""
    stats: str | None = None
    """Statistics; left out: those found."""
    seed: Whole = 0
    """Of contexts and of the queue's order."""
    dtype: str | None = None
    """The model's; left out: as on disk."""
    device: str | None = None
    """Left out: an accelerator where there is one."""
    retry: Whole = 0
    """Write what does not hold again, so many times at most."""
    old_answers: bool = False
    """Take what the base says as the old answer of facts that name none."""
    text: str | None = None
    """For perplexity and KL; left out: the text that comes with nulledit."""
    gate: str | None = None
    """Limits: default, or a file. If one is broken nothing is written."""
    tracker: TrackerName | None = None
    """What the numbers of each batch and of the result go to, if anything."""
    capability: str | None = None
    """Folder of the six tasks, where limits ask for them."""
    exports: Several[ExportJob] = ()
    """What is handed over."""
    report: str | None = None
    """One HTML page; left out: none."""

    def within(self, folder: Path) -> Job:
        """With its paths as seen from where we are, if they are given from `folder`."""

        def at(path: str) -> str:
            return str(folder / path)

        def if_there(name: str | None) -> str | None:
            return at(name) if name and (folder / name).exists() else name

        base = folder / self.model  # by its whole path: a run finds its base from anywhere

        return replace(
            self,
            model=str(base.resolve()) if base.exists() else self.model,
            facts=tuple(map(at, self.facts)),
            out=at(self.out),
            recipe=if_there(self.recipe),
            stats=if_there(self.stats),
            text=self.text and at(self.text),
            gate=if_there(self.gate),
            capability=self.capability and at(self.capability),
            exports=tuple(replace(e, out=at(e.out)) for e in self.exports),
            report=self.report and at(self.report),
        )

    def recipe_of_it(self) -> Recipe:
        """Its recipe; ConfigError for fields that can't be."""
        recipe = read_recipe(self.recipe, self.model)
        return recipe.with_fields(dict(self.set)) if self.set else recipe


@dataclass(frozen=True)
class Done:
    """What a job did."""

    result: Result | None
    """Of the edit; None where every fact was in the run already."""
    exports: tuple[Export, ...]
    report: Path | None
    """The page."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "edit": self.result.to_dict() if self.result else None,
            "exports": [export.to_dict() for export in self.exports],
            "report": str(self.report) if self.report else None,
        }


def load_job(file: str | Path) -> Job:
    """The job of a YAML file; ConfigError for what can't be."""
    path = Path(file)
    text = read_text(path, most=MAX_SETTINGS, error=ConfigError, what="job")
    try:
        job = read_settings(Job, parse_yaml(text, source=str(path), error=ConfigError))
    except ConfigError as error:
        raise ConfigError(one_line(f"{path}: {error}")) from error
    return job.within(path.parent)


def facts_of(job: Job) -> list[Any]:
    """All facts of its files; FactError or ConfigError for what can't be read."""
    return [fact for file in job.facts for fact in read_facts(file).facts]


def inputs_of(job: Job) -> tuple[list[Any], Recipe, Limits | None]:
    """Its facts, recipe and limits: all that needs no model is checked.

    NullEditError for what can't be: a file, a field, an export that is there, a tracker's package
    that is not.
    """
    facts, recipe = facts_of(job), job.recipe_of_it()
    limits = load_limits(job.gate) if job.gate else None
    if len(outs := [export.out for export in job.exports]) > len(set(outs)):
        raise ConfigError(f"exports: each needs a folder of its own, found {', '.join(outs)}")
    for export in job.exports:
        if Path(export.out).exists():
            raise ConfigError(f"exports: {export.out} is there already; remove it, or name another")
    if job.tracker:
        tracker_module(job.tracker)
    return facts, recipe, limits


def run_job(job: Job, *, talk: Talk | None = None) -> Done:
    """Edit, check, export, report. Refused, with nothing written, if a limit is broken.

    Everything that needs no model is checked first. A run that is there goes on, with its own
    recipe.
    """
    talk = talk or Talk()
    facts, recipe, limits = inputs_of(job)
    run = _run(job, recipe, talk)
    new = run.new(facts)
    result = None
    if new:
        with _tracked(job, run, len(new)) as tracker:
            result = run.edit(
                new,
                retry=job.retry,
                old_answers=job.old_answers,
                text=job.text,
                limits=limits,
                tasks=job.capability,
                tracker=tracker,
            )
    else:
        talk.say("Note: every fact is in the run already; nothing is edited")
        _check(job, run, limits)
    made = []
    for export in job.exports:
        talk.say(f"Exporting as {export.kind} to {export.out}")
        made.append(
            write_export(run.editor, export.out, export.kind, run=run.folder, **export.options)
        )
    page = Path(job.report) if job.report else None
    if page:
        write_report(collect([run.folder]), page, title=run.folder.name, force=True)
    return Done(result, tuple(made), page)


def _check(job: Job, run: Run, limits: Limits | None) -> None:
    """Refused if the run, as it is, breaks a limit."""
    if limits is not None:
        found = run.check(limits, text=job.text, tasks=job.capability)
        if not found.passed:
            raise Refused(found, run.folder)


def _tracked(job: Job, run: Run, facts: int) -> AbstractContextManager[Tracker | None]:
    """What the run's numbers go to, with what it was asked to do; nothing for no tracker."""
    if not job.tracker:
        return nullcontext()
    recipe, base = run.editor.recipe, run.editor.history.base
    settings = {
        "model": Path(base.model).name if Path(base.model).exists() else base.model,
        "method": recipe.method.name,
        "layers": ",".join(map(str, recipe.layers)),
        "batch_size": recipe.batch_size,
        "facts": facts,
        "seed": run.editor.seed,
    }
    return tracking(job.tracker, run.folder.name, settings)


def _run(job: Job, recipe: Recipe, talk: Talk) -> Run:
    """The run that is there, or a new one."""
    folder = Path(job.out)
    store = Store(folder / "ledger")
    if store.exists and store.events():  # else it was killed in its first batch, and begins again
        run = Run.open(folder, device=job.device, talk=talk)
        talk.say(f"Note: {folder} is there: it goes on with its own recipe")
        return run
    Run.check_fresh(folder)
    talk.say(f"Loading {job.model}")
    editor = Editor.from_pretrained(
        job.model,
        recipe=recipe,
        statistics=job.stats,
        device=job.device,
        dtype=job.dtype,
        seed=job.seed,
    )
    return Run.create(folder, editor, talk=talk)
