"""A job: what a pipeline does with a model, in one YAML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from nulledit.api.editor import Editor
from nulledit.api.run import Refused, Run
from nulledit.api.track import Tracker, TrackerName, tracker_module, tracking
from nulledit.config import Recipe, read_recipe
from nulledit.data.facts import Fact
from nulledit.data.readers import read_facts
from nulledit.editing.batching import admitted
from nulledit.editing.epochs import is_gated
from nulledit.errors import ConfigError, NullEditError
from nulledit.evaluation.retry import check_values
from nulledit.export.base_name import base_name
from nulledit.export.gguf_file import base_file
from nulledit.export.updates import Export, in_the_way, is_of, refuse_existing
from nulledit.export.write import EXPORTS, Kind, check_method, check_options, write_export
from nulledit.io.files import from_anywhere
from nulledit.io.settings import (
    Expected,
    Several,
    Whole,
    checked,
    read_settings,
)
from nulledit.io.untrusted import MAX_SETTINGS, one_line, parse_yaml, read_text
from nulledit.ledger.records import Base, History
from nulledit.ledger.store import Store
from nulledit.methods import change_recipe
from nulledit.runs.limits import Limits, load_limits
from nulledit.runs.pages import Result
from nulledit.runs.report import check_page, collect, write_report
from nulledit.runs.talk import Talk
from nulledit.statistics.found import check_there

FILES = ("gguf", "text")
"""Options of exports that name a file."""
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
            check_options(self.kind, self.options)
        except ConfigError as error:
            raise ConfigError(f"exports: {error}") from None

    def within(self, at: Callable[[str], str]) -> ExportJob:
        """With its paths as `at` gives them."""
        files = {name: at(str(self.options[name])) for name in FILES if self.options.get(name)}
        return replace(self, out=at(self.out), options={**self.options, **files})


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
            exports=tuple(export.within(at) for export in self.exports),
            report=self.report and at(self.report),
        )

    def recipe_of_it(self) -> Recipe:
        """Its recipe; ConfigError for fields that can't be."""
        recipe = read_recipe(self.recipe, self.model)
        return change_recipe(recipe, self.set) if self.set else recipe


@dataclass(frozen=True)
class Done:
    """What a job did."""

    result: Result | None
    """Of the edit; None where every fact was in the run already, and none was written again."""
    exports: tuple[Export, ...]
    """Those that were written; not those that lay there, of the run's very state."""
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
    found = parse_yaml(text, source=str(path), error=ConfigError)
    try:
        job = read_settings(Job, found)
    except ConfigError as error:
        raise ConfigError(one_line(f"{path}: {error}")) from error
    return job.within(path.parent)


@dataclass(frozen=True)
class Inputs:
    """What a job is made of, before a model is loaded."""

    facts: list[Fact]
    """All of its files', each once."""
    recipe: Recipe
    limits: Limits | None
    exports: list[ExportJob]
    """Those that are to be written: not those of the very state that the run has."""


def inputs_of(job: Job) -> Inputs:
    """What the job is made of: all that needs no model is checked.

    NullEditError for what can't be: a file, a field, an export of another state in the way, a
    tracker's package that is not there.
    """
    recipe = job.recipe_of_it()
    facts = list(dict.fromkeys(fact for file in job.facts for fact in read_facts(file).facts))
    if not facts:
        raise ConfigError("facts: there are none; a job needs files with at least one")
    limits = load_limits(job.gate) if job.gate else None
    for name, path in (("text", job.text), ("capability", job.capability)):
        if path and not Path(path).exists():
            raise ConfigError(f"{name}: {path} is not there")
    if job.stats:
        check_there(job.stats)
    if job.report:
        check_page(Path(job.report))
    if job.tracker:
        tracker_module(job.tracker)
    history = _history(job)
    if history is None:
        Run.check_fresh(job.out)
    else:
        _check_model(job, history.base)
    admitted(history, facts)
    exports = _exports(job, facts, history)
    _check_method(job, exports, history.epoch.recipe if history else recipe)
    return Inputs(facts, recipe, limits, exports)


def _history(job: Job) -> History | None:
    """Of the run that is there; None where it begins, or was killed in its first batch."""
    store = Store(Path(job.out) / "ledger")
    return store.read() if store.exists and store.events() else None


def _check_model(job: Job, base: Base) -> None:
    """ConfigError if the run that is there is of another model than the job's.

    A local base that is no longer where the run found it is known by its folder's name.
    """
    if not base.model or (named := from_anywhere(job.model)) == base.model:
        return  # of a model in memory nobody can say
    moved = Path(base.model).is_absolute() and not Path(base.model).exists()
    if not (moved and base_name(named) == base_name(base.model)):
        raise ConfigError(
            f"model: {job.model}, but the run in {job.out} is of {base.model}: name another folder "
            "for out, or the run's model"
        )


def _goes_on(job: Job, base: Base) -> str:
    """What a run that is there does not take from the job."""
    own = {"seed": (base.seed, job.seed), "dtype": (base.dtype, job.dtype or base.dtype)}
    others = [f"{name} {run} (the job's: {its})" for name, (run, its) in own.items() if run != its]
    *first, last = ["recipe", "statistics", *others]
    return f"Note: {job.out} is there: it goes on with its own {', '.join(first)} and {last}"


def _check_method(job: Job, exports: Sequence[ExportJob], recipe: Recipe) -> None:
    """ConfigError for what the method of `recipe` can't do; a model may decide which it is."""
    if recipe.method.otherwise:
        return
    if job.retry:
        check_values(recipe)
    for export in exports:
        try:
            check_method(export.kind, export.options, gated=is_gated(recipe))
        except ConfigError as error:
            raise ConfigError(f"exports: {error}") from None


def _exports(job: Job, facts: list[Fact], history: History | None) -> list[ExportJob]:
    """Exports that are to be written; ConfigError for one that can't be."""
    if len(outs := [export.out for export in job.exports]) > len(set(outs)):
        raise ConfigError(f"exports: each needs a folder of its own, found {', '.join(outs)}")
    for out in outs:
        if in_the_way(Path(out), Path(job.out)):
            raise ConfigError(f"exports: {out} is where the run lies; give another folder")
    done = history is not None and not history.lacks(facts)
    base = history.base.model if history else job.model
    found = []
    for export in job.exports:
        if done and history and is_of(Path(export.out), export.kind, history, export.options):
            continue
        try:
            refuse_existing(Path(export.out))
            if "gguf" in EXPORTS[export.kind].options:
                base_file(base, export.options.get("gguf"))
        except NullEditError as error:
            raise ConfigError(f"exports: {error}") from error
        if (text := export.options.get("text")) and not Path(text).is_file():
            raise ConfigError(f"exports: text: {text} is not there")
        found.append(export)
    return found


def run_job(job: Job, *, talk: Talk | None = None) -> Done:
    """Edit, check, export, report. Refused, with nothing written, if a limit is broken.

    Everything that needs no model is checked first. A run that is there goes on, with its own
    recipe, statistics, seed and dtype; an export of its very state is left as it is.
    """
    talk = talk or Talk()
    inputs = inputs_of(job)
    run = _run(job, inputs.recipe, talk)
    left = [export for export in job.exports if export not in inputs.exports]
    result = None
    if new := run.new(inputs.facts):
        with _tracked(job, run, len(new)) as tracker:
            result = run.edit(
                inputs.facts,
                retry=job.retry,
                old_answers=job.old_answers,
                text=job.text,
                limits=inputs.limits,
                tasks=job.capability,
                tracker=tracker,
            )
    elif job.retry and not left:  # an export is made after the retry
        talk.say("Note: every fact is in the run already; what does not hold is written again")
        result = _retried(job, run, inputs, talk)
    else:
        talk.say("Note: every fact is in the run already; nothing is edited")
        _check(job, run, inputs.limits)
    for export in left:
        talk.say(f"Note: {export.out} is there, of this very state; it is left as it is")
    made = []
    for export in inputs.exports:
        talk.say(f"Exporting as {export.kind} to {export.out}")
        made.append(
            write_export(run.editor, export.out, export.kind, run=run.folder, **export.options)
        )
    page = Path(job.report) if job.report else None
    if page:
        write_report(collect([run.folder]), page, title=run.folder.name)
    return Done(result, tuple(made), page)


def _retried(job: Job, run: Run, inputs: Inputs, talk: Talk) -> Result | None:
    """Write again what does not hold of the job's facts, as an interruption may have prevented."""
    found = run.retry(
        job.retry,
        facts=inputs.facts,
        text=job.text,
        limits=inputs.limits,
        tasks=job.capability,
    )
    if isinstance(found, str):
        talk.say(f"Note: {found}")
        return None
    return found


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
    if (history := _history(job)) is not None:
        run = Run.open(folder, device=job.device, talk=talk)
        talk.say(_goes_on(job, history.base))
        return run
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
