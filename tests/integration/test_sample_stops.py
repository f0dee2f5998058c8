"""`cogvideo sample` interrupted and resumed: the same bytes in the end, or one line that says why not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogvideo.cli.main import main
from cogvideo.sampling import runner
from cogvideo.sampling.runner import UNFINISHED, RunDirectory
from tests.helpers.bundles import CAPTIONS, stop_at_batches, write_bundle

WORDS = [CAPTIONS[0], "a green one", "rounds=1", "num_clusters=32", "clips_at_once=1"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sample(bundle: Path, out: Path, *words: str) -> int:
    return main(["sample", "--model", str(bundle), "--out", str(out), *(words or WORDS)])


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert sample(bundle, out) == 0
    return contents(out)


class Stopper:
    """Interrupts a run at the n-th call of a function, before or after it does its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, after: bool) -> None:
        self.left, self.after = 0, after
        target: object = RunDirectory if name in ("finish_group", "gather", "end") else runner
        original = getattr(target, name)

        def stopping(*arguments: object, **named: object) -> object:
            self.left -= 1
            if self.left == 0 and not self.after:
                raise KeyboardInterrupt
            result = original(*arguments, **named)
            if self.left == 0:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(target, name, stopping)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("name", "number"), [("write_clip", 1), ("write_clip", 5), ("finish_group", 1), ("gather", 1), ("end", 1)]
)
def test_stopped_anywhere(
    bundle: Path,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    number: int,
    after: bool,
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Stopper(patch, name, after).left = number
        assert sample(bundle, out) == 130
    assert "run the same command with --resume to continue" in capsys.readouterr().err
    assert (out / UNFINISHED).is_dir() or (name, after) == ("end", True)
    assert sample(bundle, out, *WORDS, "--resume") == 0
    assert contents(out) == whole
    assert sample(bundle, out, *WORDS, "--resume") == 0, "already finished"
    assert "is already finished" in capsys.readouterr().out and contents(out) == whole


def test_batches_are_drawn_once(
    bundle: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after every single batch, over and over: each run draws one batch more, and none twice."""
    drawn = stop_at_batches(monkeypatch, every=1)
    out, runs = tmp_path / "out", 1
    while (code := sample(bundle, out, *WORDS, "--resume")) == 130:
        runs += 1
    assert code == 0 and contents(out) == whole
    assert len(drawn) == len(set(drawn)) == runs - 1 == 2 * (1 + 1 + 2), "a clip: first frame, key frames, two between"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(bundle: Path, whole: dict[str, bytes], tmp_path: Path, number: int) -> None:
    """A process of its own, ended from outside as soon as it has drawn something."""
    words = [sys.executable, "-m", "cogvideo", "sample", "--model", str(bundle), "--out", "out", *WORDS]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(tmp_path.glob("out/unfinished/0*")):
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    if number != signal.SIGKILL:
        assert "Traceback" not in error and "with --resume to continue" in error
        assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.startswith(".")]
    assert sample(bundle, tmp_path / "out", *WORDS, "--resume") == 0
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_sigterm_ends_the_interactive_mode(bundle: Path, tmp_path: Path) -> None:
    """Running jobs stop, finished batches stay, and no temporary file does."""
    settings = ["samples_per_prompt=50", "clips_at_once=1", "num_clusters=32"]
    words = ["sample", "--model", str(bundle), "--interactive", "--out", "talk", *settings]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-m", "cogvideo", *words], cwd=tmp_path, text=True, **pipes)  # type: ignore[call-overload]
    process.stdin.write("a red one\na green one\na blue one\n")
    process.stdin.flush()  # and not closed: more prompts could follow
    while process.poll() is None and len(list(tmp_path.glob("talk/*/unfinished/0*"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in error
    assert not [name for _, _, names in os.walk(tmp_path) for name in names if name.startswith(".")]
    assert not list(tmp_path.glob("talk/*/samples.json")), "stopped before any job was finished"


def test_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        Stopper(patch, "finish_group", True).left = 1
        assert sample(bundle, out) == 130
    left = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    for words, message in (
        ([*WORDS, "--resume", "seed=3"], "was started with different settings: seed=0, not 3; use the same ones"),
        ([*WORDS, "--resume", "another one"], "was started with different clips"),
        (WORDS, "holds an unfinished run; give --resume to continue it or --overwrite to start over"),
    ):
        assert sample(bundle, out, *words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == left
    other = write_bundle(tmp_path / "other", num_layers=1)
    assert sample(other, out, *WORDS, "--resume") == 2
    assert "was started with different weights" in capsys.readouterr().err
    assert sample(bundle, out, *WORDS, "--overwrite", "rounds=0") == 0 and not (out / UNFINISHED).exists()


def test_an_interrupted_run_leaves_no_sign_that_an_earlier_one_is_finished(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, new = tmp_path / "out", tmp_path / "new"
    assert sample(bundle, out, *WORDS) == 0 and sample(bundle, new, *WORDS, "seed=3") == 0
    with monkeypatch.context() as patch:
        Stopper(patch, "finish_group", True).left = 1
        assert sample(bundle, out, *WORDS, "seed=3", "--overwrite") == 130
    assert not (out / "samples.json").exists() and not (out / "tokens.safetensors").exists()
    assert sample(bundle, out, *WORDS, "seed=3", "--resume") == 0
    assert contents(out) == contents(new)
