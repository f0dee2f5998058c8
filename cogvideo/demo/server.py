"""The server of the page: where it listens and what it serves. The page itself is page.py.

It serves the page and the results, and no other file of this machine. Neither it nor a visitor's browser contacts other
servers, except for a public address (`share`), which goes through gradio's.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'"
)


@dataclass(frozen=True)
class GuardedApp:
    """gradio's server with a content security policy, and without its proxying of other addresses."""

    app: ASGIApp
    policy: str | None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start" and self.policy is not None:
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", self.policy.encode())]
            await send(message)

        if "://" in scope.get("path", ""):  # after file=, file/ or proxy=, gradio would fetch that address
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"files of this server only"})
        else:
            await self.app(scope, receive, guarded)


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
