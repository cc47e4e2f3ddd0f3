"""What all pages of a run have in common: their frame, their figures, and errors in words."""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from markupsafe import escape
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from nulledit.errors import NullEditError
from nulledit.report.document import Document, Part, Text
from nulledit.report.html import seen, templates
from nulledit.ui import posted
from nulledit.ui.work import Worker

logger = logging.getLogger(__name__)

PAGES = {
    "/": "Facts",
    "/try": "Try",
    "/edit": "Edit",
    "/timeline": "Timeline",
    "/numbers": "Numbers",
    "/jobs": "Activity",
}
"""Of the menu."""
MOST_FIELDS = 20_000  # ticked facts, for one
MOST_DRAWN = 50
"""Pages whose figures are kept."""
SAID = {404: "There is no such page.", 405: "That page takes no form."}

Drawn = list[tuple[str, Any]]
"""Parts of a page as the templates take them."""


class Shell:
    """Draws pages in their frame, and answers requests by a site's handlers."""

    def __init__(self, worker: Worker, *, name: str):
        """`worker`: whose tasks every page shows; `name`: of the run or the model, as shown."""
        self.worker, self.name = worker, name
        self._csrf = secrets.token_urlsafe(32)
        self._templates, self._drawing = templates(), threading.Lock()
        self._templates.filters["exact"] = escape  # what comes back by a form stays as it is
        self._drawn: dict[Any, Drawn] = {}

    def page(
        self, request: Request, template: str, title: str, *, status: int = 200, **more: Any
    ) -> Response:
        """A page of one template, filled with `more`; `status` as HTTP numbers them."""
        waiting = self.worker.waiting()
        page = self._templates.get_template(f"ui/{template}.html").render(
            title=title,
            name=self.name,
            csrf=self._csrf,
            menu=PAGES,
            here=request.url.path,
            fault=self.worker.fault,
            now=waiting[0] if waiting else None,
            queued=max(0, len(waiting) - 1),
            **{"wait": False} | more,
        )
        return HTMLResponse(page, status)

    def draw(self, key: Any, parts: Callable[[], Sequence[Part | str]]) -> Drawn:
        """Parts for the templates, kept by `key`: figures take a second, and one at a time."""
        with self._drawing:
            if key not in self._drawn:
                whole = Document("", tuple(Text(p) if isinstance(p, str) else p for p in parts()))
                self._drawn[key] = [seen(part) for part in whole.parts]
                for old in list(self._drawn)[:-MOST_DRAWN]:
                    del self._drawn[old]
            return self._drawn[key]

    def get(self, handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
        """An endpoint that shows what `handler` answers."""

        def answer(request: Request) -> Response:
            return self._safe(request, lambda: handler(request))

        return answer

    def post(self, handler: Callable[[Request, FormData], Response]) -> Any:
        """An endpoint that gives `handler` what was posted, if a page of ours posted it."""

        async def answer(request: Request) -> Response:
            given = await request.form(max_files=1, max_fields=MOST_FIELDS)
            if not hmac.compare_digest(posted.text(given, "csrf").encode(), self._csrf.encode()):
                return self._error(request, 403, "This form is not of this page: load it again.")
            work = partial(self._safe, request, lambda: handler(request, given))
            return await run_in_threadpool(work)

        return answer

    async def missing(self, request: Request, error: Exception) -> Response:
        """An error page for an address or a form that can't be read."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        return self._error(request, status, SAID.get(status, "The form could not be read."))

    def _safe(self, request: Request, work: Callable[[], Response]) -> Response:
        """No error but in words."""
        try:
            return work()
        except NullEditError as error:
            return self._error(request, 409, str(error))
        except Exception as error:
            logger.exception("%s", request.url.path)
            return self._error(request, 500, f"unexpected {type(error).__name__}: {error}")

    def _error(self, request: Request, status: int, said: str) -> Response:
        return self.page(request, "error", "Error", status=status, said=said)
