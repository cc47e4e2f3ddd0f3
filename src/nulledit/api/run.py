"""`Run`: an editor whose ledger, model and pages are kept in a folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from nulledit.api.editor import Editor
from nulledit.api.track import Told, Tracker, batches_told, numbers_of
from nulledit.data.facts import Fact
from nulledit.data.readers import Facts, as_facts
from nulledit.editing.merge import Decide
from nulledit.editing.reports import ChangeReport, EditReport
from nulledit.errors import CheckFailed, LedgerError
from nulledit.evaluation.asking import Answer
from nulledit.evaluation.forgetting import TOKENS, Recall, recall_of
from nulledit.evaluation.old_answers import with_base_answers
from nulledit.evaluation.retry import check_retry, check_values, joined, retry_failing
from nulledit.io.files import recover_folder
from nulledit.io.text import count
from nulledit.ledger.records import History
from nulledit.ledger.store import Store
from nulledit.models.load import check_comes_back
from nulledit.models.placement import Device
from nulledit.parallel.ranks import Ranks
from nulledit.runs.evaluated import Evaluated, evaluate_sides
from nulledit.runs.gate import check, check_tasks
from nulledit.runs.gate_report import GateReport
from nulledit.runs.limits import Limits
from nulledit.runs.measure import Text, check_lengths, read_text, text_name
from nulledit.runs.pages import (
    Result,
    check_fresh,
    check_pages,
    finish,
    is_current,
    timed,
    write_derived,
)
from nulledit.runs.preview import Preview, preview
from nulledit.runs.report import collect, write_report
from nulledit.runs.talk import Talk
from nulledit.runs.verify import Verification, verify

Report = TypeVar("Report")


class Refused(CheckFailed):
    """A limit said no; nothing was written."""

    def __init__(self, report: GateReport, folder: Path):
        """`report`: what was found on the run in `folder`."""
        broken = ", ".join(report.failed)
        super().__init__(
            f"{folder}: {broken} failed; no model was written and the ledger is as before"
        )
        self.report = report


class Run:
    """A run folder and its editor. The ledger commits first, batch by batch; pages follow."""

    def __init__(self, folder: str | Path, editor: Editor, talk: Talk | None = None):
        """Use `create` or `open`."""
        self.folder, self.editor, self.talk = Path(folder), editor, talk or Talk()
        self.seconds: dict[str, float] = {}
        """Wall time of the next result, by stage: what was spent on loading, for one."""
        self._held = len(editor.history.events)
        self._made_folder, self._attached = not self.folder.exists(), False

    @classmethod
    def create(cls, folder: str | Path, editor: Editor, *, talk: Talk | None = None) -> Self:
        """Begin a run of `editor` in `folder`; LedgerError if something is there.

        Nothing is written before the first edit. ModelError for a model that `open` could not load.
        """
        check_comes_back(editor.model)
        if editor.ranks.first:
            cls.check_fresh(folder)
        return cls(Path(folder), editor, talk)

    @staticmethod
    def check_fresh(folder: str | Path) -> None:
        """LedgerError unless a run may begin in `folder`."""
        check_fresh(Path(folder))

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        device: Device = None,
        device_map: str | Mapping[str, str | int] | None = None,
        trust_remote_code: bool = False,
        ranks: Ranks | None = None,
        talk: Talk | None = None,
        writing: bool = True,
    ) -> Self:
        """Take up the run in `folder`; LedgerError if there is none, or it has no batch.

        ReportError for pages that could not be gone on with. `writing=False`: only to look at its
        model, for which neither batches nor pages are needed.
        """
        folder, ranks, begun = Path(folder), ranks or Ranks(), time.perf_counter()
        talk = talk or Talk()
        if not (folder / "ledger" / "ledger.db").is_file():
            raise LedgerError(f"{folder}: no run here (expected {folder / 'ledger' / 'ledger.db'})")
        if ranks.first and writing:
            check_pages(folder)
            recover_folder(folder / "model")
        ranks.barrier()
        talk.say(f"Loading the model of {folder}")
        editor = Editor.load(
            folder,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            ranks=ranks,
        )
        if writing and not editor.history.events:
            raise LedgerError(
                f"{folder}: no batch was finished here; begin again with --out {folder}"
            )
        run = cls(folder, editor, talk)
        run.seconds["load"] = time.perf_counter() - begun
        return run

    def __repr__(self) -> str:
        return f"<Run {self.folder}: {count(len(self.editor.facts), 'fact')}>"

    @property
    def history(self) -> History:
        """Everything recorded so far."""
        return self.editor.history

    @property
    def begins(self) -> bool:
        """Whether nothing was edited before this object was made."""
        return self._held == 0

    @property
    def overtaken(self) -> bool:
        """Whether another process has changed the ledger: then open the run anew."""
        store = Store(self.folder / "ledger")
        return (store.events() if store.exists else 0) != len(self.history.events)

    @property
    def batches(self) -> int:
        """Changes committed since this object was made; with limits none is before the end."""
        there = Store(self.folder / "ledger").exists
        return len(self.history.events) - self._held if there else 0

    # -- edits -------------------------------------------------------------------------------

    def edit(
        self,
        facts: Facts,
        *,
        shuffle: bool = True,
        retry: int = 0,
        old_answers: bool = False,
        evaluate: bool = True,
        text: str | None = None,
        limits: Limits | None = None,
        tasks: str | Path | None = None,
        tracker: Tracker | None = None,
    ) -> Result | None:
        """Write `facts` that are not in the model yet, evaluate them, and write the folder.

        `retry`: write what does not hold again, so many times at most, each time stronger.
        `old_answers`: take what the base says as the old answer of facts that name none. `text`: a
        file for perplexity, KL and preservation, by default the one that comes with nulledit. With
        `limits` all is kept at the end, or, where one is broken, nothing (Refused); `tasks`: their
        folder. `tracker` receives numbers of each batch (`track.Batches`) and of the result
        (`track.numbers_of`). Whatever ends it early, finished batches stay, and one more call goes
        on. Of several ranks, rank 0 keeps the run; the others take part in its edits, and get None.
        """
        editor = self.editor
        asked = list(as_facts(facts).facts)
        check_tasks(limits, tasks)
        if retry:
            check_retry(editor.recipe, editor.ranks)
        new = self.new(asked)
        if known := len(asked) - len(new):
            self.talk.say(f"Note: {known} of {len(asked)} facts are in the model already")
        if evaluate:
            check_lengths(editor, new)
        if old_answers:
            self.talk.say("Asking the base for old answers")
            new = with_base_answers(editor, new)
            if evaluate:
                check_lengths(editor, new)
        if not editor.ranks.first:
            with editor.ranks.watched():
                editor.edit(new, shuffle=shuffle)
            return None
        found = read_text(editor, text) if evaluate else None
        keys = {fact.key for fact in asked}

        def work() -> EditReport:
            told = (tracker, found) if tracker else None
            return self._written(new, keys, shuffle=shuffle, retry=retry, told=told)

        with self._kept(), ExitStack() as stack:
            fresh = self.begins and not self.batches
            if fresh:
                Store(self.folder / "ledger").discard()  # of a run killed in its first batch
            if fresh and limits is None:
                self._attach()
            stack.enter_context(editor.writing())
            stack.enter_context(editor.ranks.watched())
            report = self._gated(work, limits, tasks, found, text)
            if fresh and limits is not None:
                self._attach()
            result = self._saved(report, found)
        if tracker:
            tracker(numbers_of(result), result.summary["batches"])
        return result

    def retry(
        self,
        times: int = 1,
        *,
        facts: Sequence[Fact] | None = None,
        text: str | None = None,
        limits: Limits | None = None,
        tasks: str | Path | None = None,
    ) -> Result | str:
        """Write what does not hold again, at most `times`, each time stronger.

        `facts`: those in the model that are asked, by their questions; left out, all. A text says
        why nothing was written. The other arguments are as for `edit`; Refused leaves
        run and ledger as they were.
        """
        check_tasks(limits, tasks)
        check_values(self.editor.recipe)
        found = read_text(self.editor, text)
        asked = self.editor.facts
        if facts is not None:
            asked = self._there({fact.key for fact in facts})

        def work() -> EditReport:
            report = self._again(asked, times)
            self.seconds.update(report.seconds)
            return report

        with self._kept(), self.editor.writing():
            report = self._gated(work, limits, tasks, found, text)
            if not report.columns and is_current(self.editor, self.folder):
                return self._nothing_written(asked, report)
            return self._saved(report, found)

    # -- other changes -----------------------------------------------------------------------

    def undo(self, *ids: str) -> ChangeReport:
        """`Editor.undo`, and the folder with it."""
        return self.change(lambda: self.editor.undo(*ids))

    def redo(self, *ids: str) -> ChangeReport:
        """`Editor.redo`, and the folder with it."""
        return self.change(lambda: self.editor.redo(*ids))

    def restore(self) -> ChangeReport:
        """`Editor.restore`, and the folder with it."""
        return self.change(self.editor.restore)

    def rebuild(self, *, values: bool = False) -> ChangeReport:
        """`Editor.rebuild`, and the folder with it."""
        with self.talk.progress() as tell:
            return self.change(lambda: self.editor.rebuild(values=values, progress=tell))

    def forget(self, facts: Facts) -> EditReport:
        """`Editor.forget`, and the folder with it."""
        with self.talk.progress() as tell:
            return self.change(lambda: self.editor.forget(facts, progress=tell))

    def merge(
        self, other: History, out: str | Path, *, decide: Decide | None = None
    ) -> ChangeReport:
        """Become a third run in `out`: this one's facts, then those of `other`, as `Editor.merge`.

        This one's folder stays as it is, and nothing is left in `out` of half a merge; after an
        error open the run again. LedgerError if something is in `out`.
        """
        self.check_fresh(out)
        self.editor.detach()
        with self.talk.progress() as tell:
            report = self.editor.merge(other, decide=decide, progress=tell)
        self.folder = Path(out)
        self.editor.attach(out)
        return self.change(lambda: report)

    def change(self, work: Callable[[], Report]) -> Report:
        """Do `work` on the editor as the only writer, then bring model and pages to the ledger."""
        with self.editor.writing():
            report = work()
            write_derived(self.editor, self.folder)
        return report

    # -- looking, which writes nothing into the ledger ---------------------------------------------

    def foresee(self, change: Callable[[Editor], Report]) -> Report:
        """What `change` of the editor would do, in memory alone: it is as before afterwards."""
        with self.editor.trial(writing=False):
            return change(self.editor)

    def ask(self, prompt: str, target: str | None = None, **asked: Any) -> Answer:
        """`Editor.ask`: what the base and the edited model say after `prompt`."""
        return self.editor.ask(prompt, target, **asked)

    def recall(
        self, facts: Sequence[Fact], *, tokens: int = TOKENS, before: Sequence[Recall] | None = None
    ) -> list[Recall]:
        """What the model says of answers to be forgotten (`evaluation.forgetting.recall_of`)."""
        with self.talk.progress("before: " if before is None else "after: ") as tell:
            return recall_of(
                self.editor.editable,
                facts,
                tokens=tokens,
                before=before,
                progress=tell and (lambda done, total: tell("texts", done, total)),
            )

    def evaluate(self, facts: Facts | None = None, **asked: Any) -> Evaluated:
        """`Editor.evaluate`, and whatever else is asked of both sides; nothing is written.

        `facts`: by default those in the model. `asked`: what else, as for `evaluate_sides`.
        """
        chosen = self.editor.facts if facts is None else list(as_facts(facts).facts)
        return evaluate_sides(self.editor, chosen, self.talk, **asked)

    def preview(
        self, facts: Facts = (), *, undo: Sequence[str] = (), text: str | None = None
    ) -> Preview:
        """What editing `facts` and undoing ids would change, in memory alone."""
        return preview(self.editor, facts, undo, text=text, talk=self.talk)

    def check(
        self, limits: Limits, *, text: str | None = None, tasks: str | Path | None = None
    ) -> GateReport:
        """`Editor.check`: the edited model against `limits`; only what they ask is measured."""
        if limits.needs("text"):
            self.talk.say(f"Perplexity and KL on {text_name(text)}")
        with self.talk.progress() as tell:
            return self.editor.check(limits, text=text, tasks=tasks, progress=tell)

    def verify(self) -> Verification:
        """Check every file of the folder, and the weights, computed again (`runs.verify`)."""
        return verify(self.folder)

    def report(self, out: str | Path | None = None, *, title: str = "Report") -> Path:
        """Write one HTML page of the run, by default `report.html` in its folder; its place."""
        file = Path(out) if out else self.folder / "report.html"
        write_report(collect([self.folder]), file, title=title)
        return file

    # -- inside ------------------------------------------------------------------------------

    def new(self, facts: Sequence[Fact]) -> list[Fact]:
        """Those of `facts` that are not in the model yet."""
        return self.editor.history.lacks(facts)

    def _written(
        self,
        facts: Sequence[Fact],
        keys: set[tuple[str, str]],
        *,
        shuffle: bool,
        retry: int,
        told: Told | None,
    ) -> EditReport:
        """Write `facts`, then again what does not hold of those with one of `keys`."""
        editor = self.editor
        if facts:
            size = count(-(-len(facts) // editor.recipe.batch_size), "batch")
            self.talk.say(f"Editing {count(len(facts), 'fact')} in {size}")
        with self.talk.progress() as tell:
            with batches_told(editor, told, tell) as progress:
                report = editor.edit(facts, shuffle=shuffle, progress=progress)
        if retry:
            again = self._again(self._there(keys), retry)  # some since before an interruption
            report = joined(report, again)
        self.seconds |= report.seconds
        return report

    def _there(self, keys: set[tuple[str, str]]) -> list[Fact]:
        """The facts in the model that answer one of `keys`."""
        return [fact for fact in self.editor.facts if fact.key in keys]

    def _again(self, facts: Sequence[Fact], times: int) -> EditReport:
        with self.talk.progress() as tell:
            report = retry_failing(self.editor, facts, times, progress=tell)
        for notice in report.notices:
            self.talk.say(f"Note: {notice}")
        return report

    def _gated(
        self,
        work: Callable[[], EditReport],
        limits: Limits | None,
        tasks: str | Path | None,
        found: Text | None,
        text: str | None,
    ) -> EditReport:
        """Do the `work`; with limits in memory first, and kept if they hold, else Refused."""
        if limits is None:
            return work()
        windows = None
        if limits.needs("text"):
            windows = (found or read_text(self.editor, text)).windows
        with self.editor.trial() as trial:
            report = work()
            self.talk.say(f"Checking the edited model against {limits.source}")
            with timed(self.seconds, "gate"), self.talk.progress("gate: ") as tell:
                judged = check(self.editor, limits, windows=windows, tasks=tasks, progress=tell)
            if not judged.passed:
                raise Refused(judged, self.folder)
            trial.keep()
        return report

    def _saved(self, report: EditReport, text: Text | None) -> Result:
        """Bring the run's model and its pages to the ledger."""
        self.talk.written(report)
        with timed(self.seconds, "save"):
            self.editor.keep_model(self.folder)
        result = finish(self.editor, self.folder, report, text, self.seconds, self.talk)
        self.seconds = {}
        return result

    def _nothing_written(self, asked: Sequence[Fact], report: EditReport) -> str:
        """Why a retry of the facts `asked` left the run as it was."""
        if all(fact.forget for fact in asked):
            return "no fact in the model has an answer to write: nothing was written"
        if report.notices:
            return "no retry made more facts hold: the run is as it was"
        return "every fact holds: nothing was written"

    def _attach(self) -> None:
        """Begin the run's ledger; removed again if no batch comes into it."""
        self._attached = True
        self.editor.attach(self.folder)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Where what is inside fails before a batch is kept, nothing is left of the folder.

        Nor does the next result count what that took.
        """
        before = dict(self.seconds)
        try:
            yield
        except BaseException:
            self.seconds = before
            if self._attached and not self.batches:
                with suppress(LedgerError):  # another one is making something there
                    Store(self.folder / "ledger").discard()
                if self._made_folder and self.folder.is_dir() and not any(self.folder.iterdir()):
                    self.folder.rmdir()
            raise
