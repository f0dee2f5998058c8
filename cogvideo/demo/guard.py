"""Stands between visitors and gradio's server: identifies visitors, limits what they may send, and logs requests.

It also answers `/health`, even before the page is ready, and strips a proxy's path from addresses.
"""

import asyncio
import ipaddress
import json
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogvideo.demo.places import Places
from cogvideo.demo.storage import remove_oldest
from cogvideo.sampling.outputs import LARGE

MAX_UPLOAD = 64 << 20
"""Maximum bytes of an uploaded file; a request with uploads may have MAX_BODY more."""
MAX_BODY = 1 << 20
"""Maximum bytes of the body of any other request."""
BODY_SECONDS = 60.0
"""How long such a body may take to arrive."""
MAX_REQUESTS = 256
"""Concurrent requests per visitor; an open tab holds two."""
UPLOAD_SECONDS = 3600
"""How long uploads are kept."""
VISITOR_UPLOADS = 512 << 20
"""Bytes that a visitor may upload in that time."""
MIN_UPLOAD = 1 << 20
"""Bytes that a smaller upload counts as, so that the number of uploads is limited too."""
ALL_UPLOADS = 4 << 30
"""Maximum bytes of all uploads; beyond it, the oldest are removed."""
API = "/gradio_api"
WITH_BODY = re.compile(rf"{API}/(upload|cancel|reset|queue/join|(call|run|api)/[\w/]+)/?")
"""Addresses that take requests with a body."""
FILE = re.compile(r"/file[=/]")
"""What precedes the path in a request for a file."""
READING = re.compile(rf"{API}/(?:queue/data|call/(?:v2/)?\w+/(?P<event>\w+))/?")
"""Addresses at which clients read the answers to requests."""
STATIC = re.compile(r"/(health|assets|static|svelte|theme\.css|favicon\.ico|manifest\.json)")
"""Parts of the page itself and health checks, which are not logged."""
REFUSALS = {
    400: "the request is not JSON",
    403: "this file or address is not allowed",
    404: "no such address",
    408: "the request took too long to arrive",
    411: "the length of the upload is missing",
    413: "the request is too large",
    429: "too many requests or uploads from your address; wait a moment",
    503: "not ready; try again in a minute",
}
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'"
)


class _Refusal(Exception):
    """Ends the request with this status."""

    def __init__(self, status: int) -> None:
        self.status = status


@dataclass
class Guard:
    """The ASGI application that visitors reach."""

    places: Places
    uploads: Path
    """The folder of uploads, which was empty when the server started."""
    policy: str | None = POLICY
    """The content security policy."""
    path: str = ""
    """The page's path at a proxy, for example `/video`; addresses with and without it are accepted."""
    proxies: int = 0
    """How many proxies are trusted to report the visitor's address."""
    log: Callable[[str], None] | None = None
    """Called with one line per request."""
    app: ASGIApp | None = None
    """gradio's application; None while models are loading."""
    results: Path | None = None
    """The folder of results; it may itself be in a hidden folder."""
    session_of: Callable[[str], str] = str
    """Maps a request's id to its session."""
    stopping: bool = False
    _open: Counter[str] = field(default_factory=Counter)
    """Number of requests of each visitor that are being answered."""
    _uploading: int = 0
    """Number of uploads in progress."""
    _uploaded: deque[tuple[float, str, int]] = field(default_factory=deque)
    """Times, visitors and bytes of recent uploads, oldest first."""
    _uploaded_bytes: Counter[str] = field(default_factory=Counter)
    """Sum of these bytes for each visitor."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        start, status, sent = time.monotonic(), 0, 0
        visitor, path = visitor_of(scope, self.proxies), scope["path"]
        if self.path and (path + "/").startswith(self.path + "/"):
            path = path[len(self.path) :] or "/"

        async def guarded(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.policy is not None:
                    headers = [*message.get("headers", []), (b"content-security-policy", self.policy.encode())]
                    message = {**message, "headers": headers}
            sent += len(message.get("body", b""))
            await send(message)

        self._open[visitor] += 1
        try:
            if path.rstrip("/") == "/health":
                await self._answer_health(guarded)
                return
            if self._open[visitor] > MAX_REQUESTS:
                raise _Refusal(429)
            await self._pass_on(
                {**scope, "path": path, "raw_path": path.encode(), "visitor": visitor}, receive, guarded
            )
        except _Refusal as refusal:
            await _answer(guarded, refusal.status, REFUSALS[refusal.status])
        finally:
            _decrement(self._open, visitor)
            if self.log is not None and not STATIC.match(path):
                seconds = time.monotonic() - start
                self.log(f"{visitor} {scope['method']} {_loggable(path)} {status} {sent} {seconds:.3f}")

    async def _answer_health(self, send: Send) -> None:
        state = "stopping" if self.stopping else "loading" if self.app is None else "ready"
        running, waiting = self.places.count()
        text = json.dumps({"status": state, "running": running, "waiting": waiting})
        await _answer(send, 200 if state == "ready" else 503, text, "application/json")

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises: _Refusal."""
        path = scope["path"]
        if self.app is None:
            raise _Refusal(503)
        if "://" in path or path.startswith(f"{API}/deep_link"):
            # gradio would fetch an address after file=, file/ or proxy=, and write a file for a deep link
            raise _Refusal(403)
        if self._is_hidden(path):
            raise _Refusal(403)
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            if not WITH_BODY.fullmatch(path):
                raise _Refusal(404)
            if path.rstrip("/") == f"{API}/upload":
                await self._upload(self.app, scope, receive, send)
                return
            receive, body = await _read_body(receive)
            self._check_body(body)
        with self._reading(scope):
            await self.app(scope, receive, send)

    def _is_hidden(self, path: str) -> bool:
        """Whether a path leads to a lock, which names the machine and the command, or to a file that is being written.

        The path is already decoded; it is decoded once more because proxies may encode it again.
        """
        path = unquote(path)
        if (found := FILE.search(path)) is None:
            return False
        name = "/" + path[found.end() :].lstrip("/")
        for folder in (self.uploads, self.results):
            if folder is not None:
                name = name.removeprefix(f"{folder.absolute()}/").removeprefix(f"{folder.resolve()}/")
        return any(part.startswith(".") for part in re.split(r"[/\\]", name))

    def _reading(self, scope: Scope) -> AbstractContextManager[None]:
        found = READING.fullmatch(scope["path"])
        if found is None or scope["method"] != "GET":
            return nullcontext()
        if found["event"]:
            return self.places.reading(self.session_of(found["event"]))
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        return self.places.reading(query.get("session_hash", [""])[0])

    async def _upload(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            raise _Refusal(411)
        if int(length) > MAX_UPLOAD + MAX_BODY:
            raise _Refusal(413)
        self._count_upload(scope["visitor"], max(int(length), MIN_UPLOAD))
        self._uploading += 1
        try:
            await app(scope, receive, send)
        finally:
            self._uploading -= 1
            # finished uploads are in folders; this runs in the event loop, so no other upload can begin meanwhile
            unfinished = [path for path in self.uploads.iterdir() if path.is_file()]
            for path in () if self._uploading else unfinished:
                path.unlink(missing_ok=True)
            await asyncio.to_thread(remove_oldest, self.uploads, ALL_UPLOADS, unfinished)

    def _count_upload(self, visitor: str, size: int) -> None:
        """Count an upload. Raises: _Refusal if it exceeds the visitor's share."""
        now = time.monotonic()
        while self._uploaded and now - self._uploaded[0][0] > UPLOAD_SECONDS:
            _, earlier, bytes_then = self._uploaded.popleft()
            _decrement(self._uploaded_bytes, earlier, bytes_then)
        if self._uploaded_bytes[visitor] + size > VISITOR_UPLOADS:
            raise _Refusal(429)
        self._uploaded.append((now, visitor, size))
        self._uploaded_bytes[visitor] += size

    def _check_body(self, body: bytes) -> None:
        """Check that a body is JSON and that all files in it were uploaded before. Raises: _Refusal."""
        try:
            values = [json.loads(body, parse_constant=_refuse_constant)] if body else []
        except (ValueError, RecursionError):
            raise _Refusal(400) from None
        while values:
            value = values.pop()
            if isinstance(value, list):
                values += value
            elif isinstance(value, dict):
                values += value.values()
                if ("path" in value and not self._is_upload(value["path"])) or ("url" in value and "path" not in value):
                    raise _Refusal(403)

    def _is_upload(self, path: Any) -> bool:
        try:
            found = Path(path).resolve(strict=True)
            return found.is_relative_to(self.uploads.resolve()) and found.is_file()
        except (TypeError, ValueError, OSError, RuntimeError):
            return False


def visitor_of(scope: Scope, proxies: int) -> str:
    """The visitor's address; for IPv6 its /64 network, since a visitor usually has all of it.

    With `proxies` it is the one that the outermost trusted proxy added to X-Forwarded-For; earlier ones can be forged.
    """
    client = scope.get("client")
    name = str(client[0]) if client else ""
    if proxies:
        headers = [value.decode("latin-1") for key, value in scope["headers"] if key == b"x-forwarded-for"]
        hops = [hop.strip() for hop in ",".join(headers).split(",")]
        name = hops[-proxies] if len(hops) >= proxies else name
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return str(client[0]) if client else "unknown"
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped or ipaddress.IPv6Network((int(address), 64), strict=False))
    return str(address)


async def _read_body(receive: Receive) -> tuple[Receive, bytes]:
    """Read a request's body; also returns a `receive` that yields it again. Raises: _Refusal."""
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    break
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > MAX_BODY:
                    raise _Refusal(413)
    except TimeoutError:
        raise _Refusal(408) from None
    waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again, bytes(body)


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which are not JSON. Raises: ValueError."""
    raise ValueError(name)


async def _answer(send: Send, status: int, text: str, kind: str = "text/plain; charset=utf-8") -> None:
    headers = [(b"content-type", kind.encode()), (b"cache-control", b"no-store")]
    if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers.append((b"retry-after", b"60"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def _decrement(counter: Counter[str], key: str, count: int = 1) -> None:
    counter[key] -= count
    if not counter[key]:
        del counter[key]


def _loggable(path: str) -> str:
    """A path without what visitors typed: file names contain prompts, other parts may contain session names."""
    if found := FILE.search(path):
        name = path[found.end() :]
        folder, ending = os.path.dirname(name).removesuffix(f"/{LARGE}"), os.path.splitext(name)[1]
        number = re.match(r"\d{3,}(?=-)", os.path.basename(folder))
        ending = ending if re.fullmatch(r"[.]\w{1,12}", ending) else ""
        return f"{API}/file={number[0] if number else ''}*{ending}"
    return re.sub(r"[^\w/.-]", "?", "/".join(path.split("/")[:3]))[:60]
