"""A stand-in for the Hugging Face hub: the part of its HTTP API that downloads and commits use, on this machine.

Repositories are files by name, one dictionary per commit. Files of `LARGE_BYTES` and more are uploaded by LFS.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

LARGE_BYTES = 4096
TOKEN = "hf_standin"
Files = dict[str, bytes]


class Hub:
    """What the server knows; tests read and change it."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Files]] = {}
        """Commits by hash, for each repository."""
        self.revisions: dict[str, dict[str, str]] = {}
        """Commit by the name of a branch or tag, for each repository."""
        self.private: set[str] = set()
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        self.lock = threading.Lock()
        """Requests are handled one at a time."""
        self.url = ""

    def commit(self, repo: str, files: Mapping[str, bytes], *tags: str) -> str:
        """Add a commit that holds just these files to main; returns its hash."""
        commits = self.repositories.setdefault(repo, {})
        commit = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
        commits[commit] = dict(files)
        self.revisions.setdefault(repo, {}).update({name: commit for name in ("main", *tags)})
        return commit

    def commit_folder(self, repo: str, folder: Path, *tags: str) -> str:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return self.commit(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}, *tags)

    def newest(self, repo: str) -> Files:
        return self.repositories[repo][self.revisions[repo]["main"]]

    @property
    def downloads(self) -> list[str]:
        """Names of the files that were fetched."""
        found = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.*)", request) for request in self.requests)
        return sorted(match[1] for match in found if match)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: object, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, code: str, status: int = 404) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client has gone
            self.close_connection = True
            return
        for pattern, method in ROUTES:
            match = re.fullmatch(f"(?:{pattern[0]}) {pattern[1]}", f"{self.command} {path}")
            if match:
                with self.hub.lock:
                    method(self, body, *match.groups())
                return
        self.answer({"error": f"the stand-in has no {self.command} {path}"}, 501)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def found(self, repo: str, revision: str) -> tuple[str, Files] | None:
        """The commit of a revision; None after the answer that there is none."""
        logged_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo not in self.hub.repositories or (repo in self.hub.private and not logged_in):
            self.refuse("RepoNotFound", 404 if logged_in else 401)
            return None
        commit = self.hub.revisions[repo].get(revision, revision)
        if commit not in self.hub.repositories[repo]:
            self.refuse("RevisionNotFound")
            return None
        return commit, self.hub.repositories[repo][commit]

    def info(self, _: bytes, repo: str, revision: str | None) -> None:
        if found := self.found(repo, revision or "main"):
            siblings = [{"rfilename": name} for name in sorted(found[1])]
            private = repo in self.hub.private
            self.answer({"id": repo, "sha": found[0], "private": private, "siblings": siblings})

    def tree(self, _: bytes, repo: str, revision: str) -> None:
        if found := self.found(repo, revision):
            files = sorted(found[1].items())
            self.answer([{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files])

    def file(self, _: bytes, repo: str, revision: str, name: str) -> None:
        if found := self.found(repo, revision):
            if name not in found[1]:
                self.refuse("EntryNotFound")
            else:
                self.answer(found[1][name], ETag=f'"{_oid(found[1][name])}"', X_Repo_Commit=found[0])

    def create(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse("Unauthorized", 401)
            return
        request = json.loads(body)
        repo = f"{request['organization']}/{request['name']}"
        exists = repo in self.hub.repositories
        if not exists:
            self.hub.commit(repo, {".gitattributes": b""})
            if request.get("visibility") == "private":
                self.hub.private.add(repo)
        self.answer({"url": f"{self.hub.url}/{repo}", "id": repo}, 409 if exists else 200)

    def validate_yaml(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = {file["path"]: "lfs" if file["size"] >= LARGE_BYTES else "regular" for file in files}
        self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        actions = [o | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}} for o in objects]
        self.answer({"transfer": "basic", "objects": actions})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self.answer({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.hub.newest(repo))
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        commit = self.hub.commit(repo, files)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self.answer({"success": True, "commitUrl": url, "commitOid": commit, "hookOutput": ""})


REPO = r"([^/]+/[^/]+)"
ROUTES = [
    (("GET", rf"/api/models/{REPO}(?:/revision/(.+))?"), Handler.info),
    (("GET", rf"/api/models/{REPO}/tree/([^/]+)/?"), Handler.tree),
    (("GET|HEAD", rf"/{REPO}/resolve/([^/]+)/(.+)"), Handler.file),
    (("POST", r"/api/repos/create"), Handler.create),
    (("POST", r"/api/validate-yaml"), Handler.validate_yaml),
    (("POST", rf"/api/models/{REPO}/preupload/(.+)"), Handler.preupload),
    (("POST", rf"/{REPO}\.git/info/lfs/objects/batch"), Handler.batch),
    (("PUT", r"/lfs/(\w+)"), Handler.store),
    (("POST", rf"/api/models/{REPO}/commit/(.+)"), Handler.commit),
]


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def serving(base: type[Handler] = Handler) -> Iterator[Hub]:
    """A hub that answers at `url`."""
    hub = Hub()
    handler = type("HubHandler", (base,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(url: str, cache: Path) -> dict[str, str]:
    """Variables with which huggingface_hub talks to the stand-in, if they are set before it is imported."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


def use(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub talk to the stand-in, in this process and in others that it starts; logged out."""
    from huggingface_hub import constants

    for name, value in environment(hub.url, cache).items():
        monkeypatch.setenv(name, value)
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # read when huggingface_hub is imported
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
