"""The pages and what is posted to them, as one Starlette application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from nulledit.errors import ConfigError, FactError
from nulledit.evaluation.asking import MOST_TOKENS
from nulledit.export.write import EXPORTS, export_command
from nulledit.report.html import asset
from nulledit.runs.document import run_document
from nulledit.runs.holding import MARKS
from nulledit.ui import deeds, posted
from nulledit.ui.forms import (
    FIELDS,
    Checked,
    filled,
    in_its_place,
    read_fact,
    read_upload,
    taken,
)
from nulledit.ui.guard import Guard
from nulledit.ui.settings import (
    RECIPE,
    TICKS,
    LimitField,
    limit_fields,
    limits_given,
    methods,
    read_limits_of,
    read_settings_of,
)
from nulledit.ui.shell import Drawn, Shell
from nulledit.ui.view import PAGE, SHOWS, SORTS, FactRow, View, chosen, curves
from nulledit.ui.work import Job, Worker

BOTH = "the fields hold a fact, too: give one fact there, or a file"
TICK = 0.1  # seconds between looks at a job whose stream is open
HISTORY = 20  # prompts that are shown again


class Site:
    """One run's pages."""

    def __init__(self, worker: Worker, *, name: str, port: int):
        """`name`: of the run or the model, as it is shown; `port`: where it is served."""
        self.worker, self.view = worker, View(worker.folder)
        self.shell = Shell(worker, name=name)
        self._asked: dict[int, dict[str, Any]] = {}
        got = {
            "/": self.facts,
            "/fact": self.fact,
            "/try": self.trying,
            "/edit": self.editing,
            "/retry": self.retrying,
            "/timeline": self.timeline,
            "/numbers": self.numbers,
            "/jobs": self.activity,
            "/jobs/{number:int}": self.job,
            "/jobs/{number:int}/state": self.state,
            "/style.css": _style,
            "/ui.js": _script,
        }
        posted = {
            "/ask": self.ask,
            "/edit/check": self.edit,
            "/edit/again": self.again,
            "/foresee": self.foresee,
            "/change": self.change,
            "/retry": self.retry,
            "/measure": self.measure,
            "/diff": self.diff,
            "/jobs/{number:int}/stop": self.stop,
        }
        routes = [Route(path, self.shell.get(h)) for path, h in got.items()]
        routes += [Route(path, self.shell.post(h), methods=["POST"]) for path, h in posted.items()]
        routes.append(Route("/jobs/{number:int}/stream", self.stream))
        missing = {HTTPException: self.shell.missing}
        inner = Starlette(routes=routes, lifespan=self._life, exception_handlers=missing)
        self.app = Guard(inner, port=port)

    # -- pages -----------------------------------------------------------------------------------

    def facts(self, request: Request) -> Response:
        """All facts: search, sort, filter."""
        asked = request.query_params
        show = asked.get("show") if asked.get("show") in SHOWS else SHOWS[0]
        sort = asked.get("sort") if asked.get("sort") in SORTS else SORTS[0]
        rows = self._rows()
        words, down = asked.get("q", ""), asked.get("down") == "1"
        found = chosen(rows, q=words, show=show or "", sort=sort or "", down=down)
        last = -(-len(found) // PAGE) or 1
        page = min(max(posted.whole(asked.get("page"), 1), 1), last)
        active = [row for row in rows if row.active]
        told = [row for row in active if row.mark != "not evaluated"]
        return self.shell.page(
            request,
            "facts",
            "Facts",
            rows=found[(page - 1) * PAGE : page * PAGE],
            found=len(found),
            active=len(active),
            told=len(told),
            good=sum(row.holds for row in told),
            marks=MARKS,
            asked={"q": words, "show": show, "sort": sort, "down": down, "page": page},
            pages=-(-len(found) // PAGE),
            shows=SHOWS,
            sorts=SORTS,
        )

    def fact(self, request: Request) -> Response:
        """The story of one fact."""
        id_ = request.query_params.get("id", "")
        story = self.view.story(id_)
        row = next((row for row in self._rows() if row.id == id_), None)
        return self.shell.page(request, "fact", id_, story=story, row=row)

    def trying(self, request: Request) -> Response:
        """A prompt box, and what both models said."""
        asked = request.query_params
        shown = self._known(asked["job"]) if "job" in asked else None
        jobs = [job for job in list(self.worker.jobs.values()) if job.kind == "ask"]
        if shown is not None and shown.kind != "ask":
            shown = None
        given = shown.asked if shown else (asked.get("prompt", ""), asked.get("target", ""))
        return self.shell.page(
            request,
            "try",
            "Try",
            job=shown,
            prompt=given[0],
            target=given[1],
            history=[job for job in reversed(jobs) if job is not shown][:HISTORY],
            tokens=MOST_TOKENS,
            wait=shown is not None and not shown.over,
        )

    def editing(self, request: Request) -> Response:
        """A form for one fact or a file; filled in where a known fact is to be replaced."""
        asked = request.query_params
        id_, how = asked.get("id"), asked.get("how", "")
        given = {"prompt": asked.get("prompt", "")}
        if id_ is not None:
            history = self.view.history()
            known = [c.fact for c in history.columns if c.fact.id == id_] if history else []
            if not known:
                raise FactError(f"no fact {id_!r} in the ledger")
            given = filled(known[-1]) | ({"forget": "1"} if how == "forget" else {})
            if how == "replace":
                given |= {"old_answer": given["target"], "target": ""}
        return self._form(request, given, how=how)

    def retrying(self, request: Request) -> Response:
        """How often what does not hold is written again, and inside which limits."""
        return self._retry_form(request, request.query_params)

    def timeline(self, request: Request) -> Response:
        """Every event; undo and redo; two points compared."""
        events = self.view.events()
        key = ("curves", *(event["event"] for event in events if event["kl"]))
        parts = self.shell.draw(key, lambda: curves(events))
        return self.shell.page(
            request, "timeline", "Timeline", events=events[::-1], parts=parts, last=len(events)
        )

    def numbers(self, request: Request) -> Response:
        """The run's report, limits, and the commands that hand it over."""
        pages = self.view.pages()
        parts: Drawn = []
        if pages:
            key = ("numbers", (self.view.folder / "summary.json").stat().st_mtime_ns)
            parts = self.shell.draw(key, lambda: run_document(pages).parts)
        folder = self.view.folder
        exports = {kind: export_command(folder, kind, f"{folder}-{kind}") for kind in EXPORTS}
        return self.shell.page(request, "numbers", "Numbers", parts=parts, exports=exports)

    def activity(self, request: Request) -> Response:
        """All jobs."""
        jobs = list(self.worker.jobs.values())[::-1]
        return self.shell.page(
            request, "jobs", "Activity", jobs=jobs, wait=any(not j.over for j in jobs)
        )

    def job(self, request: Request) -> Response:
        """One job: its progress, then what it found."""
        job = self._known(request.path_params["number"])
        if job.kind == "ask":
            return _to(f"/try?job={job.number}")
        parts: Drawn = []
        if job.over:
            parts = self.shell.draw(("job", job.number), lambda: job.outcome.parts)
        return self.shell.page(request, "job", job.title, job=job, parts=parts, wait=not job.over)

    def state(self, request: Request) -> Response:
        """How far one job is."""
        return JSONResponse(self._known(request.path_params["number"]).to_dict())

    # -- what is posted --------------------------------------------------------------------------

    def ask(self, request: Request, given: FormData) -> Response:
        """A prompt."""
        prompt, target = posted.text(given, "prompt"), posted.text(given, "target").strip()
        if not prompt.strip():
            raise ConfigError("the prompt is empty: write what the models are to go on from")
        work = partial(deeds.ask, prompt, target)
        job = self.worker.submit("Ask", work, kind="ask", asked=(prompt, target))
        return _to(f"/try?job={job.number}")

    def edit(self, request: Request, given: FormData) -> Response:
        """Facts of a form or a file: checked, then looked at, previewed or written."""
        upload, history = given.get("file"), self.view.history()
        texts = {name: posted.text(given, name) for name in (*FIELDS, "forget")}
        if isinstance(upload, UploadFile) and upload.filename:
            checked, at = read_upload(upload.filename, upload.file.read()), "file"
            if any(text.strip() for text in texts.values()):
                checked = Checked(errors={"file": (BOTH,)})
        else:
            checked, at = in_its_place(read_fact(texts), history), "id"
        settings = read_settings_of(posted.texts(given), self.view.recipe())
        errors = {**(checked.errors or {}), **taken(checked, history, at), **settings.errors}
        if errors:
            return self._form(request, given, errors)
        return self._do(posted.text(given, "do"), posted.edit_of(checked, settings, given))

    def again(self, request: Request, given: FormData) -> Response:
        """The facts of an earlier job, previewed or written."""
        job = self._known(posted.text(given, "job"))
        if not isinstance(job.asked, deeds.Edit):
            raise ConfigError("that was no edit: begin on the page Edit")
        return self._do(posted.text(given, "do"), job.asked)

    def foresee(self, request: Request, given: FormData) -> Response:
        """What a change would move."""
        kind, ids = posted.change(given)
        work = partial(deeds.foresee, kind, ids)
        return self._begun(f"What {posted.named(kind, ids, noun=True)} would move", work)

    def change(self, request: Request, given: FormData) -> Response:
        """A change of what is in the model."""
        kind, ids = posted.change(given)
        return self._begun(posted.named(kind, ids), partial(deeds.change, kind, ids))

    def retry(self, request: Request, given: FormData) -> Response:
        """What does not hold, written again."""
        limits, errors = read_limits_of(posted.texts(given))
        if errors:
            return self._retry_form(request, given, errors)
        work = partial(deeds.retry, posted.times(given, least=1), limits)
        return self._begun("Retry what does not hold", work)

    def measure(self, request: Request, given: FormData) -> Response:
        """Limits, or all facts asked again."""
        if posted.text(given, "what") == "gates":
            return self._begun("Check the default limits", deeds.gates)
        job = self.worker.submit("Evaluate all facts", deeds.evaluate, kind="evaluate")
        return _to(f"/jobs/{job.number}")

    def diff(self, request: Request, given: FormData) -> Response:
        """Two points of the ledger."""
        first, second = (posted.whole(posted.text(given, name), -1) for name in ("first", "second"))
        if min(first, second) < 0:
            raise ConfigError("choose two events to compare; 0 is the base")
        title = f"Event {first} and event {second}"
        return self._begun(title, partial(deeds.diff, first, second))

    def stop(self, request: Request, given: FormData) -> Response:
        """Ask a job to end."""
        job = self._known(request.path_params["number"])
        job.stopping = True
        return _to(f"/jobs/{job.number}")

    async def stream(self, request: Request) -> Response:
        """How far a job is, sent as it changes."""
        job = self.worker.jobs.get(request.path_params["number"])
        if job is None:
            raise HTTPException(404)

        async def events() -> AsyncIterator[str]:
            sent = -1
            while True:
                over, changed = job.over, job.changed
                if changed != sent:
                    sent = changed
                    yield f"data: {json.dumps(job.to_dict())}\n\n"
                if over:
                    return
                await asyncio.sleep(TICK)

        return StreamingResponse(events(), media_type="text/event-stream")

    # -- inside ----------------------------------------------------------------------------------

    def _do(self, way: str, edit: deeds.Edit) -> Response:
        works = {"check": deeds.look, "preview": deeds.preview, "write": deeds.write}
        if way not in works:
            raise ConfigError(f"unknown way {way!r}: expected check, preview or write")
        title = f"{way.capitalize()} {edit.title}"
        return self._begun(title, partial(works[way], edit), asked=edit)

    def _rows(self) -> list[FactRow]:
        """The facts, each as it was when it was last asked: by its edit, or with all others."""
        for job in list(self.worker.jobs.values()):
            if job.kind == "evaluate" and job.over:
                self._asked |= job.outcome.data or {}
        return self.view.facts(self._asked)

    def _begun(self, title: str, work: Any, asked: Any = None) -> Response:
        return _to(f"/jobs/{self.worker.submit(title, work, asked=asked).number}")

    def _known(self, number: Any) -> Job:
        job = self.worker.jobs.get(posted.whole(str(number), 0))
        if job is None:
            raise ConfigError(f"no job {str(number)[:20]} here: the page was started anew since")
        return job

    def _form(
        self,
        request: Request,
        given: Any,
        errors: Mapping[str, Sequence[str]] | None = None,
        how: str = "",
    ) -> Response:
        names = (*FIELDS, "forget", *RECIPE, *TICKS, "retry")
        return self.shell.page(
            request,
            "edit",
            "Edit",
            status=422 if errors else 200,
            given={name: posted.text(given, name) for name in names},
            errors=errors or {},
            how=how,
            retries=posted.MOST_RETRIES,
            limits=_limits_in(given),
            methods=methods(),
            recipe=self.view.recipe(),
        )

    def _retry_form(
        self, request: Request, given: Any, errors: Mapping[str, Sequence[str]] | None = None
    ) -> Response:
        return self.shell.page(
            request,
            "retry",
            "Retry",
            status=422 if errors else 200,
            given={name: posted.text(given, name) for name in ("retry", "gate")},
            errors=errors or {},
            retries=posted.MOST_RETRIES,
            limits=_limits_in(given),
        )

    @asynccontextmanager
    async def _life(self, _app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await run_in_threadpool(self.worker.stop)


def _limits_in(given: Mapping[str, Any]) -> list[tuple[LimitField, str]]:
    """All limits, with what a form says of each, or the default where it says nothing."""
    return [
        (one, posted.text(given, one.field) if limits_given(given) else one.value)
        for one in limit_fields()
    ]


def _style(_request: Request) -> Response:
    return Response(asset("report/page.css") + asset("ui/ui.css"), media_type="text/css")


def _script(_request: Request) -> Response:
    return Response(asset("ui/ui.js"), media_type="text/javascript")


def _to(path: str) -> Response:
    return RedirectResponse(path, 303)
