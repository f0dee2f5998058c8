"""The hub that torture.py pushes to: the tests' stand-in, in a separate process and with injected faults."""

import io
import itertools
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from tests.helpers.hub import TOKEN, Handler, environment, serving

ANSWERS = {"full-disk": 507, "write-error": 500, "read-only": 403}
"""Status code of the hub's answer under each fault: once for `write-error`, from then on for the others."""
KILLS = ("sigkill", "sigterm")
SLOW_SECONDS = 0.1
"""Minimum duration of each request under `slow-disk`."""


class FaultyHandler(Handler):
    """Injects a fault into the n-th request that changes something, or all from it on, until the file `healthy` exists.

    If the client is to be killed, the n-th is not answered: the file `waiting` appears instead.
    """

    work: Path
    fault: str
    first: int
    """The number n, from 1; 0: no fault."""
    is_handled: bool
    """Whether the request that is not answered takes effect."""
    numbers: Iterator[int]

    def handle_request(self) -> None:
        if self.fault == "slow-disk":
            time.sleep(SLOW_SECONDS)
        number = next(self.numbers) if self.command in ("POST", "PUT") else 0
        is_lasting = self.fault in ("full-disk", "read-only")
        hit = 0 < self.first <= number if is_lasting else 0 < self.first == number
        if not hit or self.fault not in (*ANSWERS, *KILLS) or (self.work / "healthy").exists():
            super().handle_request()
        elif self.fault in ANSWERS:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.answer({"error": self.fault}, ANSWERS[self.fault])
        else:
            self.close_connection = True
            if self.is_handled:
                answers, self.wfile = self.wfile, io.BytesIO()
                super().handle_request()
                self.wfile = answers
            (self.work / "waiting").touch()
            while not (self.work / "healthy").exists():
                time.sleep(0.01)

    do_POST = do_PUT = do_GET = do_HEAD = handle_request


@contextmanager
def hub(work: Path, fault: str = "", first: int = 0, is_handled: bool = False) -> Iterator[None]:
    """A hub for the processes that are forked inside the block.

    At the end its repositories are written to work/cwd/hub, and the number of requests that changed them to
    work/counts_hub.
    """
    ours, theirs = socket.socketpair()
    if (pid := os.fork()) == 0:
        ours.close()  # otherwise the hub would outlive its parent
        try:
            names = {"work": work, "fault": fault, "first": first, "is_handled": is_handled}
            _serve(type("HubHandler", (FaultyHandler,), names | {"numbers": itertools.count(1)}), theirs)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    theirs.close()
    try:
        url = ours.recv(1000).decode()
        with mock.patch.dict(os.environ, environment(url, work / "tmp/huggingface") | {"HF_TOKEN": TOKEN}):
            yield
    finally:
        ours.shutdown(socket.SHUT_WR)
        os.waitpid(pid, 0)
        ours.close()


def _serve(handler: type[FaultyHandler], parent: socket.socket) -> None:
    """Serve until the parent closes the connection."""
    with serving(handler) as served:
        parent.send(served.url.encode())
        parent.recv(1)
    for repository in served.repositories:
        for name, data in served.newest(repository).items():
            path = handler.work / "cwd/hub" / repository / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    writes = sum(request.startswith(("POST", "PUT")) for request in served.requests)
    (handler.work / "counts_hub").write_text(json.dumps([writes, 0, 0]))
