"""The measurements of `check_hostile.py --readers` and `--rows`: hostile files other than media, and past faults.

Each file is read in a process forked for it, with limits on memory and time. Its memory is that process's peak above
the start, plus the whole peak of the separate process that parses untrusted files, if one was needed.
"""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cogvideo.cli.main import main as cogvideo
from cogvideo.logs import one_line
from cogvideo.media import sandbox
from cogvideo.media.video import write_video
from cogvideo.training.metrics import MetricsFile
from tests.helpers.bombs import bombs
from tests.helpers.readers import readers

MAX_MB, MAX_SECONDS = 300, 20
ADDRESS_SPACE, SECONDS = 12 << 30, 120
"""Limits of a process: address space in bytes, and CPU time."""
SCRIPTS = Path(__file__).parent


@dataclass(frozen=True)
class Outcome:
    """How reading ended, and what it took."""

    text: str
    mb: int
    seconds: float
    ok: bool
    """Whether it succeeded or was refused with a one-line error."""

    @property
    def is_small(self) -> bool:
        return self.ok and self.mb <= MAX_MB and self.seconds <= MAX_SECONDS


def measured(action: Callable[[], Any], folder: Path) -> Outcome:
    """Run `action` in a forked process; its outcome's text shows paths relative to `folder`."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            found = _in_this_process(action)
            os.write(writing, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        data = answer.read()
    _, status, usage = os.wait4(pid, 0)
    if not data:
        return Outcome(f"the process ended with {status}", usage.ru_maxrss >> 10, usage.ru_utime, False)
    text, mb, seconds, ok = json.loads(data)
    return Outcome(text.replace(f"{folder}/", "")[:100], mb, seconds, ok)


def _in_this_process(action: Callable[[], Any]) -> tuple[str, int, float, bool]:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = _peak_mb("self"), os.times()
    try:
        text, ok = str(action() or "read"), True
    except (ValueError, OSError) as error:
        text, ok = one_line(error), True
    except BaseException as error:
        text, ok = f"{type(error).__name__}: {error}", False
    mb = _peak_mb("self") - before
    while sandbox._idle:
        worker = sandbox._idle.pop()
        mb += _peak_mb(worker.process.pid)
        worker.kill()  # its time counts once it has ended
    end = os.times()
    seconds = end.user + end.system + end.children_user + end.children_system - start.user - start.system
    return text, mb, seconds, ok


def _peak_mb(process: int | str) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def _make(make: Callable[[], bytes], path: Path) -> None:
    """Write a file in another process, so that its memory is not counted. Raises: SystemExit if it cannot be made."""
    outcome = measured(lambda: path.write_bytes(make()), path.parent)
    if not path.exists():
        raise SystemExit(f"hostile_readers: {path.name}: not made ({outcome.text})")


def check_readers(folder: Path, names: list[str]) -> bool:
    """Read the bombs READER/NAME and print a row for each; returns whether all were made, and took little to read."""
    every, ok = readers(folder), True
    print("| reader | file | bytes | MB | seconds | outcome |\n|---|---|---:|---:|---:|---|", flush=True)
    for bomb in bombs():
        if f"{bomb.reader}/{bomb.name}" not in names:
            continue
        if (reader := every.get(bomb.reader)) is None:
            print(f"| {bomb.reader} | {bomb.name} | | | | FAILED: is its extra installed? |", flush=True)
            ok = False
            continue
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = Path(place) / f"file{reader.suffix}"
            _make(bomb.make, path)
            size, outcome = path.stat().st_size, measured(lambda: reader.read(path), path.parent)  # noqa: B023
        ok = ok and outcome.is_small
        row = f"{bomb.reader} | {bomb.name} | {size:,} | {outcome.mb} | {outcome.seconds:.1f} | {outcome.text}"
        print(f"| {row} |", flush=True)
    return ok


def odd_videos(folder: Path) -> Outcome:
    """`prepare` on two intact videos, one with an unknown codec, and a symbolic link to itself."""
    import numpy as np

    for number in range(2):
        write_video(folder / f"{number}.mp4", np.zeros((8, 32, 32, 3), np.uint8), 4)
    data = (folder / "0.mp4").read_bytes()
    (folder / "codec.mp4").write_bytes(data.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    (folder / "loop.mp4").symlink_to("loop.mp4")
    names = ("0.mp4", "1.mp4", "codec.mp4", "loop.mp4")
    lines = (json.dumps({"video": name, "caption": "x"}) + "\n" for name in names)
    (folder / "captions.jsonl").write_text("".join(lines))
    words = [
        "prepare",
        "--captions",
        f"{folder}/captions.jsonl",
        "--frames",
        "--out",
        f"{folder}/out",
        "frame_pixels=16",
    ]

    def prepare() -> str:
        if code := cogvideo([*words, "frames_per_video=2"]):
            raise AssertionError(f"exit code {code}")
        skipped = (folder / "out" / "skipped.jsonl").read_text().splitlines()
        if len(skipped) != 2:
            raise AssertionError(f"{len(skipped)} skipped")
        return "2 of 4 videos skipped, exit code 0"

    return measured(prepare, folder)


def wrong_metrics(folder: Path) -> Outcome:
    """metrics.jsonl with an invalid byte in its middle line."""
    path = folder / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 1.0}\n{"step": 2, "lo\xffs": 1.0}\n{"step": 3, "loss": 1.0}\n')

    def read() -> str:
        steps = [record["step"] for record in MetricsFile(path).read()]
        if steps != [1, 3]:
            raise AssertionError(f"steps {steps}")
        return "the line is left out, with a warning"

    return measured(read, folder)


def bomb_outcome(folder: Path, reader_name: str, name: str) -> Outcome:
    """Read one of the files of `check_readers`."""
    reader = readers(folder)[reader_name]
    bomb = next(bomb for bomb in bombs() if (bomb.reader, bomb.name) == (reader_name, name))
    path = folder / f"file{reader.suffix}"
    _make(bomb.make, path)
    outcome = measured(lambda: reader.read(path), folder)
    return replace(outcome, ok=outcome.is_small)


def _script(name: str, *words: str | Path) -> tuple[str, int, int, float]:
    """Run another script -> its output, exit code, largest peak memory of a process in MB, and CPU time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, SCRIPTS / name, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return ended.stdout.decode(), ended.returncode, after.ru_maxrss >> 10, seconds


def two_at_once(folder: Path) -> dict[str, Outcome]:
    """Rows 5 and 6: two training runs, and two `sample` commands, in one folder."""
    cells = _tortured(folder, ["train-sequential", "sample"], ["two-at-once"])
    return {"5": cells["train-sequential", "two-at-once"], "6": cells["sample", "two-at-once"]}


def out_of_room(folder: Path) -> dict[str, Outcome]:
    """Rows 10 and 11: a full disk, and a failing allocation."""
    cells = _tortured(folder, ["prepare-frames"], ["full-disk", "memory"])
    return {"10": cells["prepare-frames", "full-disk"], "11": cells["prepare-frames", "memory"]}


def _tortured(folder: Path, commands: list[str], faults: list[str]) -> dict[tuple[str, str], Outcome]:
    """The cells of scripts/torture.py, one trial each."""
    out = folder / "torture"
    said, *_ = _script("torture.py", "--out", out, "--kills", "5", "--command", *commands, "--fault", *faults)
    cells = json.loads((out / "table.json").read_text()) if (out / "table.json").exists() else []
    failed = Outcome(f"no outcome: {said[-80:]}", 0, 0.0, False)
    found = dict.fromkeys(((command, fault) for command in commands for fault in faults), failed)
    for cell in cells:
        key, passed, trials = (cell["command"], cell["fault"]), cell["passed"], cell["trials"]
        text = f"{key[0]}, {key[1]}: {passed} of {trials} trials passed"
        found[key] = Outcome(text, 0, cell["seconds"], 0 < passed == trials)
    return found


def damaged(count: int) -> dict[str, Outcome]:
    """Rows 7 and 8, by scripts/fuzz_files.py: damaged folders and files of every kind, and the bundles among them."""
    said, code, _, seconds = _script("fuzz_files.py", "--count", str(count))
    total = re.search(r"(?m)^(\d+ damaged): (.*); peak memory \d+ MiB, (\d+) above the start; (\d+ faults)$", said)
    bundle = re.search(r"(?m)^bundle: (.*); peak memory \d+ MiB, (\d+) above", said)
    if total is None or bundle is None:
        return {row: Outcome(said[-80:], 0, seconds, False) for row in ("7", "8")}
    whole = Outcome(f"{total[1]}: {total[2]}; {total[4]}", int(total[3]), seconds, code == 0)
    return {"7": whole, "8": Outcome(f"bundles: {bundle[1]}", int(bundle[2]), 0.0, "\n  " not in said)}


def attacked() -> dict[str, Outcome]:
    """Rows 2 and 13, by scripts/attack_page.py."""
    said, code, mb, seconds = _script("attack_page.py", "--rounds", "1", "--asks", "20", "--tabs", "10")
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if not lines:
        return {row: Outcome(said[-80:], mb, seconds, False) for row in ("2", "13")}
    figures = json.loads(lines[-1])
    fetched, leaks = figures["fetched"], len(figures["leaks"])
    clips = f"the visitor's clips {figures['clips']}, slowest {figures['slowest_clip']} s"
    return {
        "2": Outcome(
            f"{fetched} addresses fetched, {leaks} leaks", figures["peak_mb"], seconds, not fetched and not leaks
        ),
        "13": Outcome(clips, figures["peak_mb"], seconds, code == 0),
    }
