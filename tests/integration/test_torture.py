"""The fault matrix of scripts/torture.py in short, and that its judgement fails what it should."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.helpers.hub import TOKEN, Handler, serving
from tests.helpers.scripts import ROOT, load_script

torture = load_script("torture")
torture_hub = load_script("torture_hub")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="preloads a library and reads /proc"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="compiles scripts/faults.c"),
]
COMMANDS = ["convert-to", "score", "prepare-frames"]
FAULTS = ["sigkill", "sigterm", "full-disk", "write-error", "read-error", "read-only", "two-at-once", "clock-jumps"]
FAULTS += ["new-process"]


@pytest.mark.slow
def test_every_trial_passes(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--kills", "1", "--command", *COMMANDS, "--fault", *FAULTS]
    done = subprocess.run([sys.executable, str(ROOT / "scripts/torture.py"), *words], capture_output=True, text=True)
    cells = json.loads((tmp_path / "table.json").read_text()) if done.returncode in (0, 1) else []
    assert done.returncode == 0, [cell["failures"] for cell in cells if cell["failures"]] or done.stderr[-2000:]
    assert {(cell["command"], cell["fault"]) for cell in cells} == {(c, f) for c in COMMANDS for f in FAULTS}
    ended = {cell["fault"] for cell in cells if cell["ended_by_fault"]}
    assert {"full-disk", "read-only"} <= ended and "clock-jumps" not in ended
    assert not (tmp_path / "failed").exists()
    again = torture.Torture(tmp_path, kills=1, seed=0, shim=None)  # without faults.c it can only read finished cells
    assert all(again.cell(cell["command"], cell["fault"]) == cell for cell in cells)


def test_moments_are_spread_over_a_run_and_a_fifth_of_kills_comes_at_its_end() -> None:
    calls = {torture.WRITES: 900, torture.READS: 50, torture.REMOVALS: 100}
    moments = [torture.Moment(seed, 1.0, calls, Shim(), Path("work"), Path("scene")) for seed in range(100)]
    gaps = np.diff(sorted([0.0, *(moment.share for moment in moments), 1.0]))
    assert gaps.max() < 0.02
    numbers = []
    for moment in moments:
        Shim.armed.clear()
        torture.killed(signal.SIGKILL)(moment)()
        assert bool(Shim.armed) is not torture.is_timed(moment.seed)
        numbers += Shim.armed
    assert len(numbers) == 60 and all(1 <= number <= 1000 for number in numbers)
    assert sum(number > 950 for number in numbers) >= 20 and min(numbers) < 50


class Shim:
    """Stands for faults.c."""

    armed: ClassVar[list[int]] = []

    def faults_arm(self, out: bytes, scene: bytes, kinds: int, first: int, *others: int) -> None:
        assert kinds == torture.WRITES | torture.REMOVALS and others == (False, -signal.SIGKILL, 0)
        self.armed.append(first)


def test_differences_and_leftovers_fail_a_trial(tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "tmp").mkdir()
    torture.check_nothing_left(tmp_path)
    torture.compare({"a": b"1"}, {"a": b"1"})
    for found, message in (({"a": b"2"}, "a differs"), ({}, "a is missing"), ({"a": b"1", "b": b""}, "b is left over")):
        with pytest.raises(torture.Failed, match=message):
            torture.compare(found, {"a": b"1"})
    kept = {f"run/checkpoints/{name}": b"" for name in ("step_00000004/x", "step_00000006/x", "latest")}
    assert torture.without_older_checkpoints(kept).keys() == kept.keys() - {"run/checkpoints/step_00000004/x"}
    for name in ("cwd/.out.lock", "cwd/.lock", "cwd/.a.abcdefgh.tmp.json", "tmp/anything"):
        (tmp_path / name).touch()
        with pytest.raises(torture.Failed, match=name):
            torture.check_nothing_left(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("codes", "said", "message"),
    [
        ([0], "", None),
        ([2], "cogvideo: error: no\n", None),
        ([2], "", "0 lines"),
        ([2], "cogvideo: error: no\ncogvideo: error: no\n", "2 lines"),
        ([2], "Traceback (most recent call last):\nValueError: x\n", "Traceback: ValueError: x"),
        ([0], "Exception ignored in: <x>\n", "Exception ignored"),
        ([1], "cogvideo: error: no\n", "ended with"),
        ([-11], "", "ended with"),
    ],
)
def test_messages_and_exit_codes_are_judged(codes: list[int], said: str, message: str | None, tmp_path: Path) -> None:
    group = torture.Group.__new__(torture.Group)
    group.errors, group.pids, group.codes = [tmp_path / "said"], [1], dict(enumerate(codes, 1))
    group.errors[0].write_text(said)
    if message is None:
        group.check_messages()
    else:
        with pytest.raises(torture.Failed, match=message):
            group.check_messages()


@pytest.mark.parametrize(
    ("fault", "answers"),
    [("full-disk", [200, 507, 507]), ("write-error", [200, 500, 409]), ("memory", [200, 409, 409])],
)
def test_the_hub_meets_with_its_faults_until_it_is_healthy(fault: str, answers: list[int], tmp_path: Path) -> None:
    with serving(_handler(tmp_path, fault, first=2)) as hub:
        assert [_create_repository(hub.url).getresponse().status for _ in answers] == answers
        (tmp_path / "healthy").touch()
        assert _create_repository(hub.url).getresponse().status == 409


@pytest.mark.parametrize("is_handled", [False, True])
def test_the_hub_does_not_answer_a_client_that_is_to_be_killed(is_handled: bool, tmp_path: Path) -> None:
    with serving(_handler(tmp_path, "sigkill", first=1, is_handled=is_handled)) as hub:
        connection = _create_repository(hub.url)
        deadline = time.monotonic() + 30
        while not (tmp_path / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "waiting").exists() and ("someone/clips" in hub.repositories) is is_handled
        connection.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            connection.getresponse()
        (tmp_path / "healthy").touch()


def test_the_hub_leaves_its_files_and_counts(tmp_path: Path) -> None:
    with torture_hub.hub(tmp_path):
        assert _create_repository(os.environ["HF_ENDPOINT"]).getresponse().status == 200
    assert os.environ.get("HF_TOKEN") != TOKEN
    assert (tmp_path / "cwd/hub/someone/clips/.gitattributes").is_file()
    assert json.loads((tmp_path / "counts_hub").read_text()) == [1, 0, 0]


def _handler(work: Path, fault: str, first: int, is_handled: bool = False) -> type[Handler]:
    names = {"work": work, "fault": fault, "first": first, "is_handled": is_handled, "numbers": count(1)}
    return type("HubHandler", (torture_hub.FaultyHandler,), names)


def _create_repository(url: str) -> HTTPConnection:
    """Ask for one, which exists (409) if this was asked before."""
    connection = HTTPConnection(url.removeprefix("http://"))
    body = json.dumps({"organization": "someone", "name": "clips"})
    connection.request("POST", "/api/repos/create", body, {"Authorization": f"Bearer {TOKEN}"})
    return connection
