"""`cogvideo demo` in a process of its own, through gradio's client and plain HTTP."""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogvideo.checkpoint.adapter import Base, fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model
from cogvideo.cli import demo as command
from cogvideo.cli.main import main
from cogvideo.files import BUNDLED_WEIGHTS, write_json
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.superres import add_superres

SETTINGS = ["num_clusters=32", "key_frames.top_k_clusters=4"]


@dataclass
class Page:
    process: "subprocess.Popen[str]"
    address: str
    bundle: Path
    out: Path

    @cached_property
    def client(self) -> Any:
        return self.connect()

    def connect(self) -> Any:
        """Another visitor."""
        gradio_client = pytest.importorskip("gradio_client")
        return gradio_client.Client(self.address, verbose=False, analytics_enabled=False)

    def get(self, path: str, send: Any = None) -> tuple[int, dict[str, str], bytes]:
        data = None if send is None else json.dumps(send).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, {}, error.read()

    def file(self, path: Path | str) -> tuple[int, dict[str, str], bytes]:
        return self.get(f"gradio_api/file={quote(str(path))}")

    def sampled(self, out: Path, *words: str | Path) -> torch.Tensor:
        """Tokens that `cogvideo sample` draws, with the page's adapter, if it has one."""
        adapter = self.bundle.parent / "mine"
        words = (*words, "--adapter", adapter) if adapter.is_dir() else words
        return self.sampled_without(out, *words)

    def sampled_without(self, out: Path, *words: str | Path) -> torch.Tensor:
        assert main(["sample", *map(str, words), "--model", str(self.bundle), "--out", str(out), *SETTINGS]) == 0
        return tokens(out)


def tokens(folder: Path) -> torch.Tensor:
    return load_file(folder / "tokens.safetensors")["tokens"]


@contextmanager
def serve(folder: Path, *words: str) -> Iterator[Page]:
    pytest.importorskip("gradio", reason="the page needs gradio; pip install -e '.[demo]'")
    bundle, out = folder / "bundle", folder / "out"
    if not bundle.exists():
        write_bundle(bundle)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "cogvideo", "demo", "--model", str(bundle), "--out", str(out), "--port", "0"),
            *("--access-log", str(folder / "log"), *words, *SETTINGS),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "no_proxy": "127.0.0.1", "TMPDIR": str(folder)},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("CogVideo is at http://127.0.0.1:"), line
        yield Page(process, line.split()[3].rstrip(","), bundle, out)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("demo")
    bundle = write_bundle(folder / "bundle")
    add_superres(bundle)
    other = write_bundle(folder / "other/bundle", frame_side=3)
    write_json(other / "bundle.json", {"examples": ["a prompt for the others"]})
    (other / "sampling.yaml").write_text("rounds: 0\nseed: 2\nfirst_frame: {text_bonus: 0.0}\n")
    words = ["--at-once", "2", "--model", str(other)]
    for name, weights in {"mine": bundle, "theirs": other}.items():
        base = Base(model="sequential", sha256=fingerprint(load_checkpoint(weights / "sequential")), step=1)
        write_adapter(folder / name, load_model(weights / "sequential"), base)
        words += ["--adapter", str(folder / name)]
    with serve(folder, *words) as page:
        yield page
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(60) == 143
    left = {path.name for path in folder.iterdir()} - {"torchinductor_root"}
    assert left == {"bundle", "mine", "other", "theirs", "out", "log"}, "uploads are deleted with the server"


def test_a_clip_appears_on_the_page(page: Page, tmp_path: Path) -> None:
    """It is the clip that the command draws, and every file of it can be downloaded."""
    seen = list(page.client.submit(CAPTIONS[1], seed=3, rounds=1, api_name="/generate"))
    assert "0 of 36 tokens" in seen[0][0] and "<video" not in seen[0][1]
    line, cards = seen[-1]
    (folder,) = page.out.glob("000-红色的数字3向左缓慢移动")
    assert f"1 clip of 9 frames, 2 per second, done. Saved in out/{folder.name}" in line
    assert torch.equal(tokens(folder), page.sampled(tmp_path / "sampled", CAPTIONS[1], "seed=3", "rounds=1"))
    for path in folder.iterdir():
        if path.name != "samples.json":
            assert quote(str(path)) in cards
        assert page.file(path)[::2] == (200, path.read_bytes())


def test_the_button_sends_what_the_page_shows(page: Page, tmp_path: Path) -> None:
    """Its event is another one than that of programs."""
    config = json.loads(page.get("config")[2])
    shown = {component["id"]: component["props"] for component in config["components"]}
    (named,) = (event for event in config["dependencies"] if event["api_name"] == "generate")
    (own,) = (
        event for event in config["dependencies"] if event["outputs"] == named["outputs"] and event["id"] != named["id"]
    )
    typed = {"Prompt": "of the button", "Rounds": 0}
    values = [typed.get(shown[number]["label"], shown[number].get("value")) for number in own["inputs"]]
    sent = {"data": values, "fn_index": own["id"], "session_hash": "button"}
    assert page.get("gradio_api/queue/join", sent)[0] == 200
    assert b'"success":true' in page.get("gradio_api/queue/data?session_hash=button")[2].replace(b" ", b"")
    (folder,) = page.out.glob("*-of-the-button")
    assert torch.equal(tokens(folder), page.sampled(tmp_path / "sampled", "of the button", "rounds=0"))


def test_a_clip_of_other_weights(page: Page, tmp_path: Path) -> None:
    """What is left out is as these weights have it: settings, adapters, super-resolution, examples."""
    from gradio_client.exceptions import AppError

    other = Page(page.process, page.address, page.bundle.parent / "other/bundle", page.out)
    line, _ = page.client.predict("of others", weights="other", api_name="/generate")
    (folder,) = page.out.glob("*-of-others")
    assert f"done. Saved in out/{folder.name}" in line and tokens(folder).shape == (1, 5, 9)
    adapter = ["--adapter", page.bundle.parent / "theirs"]
    assert torch.equal(tokens(folder), other.sampled_without(tmp_path / "with", "of others", *adapter))
    page.client.predict("without", weights="other", adapters=[], seed=4, api_name="/generate")
    (folder,) = page.out.glob("*-without")
    assert torch.equal(tokens(folder), other.sampled_without(tmp_path / "without", "without", "seed=4"))
    with pytest.raises(AppError, match=r"there is no adapter .*mine.*; available: theirs"):
        page.client.predict("a", weights="other", adapters=["mine"], api_name="/generate")
    _, _, content = page.get("config")
    assert b"a prompt for the others" in content and b'"other"' in content


def test_a_large_clip(page: Page, tmp_path: Path) -> None:
    """By the bundle's own models; it is the one of the command, and can be downloaded with the small one."""
    line, cards = page.client.predict(CAPTIONS[1], seed=4, rounds=0, upsample=True, api_name="/generate")
    (folder,) = page.out.glob("*-红色的数字3向左缓慢移动/large")
    assert f"done. Saved in out/{folder.parent.name}<" in line and ">video</a>" in cards
    page.sampled(tmp_path / "sampled", CAPTIONS[1], "seed=4", "rounds=0", "--upsample")
    assert torch.equal(tokens(folder), tokens(tmp_path / "sampled/large"))
    video = folder / "000-红色的数字3向左缓慢移动.mp4"
    assert f'src="gradio_api/file={quote(str(video))}?1"' in cards and page.file(video)[2] == video.read_bytes()


def test_an_adapter_is_switched_off(page: Page, tmp_path: Path) -> None:
    page.client.predict("switched off", rounds=0, adapters=[], api_name="/generate")
    page.client.predict("switched on", rounds=0, adapters=["mine"], api_name="/generate")
    off, on = (tokens(next(page.out.glob(f"*-switched-{state}"))) for state in ("off", "on"))
    assert torch.equal(off, page.sampled_without(tmp_path / "off", "switched off", "rounds=0"))
    assert torch.equal(on, page.sampled(tmp_path / "on", "switched on", "rounds=0"))


def test_an_uploaded_picture(page: Page, tmp_path: Path) -> None:
    from gradio_client import handle_file

    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(picture)
    page.client.predict("a picture", handle_file(str(picture)), rounds=0, api_name="/generate")
    (folder,) = page.out.glob("*-a-picture")
    expected = page.sampled(tmp_path / "sampled", "a picture", "--first-frame", picture, "rounds=0")
    assert torch.equal(tokens(folder), expected)


def test_concurrent_requests(page: Page, tmp_path: Path) -> None:
    """Two run and the third waits; cancelling one does not affect the others."""
    leaving = page.connect().submit("leaving", samples_per_prompt=16, rounds=4, api_name="/generate")
    staying = [page.connect().submit(f"staying {n}", rounds=2, api_name="/generate") for n in range(2)]
    while not list(page.out.glob("*-leaving/unfinished/0*")):
        time.sleep(0.02)
    leaving.cancel()
    for number, job in enumerate(staying):
        job.result(timeout=120)
        (folder,) = page.out.glob(f"*-staying-{number}")
        assert torch.equal(tokens(folder), page.sampled(tmp_path / str(number), f"staying {number}", "rounds=2"))
    (folder,) = page.out.glob("*-leaving")
    assert not (folder / "samples.json").exists(), "its job was stopped"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"prompts": " "}, "there is no prompt"), ({"key_frames_guidance_scale": "much"}, "expected float or null")],
)
def test_errors_are_shown(page: Page, settings: dict[str, Any], message: str) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=message) as error:
        page.client.predict(**{"prompts": "a", **settings}, api_name="/generate")
    assert "\n" not in str(error.value)


def test_nothing_else_is_served_or_fetched(page: Page, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    code = Path(command.__file__)
    for path in (tmp_path / "secret", code, f"{page.out}/../bundle/text.model", page.bundle / "bundle.json", page.out):
        assert page.file(path)[0] == 403, path
    for place in ("file=http://127.0.0.1:1/", "file/http://127.0.0.1:1/", "file/http%3A%2F%2F127.0.0.1:1/"):
        assert page.get(f"gradio_api/{place}")[0] == 403, "the server is no proxy"
    status, headers, html = page.get("")
    assert status == 200 and b"gradio" in html
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
    theme = page.get("theme.css")[2]
    assert b"http" not in theme.replace(b"http://www.w3.org", b"")
    assert b'"analytics_enabled":false' in html.replace(b" ", b"")


def test_a_file_that_was_not_uploaded_is_not_read(page: Page, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    about = json.loads(page.get("gradio_api/info")[2])["named_endpoints"]["/generate"]["parameters"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0)
        address = f"http://127.0.0.1:{other.getsockname()[1]}/a.png"
        for place in ({"path": str(tmp_path / "secret.png")}, {"path": address}, {"url": address}, {"path": [address]}):
            file = {**place, "meta": {"_type": "gradio.FileData"}}
            values = ["not sent", file, *(parameter.get("parameter_default") for parameter in about[2:])]
            for name in ("call/generate", "run/generate", "run/upload", "api/generate", "queue/join"):
                status, _, said = page.get(f"gradio_api/{name}", {"data": values, "fn_index": 0, "session_hash": "x"})
                assert (status, said) == (403, b"this file or address is not allowed"), name
        with pytest.raises(BlockingIOError):
            other.accept()  # nobody connected
    assert not list(page.out.glob("*-not-sent"))
    assert page.get("gradio_api/queue/join", "x" * (1 << 20))[0] == 413


def test_the_log_has_no_prompts(page: Page) -> None:
    """Nor have the names of files in it."""
    page.client.predict("unspeakable", rounds=0, api_name="/generate")
    (folder,) = page.out.glob("*-unspeakable")
    assert page.file(folder / "000-unspeakable.mp4")[0] == 200
    log = page.out.parent / "log"
    wanted = f"127.0.0.1 GET /gradio_api/file={folder.name.partition('-')[0]}*.mp4 200"
    for _ in range(300):  # a line is written after the answer
        if wanted in log.read_text():
            break
        time.sleep(0.1)
    assert wanted in log.read_text() and "127.0.0.1 request 1 clip of 5 frames" in log.read_text()
    assert "unspeakable" not in log.read_text()


@pytest.mark.slow
def test_a_first_signal_lets_clips_end_and_a_second_does_not(tmp_path: Path) -> None:
    """Also: a page below a path, with places for two requests of a visitor."""
    with serve(tmp_path, "--root-path", "/video", "--per-visitor", "2", "--log-prompts") as page:
        assert f'"root":"{page.address}video"'.encode() in page.get("config")[2].replace(b" ", b"")
        assert json.loads(page.get("video/health")[2])["status"] == "ready"
        client = page.client
        jobs = [
            client.submit(f"job {n}", samples_per_prompt=2 + 14 * n, rounds=4, api_name="/generate") for n in (0, 1)
        ]
        while len(list(page.out.glob("*/unfinished/0*"))) < 2:
            time.sleep(0.05)
        with pytest.raises(Exception, match="2 requests from your address are already running or waiting"):
            client.predict("too many", api_name="/generate")
        page.process.send_signal(signal.SIGTERM)
        line, cards = jobs[0].result(timeout=120)
        assert "done. Saved in" in line and 'src="/video/gradio_api/file=' in cards
        assert json.loads(page.get("health")[2])["status"] == "stopping"
        with pytest.raises(Exception, match="the server is shutting down"):
            client.predict("too late", api_name="/generate")
        assert page.process.poll() is None
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(30) == 143
        assert (next(page.out.glob("*-job-0")) / "samples.json").exists()
        assert not (next(page.out.glob("*-job-1")) / "samples.json").exists()
        assert ": job 0" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a prompt"], "'a prompt' is not a setting; prompts are typed on the page"),
        (["--at-once", "0"], "--at-once 0 allows no requests"),
        (["--adapter", ":2"], "--adapter :2: expected DIR or DIR:SCALE"),
        (["--model", "x", "--model", "y", "--direct", "z"], "--direct works with a single --model"),
        (["--model", "x", "--model", "y", "--iterative", "z"], "--iterative works with a single --model"),
        (["--model", "x", "--model", "y", "--examples", "z"], "--examples works with a single --model"),
        (["--port", "70000"], "--port 70000 is not a valid port; give one from 1024 to 65535, or 0"),
        (["--port", "-1"], "--port -1 is not a valid port"),
        (["--host", "192.0.2.1"], "cannot listen there (Cannot assign requested address"),
        (["--host", "192.0.2.1"], "give --host an address of this machine"),
        (["--host", "no such host"], "give --host an address of this machine"),
        (["--host", "http://127.0.0.1"], "give --host an address of this machine"),
        (["--host", ""], "--host is empty"),
        (["--per-visitor", "0"], "--per-visitor 0 is too small; give at least 1"),
        (["--disk", "nan"], "--disk nan is too small; give at least 0.001"),
        (["--proxies", "-1"], "--proxies -1 is below 0"),
        (["--root-path", "video/"], "--root-path video/ is not a path; give one such as /video"),
        (["--access-log", "missing/log"], "No such file"),
        (["sed=3"], "did you mean 'seed'?"),
        (["--model", "{plain}", "upsample.noise=shared"], "upsample.noise=shared sets super-resolution"),
    ],
)
def test_bad_arguments(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    plain = write_bundle(tmp_path.with_name("plain")) if "{plain}" in words else None
    assert main(["demo", *(word.format(plain=plain) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_an_iterative_model_goes_with_the_bundles_own_direct_one(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--iterative", "mine"])
    with pytest.raises(ValueError, match="has no direct super-resolution model of its own; add one with `cogvideo"):
        command._find_superres(tmp_path, args)
    for folder in ("direct_superres", "iterative_superres"):
        (tmp_path / folder).mkdir()
        assert command._find_superres(tmp_path, args) == (tmp_path / "direct_superres", Path("mine"))


def test_settings_of_super_resolution_of_a_file_count(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("rounds: 1\nupsample: {noise: independent, top_k_clusters: 2}\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--config", str(file)])
    own = command._find_superres(BUNDLED_WEIGHTS, args)
    for models, noise in ((own, "shared"), ((tmp_path, None), "independent")):
        clips, upsample = command._load_configs(BUNDLED_WEIGHTS, models, args, ["upsample.seed=5"])
        assert (clips.rounds, upsample.noise, upsample.top_k_clusters, upsample.seed) == (1, "independent", 2, 5)
        assert command._load_configs(BUNDLED_WEIGHTS, models, parser.parse_args([]), [])[1].noise == noise
    assert command._load_configs(BUNDLED_WEIGHTS, None, args, ["upsample.seed=5"])[1] is None


def test_a_port_in_use(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"--port {port}: cannot listen there (Address already in use" in error
    assert "give another --port (0: any that is free)" in error and error.count("\n") == 1


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == ("cogvideo: error: `cogvideo demo` needs gradio; pip install -e '.[demo]'\n")
