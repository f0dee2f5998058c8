"""The server of the page: where it listens and what it serves. The page itself is page.py.

It serves the page and the results, and no other file of this machine. Neither it nor a visitor's browser contacts other
servers, except for a public address (`share`), which goes through gradio's.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# gradio reads these at import
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="cogvideo-demo-")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from gradio.themes.utils.fonts import Font
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogvideo.demo.html import CSS
from cogvideo.demo.page import build_page
from cogvideo.demo.service import DemoService
from cogvideo.locks import LOCK_NAME

MAX_UPLOAD = "64mb"
MAX_BODY = 1 << 20  # bytes of any request that is no upload
UPLOAD_PATH = "/gradio_api/upload"
REFUSALS = {400: b"not JSON", 403: b"files of this server only", 413: b"the request is too large"}
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'"
)


@dataclass(frozen=True)
class GuardedApp:
    """gradio's server with a content security policy, and without its fetching of other addresses."""

    app: ASGIApp
    policy: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start" and self.policy is not None:
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", self.policy.encode())]
            await send(message)

        path, status = scope.get("path", ""), 200
        if "://" in path:  # after file=, file/ or proxy=, gradio would fetch that address
            status = 403
        elif _has_body(scope) and path.removeprefix(scope.get("root_path", "")) != UPLOAD_PATH:
            receive, body = await _read_body(receive)
            status = _judge_body(body)
        if status == 200:
            await self.app(scope, receive, guarded)
        else:
            await guarded({"type": "http.response.start", "status": status, "headers": []})
            await guarded({"type": "http.response.body", "body": REFUSALS[status]})


def _has_body(scope: Scope) -> bool:
    return scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS")


async def _read_body(receive: Receive) -> tuple[Receive, bytes]:
    """Read a request's body, until it is over the limit; also returns what gives it to the next reader."""
    body, more = bytearray(), True
    while more and len(body) <= MAX_BODY:
        message = await receive()
        if message["type"] != "http.request":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
    waiting: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again, bytes(body)


def _judge_body(body: bytes) -> int:
    """Status for the body of a request that is no upload: it is JSON, and all files in it were uploaded before."""
    if len(body) > MAX_BODY:
        return 413
    try:
        values = [json.loads(body)] if body else []
    except (ValueError, RecursionError):
        return 400
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            values += value.values()
            if ("path" in value and not _is_upload(value["path"])) or ("url" in value and "path" not in value):
                return 403
    return 200


def _is_upload(path: Any) -> bool:
    """Whether this is the path of a file in the folder of uploads, which was empty when the server started."""
    try:
        found = Path(path).resolve(strict=True)
        return found.is_relative_to(Path(os.environ["GRADIO_TEMP_DIR"]).resolve()) and found.is_file()
    except (TypeError, ValueError, OSError, RuntimeError):
        return False


@contextmanager
def serve(
    service: DemoService, *, about: str, examples: Sequence[str], host: str, port: int, share: bool, max_running: int
) -> Iterator[str]:
    """Serve the page for as long as the context lasts; yields its address.

    `about` describes the model in a line. `max_running` requests run at the same time; further ones wait.
    Raises: OSError if the port is taken, or if `share` gets no public address.
    """
    page = build_page(service, about, examples, max_running)
    guard = Middleware(GuardedApp, policy=None if share else POLICY)  # a shared page loads gradio's scripts
    try:
        _, address, public = page.launch(
            server_name=host,
            server_port=port,
            share=share,
            allowed_paths=[str(service.out.resolve())],
            blocked_paths=[str(service.out.resolve() / LOCK_NAME)],  # names the machine and the command
            max_file_size=MAX_UPLOAD,
            app_kwargs={"middleware": [guard]},
            theme=gr.themes.Default(primary_hue="indigo", font=Font("system-ui"), font_mono=Font("monospace")),
            css=CSS,
            footer_links=["api"],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            quiet=True,
            prevent_thread_lock=True,
        )
        if share and not public:
            raise OSError("--share: gradio's servers gave no public address; see its message, or leave out --share")
        yield public or address
    finally:
        service.close()
        page.close(verbose=False)
        shutil.rmtree(os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)  # uploads
