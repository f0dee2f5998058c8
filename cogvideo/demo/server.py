"""The web server: listens, serves the page once models are loaded, and shuts down. The page itself is in page.py.

    with Server(places, listener).listening() as server:        # /health says "loading"
        server.show(service)                                    # now it says "ready"

It serves the page and the results, and no other file of this machine. Neither it nor a visitor's browser contacts other
servers, except for a public address (`share`), which goes through gradio's.
"""

import asyncio
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

# gradio reads these at import
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="cogvideo-demo-")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"  # otherwise it keeps, and summarises, ten thousand requests

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.networking import setup_tunnel
from gradio.themes.utils.fonts import Font

from cogvideo.demo.guard import MAX_UPLOAD, POLICY, Guard
from cogvideo.demo.html import CSS
from cogvideo.demo.page import build_page
from cogvideo.demo.places import Places
from cogvideo.demo.service import DemoService
from cogvideo.locks import LOCK_NAME

LINGER_SECONDS = 3.0
"""Time after the last request for browsers to fetch its clips."""
CLOSE_SECONDS = 3
"""How long open connections may take to end."""


class Server:
    """A web server in a thread of its own. It answers `/health` at once, and serves the page after `show`."""

    def __init__(
        self,
        places: Places,
        listener: socket.socket,
        *,
        root_path: str = "",
        proxies: int = 0,
        share: bool = False,
        log: Callable[[str], None] | None = None,
        log_prompts: bool = False,
    ) -> None:
        """`listener`: a bound socket. `root_path`: the page's public path or address, if it is behind a proxy.

        `proxies`, `log`: as in `Guard`. `log_prompts`: write prompts into the log too.
        """
        self._root, self._share, self._log, self._log_prompts = root_path.rstrip("/"), share, log, log_prompts
        self._uploads = Path(os.environ["GRADIO_TEMP_DIR"])
        # no policy for a shared page, which loads gradio's scripts
        policy, path = None if share else POLICY, urlsplit(self._root).path
        self._guard = Guard(places, self._uploads, policy, path, proxies, log)
        self._places, self._listener = places, listener
        config = uvicorn.Config(
            self._guard,
            log_level="error",
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,  # the guard evaluates them
            server_header=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._page: gr.Blocks | None = None
        self._open = AsyncExitStack()

    @property
    def address(self) -> str:
        """Where a browser on this machine finds the page."""
        host, port = self._listener.getsockname()[:2]
        name = {"0.0.0.0": "localhost", "::": "localhost"}.get(host, f"[{host}]" if ":" in host else host)
        return f"http://{name}:{port}/"

    @contextmanager
    def listening(self) -> Iterator["Server"]:
        """Listen for as long as the context lasts."""
        self._thread.start()
        try:
            yield self
        finally:
            self._close()

    def show(self, service: DemoService) -> str:
        """Serve the page; returns its address.

        Raises: OSError if a public address is requested and there is none.
        """
        self._guard.results = service.out
        page = build_page(service, self._places, root=self._root, log=self._note, log_prompts=self._log_prompts)
        app = gr.mount_gradio_app(
            FastAPI(),
            page,
            path="/",
            root_path=self._root or None,
            allowed_paths=[str(service.out.resolve())],
            blocked_paths=[str(service.out.resolve() / LOCK_NAME)],  # names the machine and the command
            max_file_size=MAX_UPLOAD,
            theme=gr.themes.Default(primary_hue="indigo", font=Font("system-ui"), font_mono=Font("monospace")),
            css=CSS,
            footer_links=["api"],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
        )
        page.app = app.routes[-1].app
        page.share = self._share
        asyncio.run_coroutine_threadsafe(self._start(app), self._loop).result()
        self._page = page
        self._guard.session_of = lambda event: _session_of(page, event)
        self._guard.app = app
        if not self._share:
            return self.address
        try:
            host, port = self._listener.getsockname()[:2]
            public = setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
        except Exception as error:
            message = f"--share: gradio's servers did not provide a public address ({error}); leave out --share"
            raise OSError(message) from None
        return "https://" + public.partition("://")[2]

    def finish(self, service: DemoService) -> None:
        """Wait for running requests to end, and start no others; `/health` says "stopping"."""
        self._guard.stopping = True
        self._places.close()
        was_busy = False
        while service.running_jobs() or self._places.count()[0]:
            was_busy = True
            time.sleep(0.1)
        if was_busy:
            time.sleep(LINGER_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._server.serve([self._listener]))
        self._loop.close()

    async def _start(self, app: FastAPI) -> None:
        await self._open.enter_async_context(app.router.lifespan_context(app))

    async def _stop(self) -> None:
        if self._page is not None:
            self._page._queue.stopped = True
            self._page.is_running = False
            self._page.app.stop_event.set()  # ends connections that browsers keep open
        await self._open.aclose()
        self._server.should_exit = True

    def _close(self) -> None:
        with suppress(TimeoutError):  # a busy machine; the thread ends with the process
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(3 * CLOSE_SECONDS)
        self._thread.join(3 * CLOSE_SECONDS)
        shutil.rmtree(self._uploads, ignore_errors=True)

    def _note(self, visitor: str, text: str) -> None:
        if self._log is not None:
            self._log(f"{visitor} {text}")


def _session_of(page: gr.Blocks, event: str) -> str:
    """The session of a request, by the request's id; the id itself for a request that came without a session."""
    found = page._queue.event_ids_to_events.get(event)
    return event if found is None else str(found.session_hash)
