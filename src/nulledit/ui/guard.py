"""Who may ask: this machine alone, by a secret address; and what a browser may do with answers."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MOST_BYTES = 32 * 2**20
"""Of a form with its file."""
HEADERS = {
    # A table's numbers are set under each other by style attributes; no script is in a page.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; style-src-attr 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Lets requests through that have the token, and come under the name of this machine.

    The name in the Host header is checked since a page from elsewhere may have its own name point
    to 127.0.0.1 (DNS rebinding). The token is in the address of the first visit, then in a cookie
    that no other site's request brings along.
    """

    def __init__(self, app: App, *, port: int):
        """`port`: where the page is served."""
        self.app = app
        self.token = secrets.token_urlsafe(32)
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.cookie = f"nulledit_{port}"  # cookies know no ports

    @property
    def path(self) -> str:
        """Of the first visit."""
        return f"/?token={self.token}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        given = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        send = _with_headers(send)
        if given.get("host", "") not in self.hosts:
            return await _refuse(send, 421, "This page answers to 127.0.0.1 and localhost alone.")
        asked = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and asked and _same(asked, self.token):
            cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            return await _answer(send, 303, "", {"location": "/", "set-cookie": cookie})
        if not _same(_cookie(given.get("cookie", ""), self.cookie), self.token):
            said = "Open the whole address that `nulledit ui` printed: it has a token."
            return await _refuse(send, 403, said)
        if scope["method"] not in ("GET", "HEAD"):
            length = given.get("content-length", "")
            if not length.isdecimal():
                return await _refuse(send, 411, "A form must say how long it is.")
            if len(length) > 12 or int(length) > MOST_BYTES:
                said = f"More than {MOST_BYTES >> 20} MiB: write such a file by `nulledit edit`."
                return await _refuse(send, 413, said)
        return await self.app(scope, receive, send)


def _same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(), known.encode())


def _cookie(header: str, name: str) -> str:
    """By hand: other servers of this machine may have set what a strict parser stops at."""
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return next((value for key, _, value in pairs if key == name), "")


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", ()), *ours]}
        await send(message)

    return sent


async def _refuse(send: Send, status: int, said: str) -> None:
    await _answer(send, status, said, {})


async def _answer(send: Send, status: int, said: str, more: dict[str, str]) -> None:
    body = said.encode()
    headers = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body))} | more
    start = [(k.encode(), v.encode()) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})
