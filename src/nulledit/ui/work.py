"""One thread owns the run and does jobs one after the other; pages only look on."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nulledit.api.run import Refused, Run
from nulledit.editing.call_log import Progress
from nulledit.editing.reports import EditReport
from nulledit.errors import NullEditError
from nulledit.io.text import count
from nulledit.report.document import Part
from nulledit.runs.gate_report import gate_table
from nulledit.runs.talk import Talk, in_facts

logger = logging.getLogger(__name__)

KEPT = 200  # jobs that pages can still look at
MOST_LINES = 200  # that one job keeps of what it said
WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"


class Stopped(NullEditError):
    """The user asked a job to end."""


@dataclass(frozen=True)
class Follow:
    """A button below a result: what can be done next."""

    label: str
    action: str
    """Path that the form is posted to."""
    fields: tuple[tuple[str, str], ...] = ()
    """Names and values that go with it."""


@dataclass(frozen=True)
class Outcome:
    """What a job found."""

    parts: Sequence[Part | str] = ()
    """As of a document; a text is a paragraph."""
    follow: tuple[Follow, ...] = ()
    data: Any = None
    """For a page that shows it in its own way."""


Work = Callable[[Run, "Job"], Outcome]


@dataclass(eq=False)
class Job(Talk):
    """One thing that was asked for, and how far it is. Written by the worker, read by pages."""

    number: int
    title: str
    work: Work
    kind: str = ""
    """`ask` for those that the page of prompts shows."""
    asked: Any = None
    """What it was asked, to be shown or done again."""
    state: str = WAITING
    lines: list[str] = field(default_factory=list)
    """What was said on the way."""
    stages: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Done and in all (0: nobody knows), by stage."""
    heard: dict[str, str] = field(default_factory=dict)
    """Answers so far, by side."""
    upon: Callable[[EditReport], None] | None = None
    """Told of facts that are in the model, before they are evaluated."""
    error: str = ""
    outcome: Outcome = Outcome()
    stopping: bool = False
    unsettles: bool = False
    """Whether the run in memory is another than the ledger's if the job does not end well."""
    changed: int = 0
    """Counts changes, so that a stream knows when to send."""

    @property
    def over(self) -> bool:
        """Whether nothing more will change."""
        return self.state in (DONE, FAILED, STOPPED)

    def say(self, message: str) -> None:
        """A line about what goes on."""
        if len(self.lines) < MOST_LINES:
            self.lines.append(message)
        self.changed += 1

    @contextmanager
    def progress(self, prefix: str = "") -> Iterator[Progress | None]:
        """Each stage with what is done; Stopped is raised from it where the user wants an end."""

        def tell(stage: str, done: int, total: int) -> None:
            self.check()
            self.stages[stage] = (done, total)
            self.changed += 1

        yield in_facts(tell, prefix)

    def written(self, report: EditReport) -> None:
        """Pass on that facts are in the model."""
        if self.upon is not None:
            self.upon(report)

    def hear(self, side: str, text: str) -> None:
        """An answer so far."""
        self.check()
        self.heard[side] = text
        self.changed += 1

    def check(self) -> None:
        """Raise Stopped if the user wants an end."""
        if self.stopping:
            raise Stopped("stopped")

    def to_dict(self) -> dict[str, Any]:
        """How far it is, for the stream of a page."""
        return {
            "state": self.state,
            "over": self.over,
            "stages": [[name, *done] for name, done in list(self.stages.items())],
            "lines": list(self.lines),
            "heard": dict(self.heard),
        }


class Worker:
    """The thread that owns the run. `submit` is for any thread."""

    def __init__(self, folder: Path, opened: Callable[[Talk], Run]):
        """`opened`: loads the run of `folder`; called in the worker's thread."""
        self.folder = folder
        self.jobs: dict[int, Job] = {}
        self.fault = ""
        """Why the model could not be loaded, until it can be."""
        self._opened, self._run = opened, None  # type: Callable[[Talk], Run], Run | None
        self._queue: queue.Queue[Job | None] = queue.Queue()
        self._lock, self._next, self._ending = threading.Lock(), 1, False
        self._thread = threading.Thread(target=self._loop, name="nulledit-ui", daemon=True)

    def start(self) -> None:
        """Begin, by loading the model."""
        self._thread.start()
        self.submit("Load the model", lambda run, job: Outcome(["The model is loaded."]))

    def stop(self, seconds: float = 20.0) -> None:
        """End: a job at work stops at its next step; finished batches are kept."""
        self._ending = True
        for job in list(self.jobs.values()):
            job.stopping = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds)

    def submit(self, title: str, work: Work, *, kind: str = "", asked: Any = None) -> Job:
        """Put a job at the end of the queue."""
        with self._lock:
            job = Job(self._next, title, work, kind, asked)
            self._next += 1
            self.jobs[job.number] = job
            over = [n for n, held in self.jobs.items() if held.over]
            for number in over[: max(0, len(self.jobs) - KEPT)]:
                del self.jobs[number]
        self._queue.put(job)
        return job

    def waiting(self) -> list[Job]:
        """Those that are not over, the one at work first."""
        return [job for job in list(self.jobs.values()) if not job.over]

    # -- in the worker's thread ----------------------------------------------------------------

    def _loop(self) -> None:
        while (job := self._queue.get()) is not None and not self._ending:
            self._do(job)

    def _do(self, job: Job) -> None:
        if job.stopping:
            job.state, job.error = STOPPED, "stopped before it began"
            job.changed += 1
            return
        job.state = RUNNING
        job.changed += 1
        run, before = None, 0
        try:
            run = self._current(job)
            run.talk, before = job, len(run.history.events)
            job.outcome = job.work(run, job)
            state = DONE
        except Stopped:
            state = STOPPED
            job.error = "stopped" if self._run else "stopped while the model was loaded"
        except NullEditError as error:
            state, job.error = FAILED, str(error)
            if isinstance(error, Refused):
                job.outcome = Outcome([gate_table(error.report)])
        except Exception as error:  # the page must say so, and go on
            logger.exception("job %s failed", job.number)
            state, job.error = FAILED, f"unexpected {type(error).__name__}: {error}"
            self._run = None  # whatever it left in memory is not to be trusted
        if state != DONE:
            job.error += self._kept_of(run, before, said=state == STOPPED)
        if job.unsettles and state != DONE:
            self._run = None
        job.state = state
        job.changed += 1

    def _current(self, job: Job) -> Run:
        """The run as its ledger is now: another process may have changed it."""
        run = self._run
        if run is not None and run.overtaken:
            job.say("Another process has changed the ledger: it is loaded again")
            self._run = run = None
        if run is None:
            try:
                self._run = run = self._opened(job)
            except Stopped:
                raise
            except Exception as error:
                self.fault = str(error)
                raise
        self.fault = ""
        return run

    def _kept_of(self, run: Run | None, before: int, *, said: bool) -> str:
        """What is kept of a job that did not end, with the folder brought to it, in words.

        `said`: also where that is nothing.
        """
        if run is None:
            return ""
        kept = len(run.history.events) - before
        if kept <= 0:
            return "; nothing was changed" if said else ""
        told = f"; {count(kept, 'finished batch')} {'is' if kept == 1 else 'are'} kept"
        if self._run is None:
            return told
        try:
            run.change(lambda: None)
        except Exception as error:  # the ledger has it all the same
            logger.exception("the run's files were not brought to its ledger")
            self._run = None
            return f"{told}, but the run's files do not follow yet ({error})"
        return told
