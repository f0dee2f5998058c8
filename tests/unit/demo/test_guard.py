"""The guard of the page: whose request it is, what is refused, what is logged, and the proxy's path."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the page needs gradio; pip install -e '.[demo]'")

from cogvideo.demo import guard as module
from cogvideo.demo.guard import Guard, visitor_of
from cogvideo.demo.places import Limits, Places


class App:
    """Answers with the path that it sees."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.visitors: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.visitors.append(scope["visitor"])
        if scope["method"] == "POST":
            self.bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["path"].encode()})


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def guard(app: App, log: list[str], tmp_path: Path) -> Guard:
    results = Path("/home/.cache/out")
    return Guard(Places(Limits()), tmp_path, path="/video", log=log.append, app=app, results=results)


def request(
    guard: Guard, path: str, body: bytes | None = None, headers: dict[str, str] | None = None, client: str = "1.2.3.4"
) -> tuple[int, bytes]:
    sent: list[dict[str, Any]] = []
    waiting = [{"type": "http.request", "body": body or b"", "more_body": False}]

    async def receive() -> dict[str, Any]:
        return waiting.pop() if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "GET" if body is None else "POST", "path": path, "headers": pairs}
    asyncio.run(guard({**scope, "client": (client, 5), "query_string": b""}, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


@pytest.mark.parametrize(
    ("client", "header", "proxies", "visitor"),
    [
        ("1.2.3.4", None, 0, "1.2.3.4"),
        ("1.2.3.4", "9.9.9.9", 0, "1.2.3.4"),
        ("127.0.0.1", "9.9.9.9", 0, "127.0.0.1"),
        ("127.0.0.1", "9.9.9.9", 1, "9.9.9.9"),
        ("127.0.0.1", "6.6.6.6, 9.9.9.9", 1, "9.9.9.9"),
        ("127.0.0.1", "6.6.6.6, 9.9.9.9, 10.0.0.1", 2, "9.9.9.9"),
        ("127.0.0.1", "9.9.9.9", 2, "127.0.0.1"),
        ("127.0.0.1", "nonsense", 1, "127.0.0.1"),
        ("127.0.0.1", None, 1, "127.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", None, 0, "2001:db8:1:2::/64"),
        ("::1", None, 0, "::/64"),
        ("::ffff:1.2.3.4", None, 0, "1.2.3.4"),
    ],
)
def test_who_a_visitor_is(client: str, header: str | None, proxies: int, visitor: str) -> None:
    headers = [(b"x-forwarded-for", header.encode())] if header else []
    assert visitor_of({"client": (client, 5), "headers": headers}, proxies) == visitor


def test_the_path_of_a_proxy(guard: Guard, app: App) -> None:
    """Taken off if the proxy left it on."""
    for path in ("/video/config", "/config"):
        assert request(guard, path) == (200, b"/config")
    assert request(guard, "/video") == (200, b"/")
    assert request(guard, "/videos") == (200, b"/videos")
    assert app.visitors == ["1.2.3.4"] * 4


def test_health(guard: Guard, app: App) -> None:
    idle = {"running": 0, "waiting": 0}
    for path in ("/health", "/video/health"):
        status, body = request(guard, path)
        assert (status, json.loads(body)) == (200, {"status": "ready", **idle})
    guard.stopping = True
    assert request(guard, "/health") == (503, json.dumps({"status": "stopping", **idle}).encode())
    guard.app, guard.stopping = None, False
    assert request(guard, "/health")[0] == 503 and b"loading" in request(guard, "/health")[1]
    assert request(guard, "/") == (503, b"not ready; try again in a minute")
    assert app.visitors == []


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/gradio_api/queue/join", b'{"data": []}', 200),
        ("/gradio_api/call/v2/generate", b"", 200),
        ("/gradio_api/queue/join", b"{", 400),
        ("/gradio_api/queue/join", b'{"data": [NaN]}', 400),
        ("/gradio_api/queue/join", b"[" * 100_000, 400),
        ("/gradio_api/queue/join", b" " * (1 << 20) + b"{}", 413),
        ("/gradio_api/queue/join", b'{"data": [{"path": "/etc/passwd"}]}', 403),
        ("/gradio_api/queue/join", b'{"data": [{"url": "http://a/b"}]}', 403),
        ("/gradio_api/component_server", b"{}", 404),
        ("/login", b"{}", 404),
        ("/gradio_api/file=http://a/b", None, 403),
        ("/gradio_api/file=/out/000-a/.lock", None, 403),
        ("/gradio_api/file=/out/.lock/", None, 403),
        ("/gradio_api/file=/home/.cache/out/000-a/a.mp4", None, 200),
        ("/gradio_api/file//home/.cache/out/000-a/a.mp4", None, 200),
        ("/gradio_api/file=/home/.cache/other/a.mp4", None, 403),
        ("/gradio_api/file=/home/.cache/out/.000-a.tmp/a.mp4", None, 403),
        ("/gradio_api/file=/home/.cache/out/../a.mp4", None, 403),
        ("/gradio_api/file=out/.lock", None, 403),
        ("/gradio_api/file//out/000-a/.lock", None, 403),
        ("/gradio_api/file/out/000-a/.lock", None, 403),
        ("/gradio_api/file/.lock", None, 403),
        ("/gradio_api/file=/out/000-a/%2elock", None, 403),
        ("/gradio_api/file=/out/000-a%2F.lock", None, 403),
        ("/gradio_api/file%3D/out/000-a/%2Elock", None, 403),
        ("/gradio_api/file=/out/000-a\\.lock", None, 403),
        ("/video/gradio_api/file/out/.lock", None, 403),
        ("/gradio_api/file=/out/000-a...b/a.mp4", None, 200),
        ("/gradio_api/deep_link", None, 403),
    ],
)
def test_refusals(guard: Guard, app: App, path: str, body: bytes | None, status: int) -> None:
    assert request(guard, path, body)[0] == status
    assert len(app.visitors) == (status == 200)


def test_uploads_have_a_length_and_a_share(guard: Guard, app: App, tmp_path: Path) -> None:
    def upload(size: int | None, client: str = "1.2.3.4") -> int:
        length = {} if size is None else {"content-length": str(size)}
        return request(guard, "/gradio_api/upload", b"x", length, client)[0]

    (tmp_path / "tmpcutoff").write_bytes(b"half")
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished/a.png").write_bytes(b"whole")
    assert upload(None) == 411 and upload(module.MAX_UPLOAD * 2) == 413 and app.bodies == []
    allowed = module.VISITOR_UPLOADS // module.MAX_UPLOAD
    assert [upload(module.MAX_UPLOAD) for _ in range(allowed + 1)] == [200] * allowed + [429]
    assert upload(module.MAX_UPLOAD, "5.6.7.8") == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished"], "remains of cut uploads are removed"
    assert (tmp_path / "finished/a.png").exists()


def test_small_uploads_count_too_and_all_are_forgotten(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISITOR_UPLOADS", 3 * module.MIN_UPLOAD)

    def upload(client: str) -> int:
        return request(guard, "/gradio_api/upload", b"x", {"content-length": "1"}, client)[0]

    assert [upload("1.2.3.4") for _ in range(4)] == [200, 200, 200, 429]
    assert [upload(f"5.6.7.{n}") for n in range(9)] == [200] * 9
    monkeypatch.setattr(module, "UPLOAD_SECONDS", 0)
    assert upload("9.9.9.9") == 200
    assert [visitor for _, visitor, _ in guard._uploaded] == list(guard._uploaded_bytes) == ["9.9.9.9"]


def test_an_upload_that_is_under_way_is_left_alone(
    guard: Guard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One begins while the remains of another are removed, or the oldest uploads."""
    under_way = tmp_path / "tmpunderway"

    async def writing(scope: Any, receive: Any, send: Any) -> None:
        if not under_way.exists():
            under_way.write_bytes(bytes(9000))
            small = {**scope, "headers": [(b"content-length", b"1")]}
            await guard._upload(writing, small, receive, send)  # another one, meanwhile
            assert under_way.exists()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    monkeypatch.setattr(module, "ALL_UPLOADS", 0)
    guard.app = writing
    assert request(guard, "/gradio_api/upload", b"x", {"content-length": "1"})[0] == 200
    assert not under_way.exists(), "nothing is under way any more"


def test_too_many_requests_at_a_time(guard: Guard) -> None:
    guard._open["1.2.3.4"] = module.MAX_REQUESTS
    assert request(guard, "/config")[0] == 429
    assert request(guard, "/config", client="5.6.7.8")[0] == 200
    assert request(guard, "/health")[0] == 200


def test_the_log_holds_nothing_that_visitors_typed(guard: Guard, log: list[str]) -> None:
    for path in (
        "/gradio_api/file=/out/007-the-secret/000-the-secret.mp4",
        "/gradio_api/file=/out/007-the-secret/large/000-the-secret.mp4",
        "/gradio_api/file=/out/secret.secret/secret.a b",
        "/gradio_api/file//out/007-the-secret/000-the-secret.mp4",
        "/gradio_api/file/secret",
        "/gradio_api/heartbeat/secret",
        "/a\nsecret line",
        "/assets/a.js",
        "/health",
    ):
        request(guard, path)
    assert [line.rsplit(" ", 1)[0] for line in log] == [
        "1.2.3.4 GET /gradio_api/file=007*.mp4 200 55",
        "1.2.3.4 GET /gradio_api/file=007*.mp4 200 61",
        "1.2.3.4 GET /gradio_api/file=* 200 46",
        "1.2.3.4 GET /gradio_api/file=007*.mp4 200 55",
        "1.2.3.4 GET /gradio_api/file=* 200 23",
        "1.2.3.4 GET /gradio_api/heartbeat 200 28",
        "1.2.3.4 GET /a?secret?line 200 14",
    ]


def test_reading_counts_while_it_lasts(guard: Guard) -> None:
    places = guard.places

    async def reader(scope: Any, receive: Any, send: Any) -> None:
        assert places.poll(entered) == 0
        await send({"type": "http.response.start", "status": 200, "headers": []})

    guard.app, guard.session_of = reader, {"e1": "session"}.__getitem__
    entered = places.enter("1.2.3.4", "session")
    assert places.poll(entered) is None
    assert request(guard, "/gradio_api/call/generate/e1")[0] == 200
    assert not places._readers
