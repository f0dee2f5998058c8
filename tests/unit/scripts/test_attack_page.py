"""The hostile client: it sees what a careless server gives away."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.helpers.scripts import load_script

attack = load_script("attack_page")


class Careless(BaseHTTPRequestHandler):
    """Gives whoever asks any file."""

    def do_GET(self) -> None:
        try:
            data = Path(unquote(self.path).partition("file=")[2]).read_bytes()
        except (OSError, ValueError):
            data = b"no such file"
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def test_files_that_a_server_gives_away_are_leaks(port: int, tmp_path: Path) -> None:
    out, lock = tmp_path / "out", b'{"host": "here"}'
    out.mkdir()
    (out / ".lock").write_bytes(lock)
    for name in ("log", "secret.png"):
        (tmp_path / name).write_bytes(attack.SECRET)
    server = attack.Server(port, out, tmp_path, secrets=(attack.SECRET, lock))
    attack.traversal(server, tmp_path / "secret.png", "http://127.0.0.1:1/a")
    leaks = set(server.leaks)
    assert f"/gradio_api/file={out}/.999-a.tmp/000-a.txt" in leaks, "what is being written"
    assert {f"/gradio_api/file={path}" for path in (out / ".lock", tmp_path / "log", tmp_path / "secret.png")} <= leaks
