"""Attack the web page, on this machine only: what leaks, what is left over, and whether others still get clips.

    python scripts/attack_page.py [--rounds 1] [--asks 80] [--tabs 90] [-- --per-visitor 4 ...]

It starts `cogvideo demo` with the bundled weights in a temporary folder; words after `--` are passed to it. The
attacker connects from 127.0.0.2, while a visitor at 127.0.0.1 asks for one small clip after another. Prints a line per
attack and the figures as JSON. The exit code is 1 if anything leaked, the page fetched an address that the attacker
named, a clip of the visitor's was not finished, or too many uploads or threads were left.
"""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).parents[1]))

from cogvideo.locks import LOCK_NAME

ATTACKER, VISITOR = "127.0.0.2", "127.0.0.1"
SECRET = b"a-secret-that-nobody-may-see"
JSON_TYPE = {"content-type": "application/json"}
BOUNDARY = "boundary-of-the-attack"
LARGE_UPLOAD = 80 << 20
NORMAL = {"prompts": "the red digit 3 moves left slowly", "rounds": 0}
LONG = {"prompts": "the green digit 8 moves down quickly", "rounds": 4, "samples_per_prompt": 4}


@dataclass
class Server:
    port: int
    out: Path
    uploads: Path
    """The folder of temporary files."""
    pid: int = 0
    secrets: tuple[bytes, ...] = (SECRET,)
    """What no answer may contain."""
    answers: Counter[str] = field(default_factory=Counter)
    leaks: list[str] = field(default_factory=list)

    def connect(self, address: str = ATTACKER, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout, source_address=(address, 0))

    def send(self, path: str, value: Any = None, address: str = ATTACKER, **more: Any) -> tuple[int, bytes]:
        """GET, or POST `value` as JSON or raw bytes; returns status and body."""
        connection = self.connect(address)
        try:
            body = value if isinstance(value, bytes) or value is None else json.dumps(value).encode()
            connection.request("GET" if body is None else "POST", path, body, more.get("headers", JSON_TYPE))
            answer = connection.getresponse()
            status, data = answer.status, answer.read()
        except (OSError, http.client.HTTPException) as error:
            status, data = 0, type(error).__name__.encode()
        finally:
            connection.close()
        if address == ATTACKER:
            self.answers[str(status) if status else "closed"] += 1
            if any(secret in data for secret in self.secrets):
                self.leaks.append(path)
        return status, data

    def ask(self, settings: dict[str, Any], address: str = ATTACKER) -> str | None:
        """Ask for clips; returns the id of the request, None if it was refused."""
        status, data = self.send("/gradio_api/call/v2/generate", settings, address)
        return str(json.loads(data)["event_id"]) if status == 200 else None

    @contextmanager
    def reading(self, event: str, address: str = ATTACKER) -> Iterator[http.client.HTTPResponse]:
        connection = self.connect(address)
        try:
            connection.request("GET", f"/gradio_api/call/generate/{event}")
            yield connection.getresponse()
        finally:
            connection.close()

    def clip(self, address: str = VISITOR) -> tuple[float, str]:
        """Ask for one small clip; returns seconds and how it ended."""
        start, end = time.monotonic(), "cut"
        try:
            event = self.ask(NORMAL, address)
            if event is None:
                return time.monotonic() - start, "refused"
            with self.reading(event, address) as stream:
                for line in stream:
                    if line.startswith((b"event: complete", b"event: error")):
                        end = line[7:].decode().strip()
                        break
        except (OSError, http.client.HTTPException) as error:
            end = type(error).__name__
        return time.monotonic() - start, end

    def memory(self) -> float:
        """Resident memory in MB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def counts(self) -> dict[str, float]:
        proc = Path(f"/proc/{self.pid}")
        files = [path for path in self.uploads.rglob("*") if path.is_file()] if self.uploads.exists() else []
        return {
            "memory_mb": round(self.memory()),
            "threads": len(list((proc / "task").iterdir())),
            "descriptors": len(list((proc / "fd").iterdir())),
            "uploads_mb": round(sum(path.stat().st_size for path in files) / 1e6, 1),
            "results": len(list(self.out.iterdir())),
        }


@contextmanager
def start_server(folder: Path, words: list[str]) -> Iterator[Server]:
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "cogvideo", "demo", "--out", str(folder / "out"), "--port", "0", *words]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "SECRET": SECRET.decode()}
    with open(folder / "log", "wb") as log:
        log.write(SECRET + b"\n")
        log.flush()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("CogVideo is at "):
            sys.exit(f"attack_page: the page did not start: {line}{(folder / 'log').read_text()}")
        port, out = int(line.split()[3].rstrip(",/").rpartition(":")[2]), folder / "out"
        secrets = SECRET, *(path.read_bytes().splitlines()[0] for path in (out / LOCK_NAME, Path("/etc/passwd")))
        yield Server(port, out, temporary, process.pid, secrets)
    finally:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            process.send_signal(number)
            try:
                process.wait(10)
                break
            except subprocess.TimeoutExpired:
                continue


def never_read(server: Server, count: int) -> None:
    for _ in range(count):
        server.ask(LONG)


def closed_tabs(server: Server, count: int) -> None:
    for _ in range(count):
        if (event := server.ask(LONG)) is not None:
            with server.reading(event) as stream:
                stream.readline()
                time.sleep(0.3)


def all_places(server: Server, count: int) -> None:
    """Send all requests at the same time, and read their answers for up to 20 seconds."""

    def one() -> None:
        try:
            if (event := server.ask(LONG)) is not None:
                with server.reading(event) as stream:
                    end = time.monotonic() + 20
                    while time.monotonic() < end and stream.readline():
                        pass
        except (OSError, http.client.HTTPException):
            server.answers["closed"] += 1

    in_threads([one] * count)


def files_of_others(server: Server, secret: Path, address: str) -> None:
    for place in ({"path": str(secret)}, {"path": address}, {"url": address}, {"path": "/proc/self/environ"}):
        file = {**place, "meta": {"_type": "gradio.FileData"}}
        for start in ("call/v2/generate", "call/generate", "run/generate", "api/generate", "queue/join"):
            body = {**NORMAL, "file": file, "data": ["a", file], "fn_index": 0, "session_hash": "x"}
            server.send(f"/gradio_api/{start}", body)


def traversal(server: Server, secret: Path, address: str) -> None:
    lock, log = server.out / LOCK_NAME, server.out.parent / "log"
    unfinished = server.out / ".999-a.tmp"
    unfinished.mkdir(exist_ok=True)
    hidden = unfinished / LOCK_NAME, unfinished / "000-a.txt"
    for path in hidden:
        path.write_bytes(SECRET)
    up = f"{server.out}/../../../../../.."
    others = "/etc/passwd", f"/proc/{server.pid}/environ", "/proc/self/environ"
    for target in map(str, (secret, lock, log, *hidden, *others)):
        folder, name = os.path.split(target)
        dots = target.replace("/.", "/%2e")
        plain = target, quote(target, safe=""), f"{up}{target}", f"..%2f..{target}", f"{target}/", f"{target}/.", dots
        through = f"{folder}/./{name}", f"{folder}//{name}", f"{server.out}/../{name}", f"{server.out}/x/../{name}"
        for path in (*plain, dots.replace("%", "%25"), *through):
            for start in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/svelte/"):
                server.send(start + path)
    for start in ("/gradio_api/file=", "/gradio_api/proxy=", "/gradio_api/file/"):
        server.send(start + quote(address, safe=""))


def bad_bodies(server: Server) -> None:
    for body in (b"{", b"[" * 100_000, b"\xff\xfe", b'{"data": NaN}', b"x" * (2 << 20), json.dumps([[]] * 9).encode()):
        for start in ("call/v2/generate", "call/generate", "run/generate", "queue/join", "cancel", "component_server"):
            server.send(f"/gradio_api/{start}", body)


def uploads(server: Server) -> None:
    """Uploads that are too large, many in one request, more in total than anyone needs, and cut off in the middle."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    tail = f"\r\n--{BOUNDARY}--\r\n".encode()
    kind = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    server.send("/gradio_api/upload", head + bytes(LARGE_UPLOAD) + tail, headers=kind)
    server.send("/gradio_api/upload", b"\r\n".join([head + bytes(1 << 20)] * 200) + tail, headers=kind)
    for _ in range(20):
        server.send("/gradio_api/upload", head + bytes(40 << 20) + tail, headers=kind)
    for _ in range(10):  # ends before the length that it claims
        with socket.create_connection(("127.0.0.1", server.port), source_address=(ATTACKER, 0)) as connection:
            lines = ("POST /gradio_api/upload HTTP/1.1", "host: a", f"content-type: {kind['content-type']}")
            connection.sendall("\r\n".join([*lines, "content-length: 60000000", "", ""]).encode() + head)
            try:
                connection.sendall(bytes(8 << 20))
            except OSError:
                server.answers["closed"] += 1


def in_threads(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=each) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@contextmanager
def trap() -> Iterator[tuple[str, list[int]]]:
    """An address that the page must not fetch; yields it and the number of connections to it."""
    asked = [0]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def count() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                    asked[0] += 1
                except OSError:
                    return

        threading.Thread(target=count, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.png", asked


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1, help="how many times everything is tried (default: 1)")
    parser.add_argument("--asks", type=int, default=80, help="requests at the same time (default: 80)")
    parser.add_argument("--tabs", type=int, default=90, help="tabs that are opened and closed (default: 90)")
    parser.add_argument("words", nargs="*", help="options of `cogvideo demo`, after --")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        start_server(Path(name), args.words) as server,
        trap() as (address, asked),
    ):
        secret = Path(name) / "secret.png"
        secret.write_bytes(SECRET)
        print(f"first clip: {server.clip()[0]:.1f} s", flush=True)
        before = server.counts()
        attacks: dict[str, Callable[[], None]] = {
            "requests never read": lambda: never_read(server, args.asks),
            "closed tabs": lambda: closed_tabs(server, args.tabs),
            "all places": lambda: all_places(server, args.asks),
            "files of others": lambda: files_of_others(server, secret, address),
            "paths": lambda: traversal(server, secret, address),
            "bad bodies": lambda: bad_bodies(server),
            "uploads": lambda: uploads(server),
        }
        clips: list[tuple[float, str]] = []
        peak = 0.0
        for attack, work in [pair for _ in range(args.rounds) for pair in attacks.items()]:
            server.answers.clear()
            thread, seen, start = threading.Thread(target=work), len(clips), time.monotonic()
            thread.start()
            while thread.is_alive() or len(clips) == seen:
                clips.append(server.clip())
                peak = max(peak, server.memory())
                thread.join(0.2)
            worst, ends = max(seconds for seconds, _ in clips[seen:]), Counter(end for _, end in clips[seen:])
            print(
                f"{attack}: {time.monotonic() - start:.0f} s, answers {dict(server.answers)}; "
                f"the visitor's clips {dict(ends)}, slowest {worst:.1f} s; {server.counts()}",
                flush=True,
            )
        time.sleep(5)
        after = server.counts()
        figures = {
            "before": before,
            "after": after,
            "peak_mb": round(peak),
            "clips": dict(Counter(end for _, end in clips)),
            "slowest_clip": round(max(seconds for seconds, _ in clips), 1),
            "leaks": server.leaks,
            "fetched": asked[0],
        }
        print(json.dumps(figures))
        refused = sum(end != "complete" for _, end in clips)
        left = after["threads"] > before["threads"] + 50 or after["uploads_mb"] > 600
        return int(bool(server.leaks or asked[0] or refused or left))


if __name__ == "__main__":
    sys.exit(main())
