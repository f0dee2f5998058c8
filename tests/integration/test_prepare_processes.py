"""`cogvideo prepare` in several processes: the same bytes in the folder, whatever failed or was killed before."""

import json
import multiprocessing.connection
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogvideo.cli.main import main
from tests.helpers import ranks

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cogvideo"]
SETTINGS = ["--frames", "frame_pixels=40", "frames_per_video=2", "videos_per_shard=1"]
"""Frames rather than tokens: the same code, without an image tokenizer to load."""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "train"
    assert main(["digits", "--out", str(folder), "--count", "7", "--seed", "4"]) == 0
    (folder / "clips/cut.mp4").write_bytes((folder / "clips/000000.mp4").read_bytes()[:2000])
    with open(folder / "captions.jsonl", "a") as file:
        file.write(json.dumps({"video": "clips/cut.mp4", "caption": "cut short"}) + "\n")
    return folder


def command(videos: Path, out: Path, *words: str) -> list[str]:
    return ["prepare", "--captions", str(videos / "captions.jsonl"), "--out", str(out), *SETTINGS, *words]


@pytest.fixture(scope="module")
def alone(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("alone") / "frames"
    assert main(command(videos, out)) == 0
    return contents(out)


def start(words: list[str], **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *words], env=environment, stdout=pipe, stderr=pipe, text=True)


def group() -> dict[str, str]:
    """The launcher's variables for two processes, which start as on two machines: without a launcher."""
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port())}


@pytest.mark.slow
def test_two_processes_resume_what_one_left(videos: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "frames"
    process = start(["-m", "cogvideo", *command(videos, out)])
    deadline = time.monotonic() + 120
    while not (out / "shards/00001").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (out / "manifest.json").unlink(missing_ok=True)
    first = (out / "shards/00000/frames.npy").stat().st_mtime_ns
    two = start([*TORCHRUN, *command(videos, out)])
    output, errors = two.communicate(timeout=240)
    assert two.returncode == 0, errors
    assert output.count(f"{out}: 14 rows") == 1 and "1 of 8 captions skipped" in errors
    assert contents(out) == alone and (out / "shards/00000/frames.npy").stat().st_mtime_ns == first


@pytest.mark.slow
def test_two_processes_hold_out_the_same_videos_as_one(videos: Path, tmp_path: Path) -> None:
    """The first videos that are drawn give no rows."""
    folder, words = tmp_path / "videos", ["--validation", "0.2"]
    shutil.copytree(videos, folder)
    assert main(command(folder, tmp_path / "sound", *words)) == 0
    for line in (tmp_path / "sound/validation/captions.jsonl").read_text().splitlines():
        (folder / json.loads(line)["video"]).write_bytes(b"")
    assert main(command(folder, tmp_path / "one", *words)) == 0
    assert json.loads((tmp_path / "one/plan.json").read_text())["validation"]["drawn"] > 2
    two = start([*TORCHRUN, *command(folder, tmp_path / "two", *words)])
    _, errors = two.communicate(timeout=240)
    assert two.returncode == 0, errors
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_the_other_rank_finishes_its_shards_when_one_fails(
    videos: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "frames"
    processes = ranks.start(command(videos, out, "strict=true"), 2, tmp_path / "said")
    multiprocessing.connection.wait([process.sentinel for process in processes], timeout=240)
    made = {path.name for path in (out / "shards").iterdir()}  # a launcher now ends the other rank
    assert ranks.finish(processes) == [2, 2]
    errors = "".join(path.read_text(encoding="utf-8") for path in sorted((tmp_path / "said").iterdir()))
    assert "rank 1 of 2: " in errors and "cut.mp4 is cut short" in errors  # video 7, thus shard 7, belongs to rank 1
    assert "1 of 8 shards are missing" in errors and "run the same command again" in errors
    assert len(made) == 7 and "00007" not in made and not (out / "manifest.json").exists()
    assert main(command(videos, out)) == 0
    assert contents(out) == alone


KILLED_AT_SHARD_3 = """
import os, signal, sys
from cogvideo.cli.main import main
from cogvideo.data import prepare
write_shard = prepare.write_shard
def write(folder, *shard):
    if os.environ["RANK"] == "1" and folder.name == "00003":
        folder.with_name(".00003.killed.tmp").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    write_shard(folder, *shard)
prepare.write_shard = write
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_the_other_rank_finishes_its_shards_when_one_is_killed(
    videos: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    """Without a launcher, only the other rank can notice."""
    out = tmp_path / "frames"
    words, variables = ["-c", KILLED_AT_SHARD_3, *command(videos, out)], group()
    first, second = (start(words, RANK=str(rank), **variables) for rank in range(2))
    errors = first.communicate(timeout=240)[1]
    assert second.wait(timeout=240) == -signal.SIGKILL and first.returncode == 2
    assert "3 of 8 shards are missing, because a process failed or died" in errors and "Traceback" not in errors
    assert {path.name for path in (out / "shards").iterdir()} == {
        *("00000", "00002", "00004", "00006"),
        *("00001", ".00003.killed.tmp"),
    }
    assert main(command(videos, out)) == 0
    assert contents(out) == alone


@pytest.mark.slow
def test_a_rank_with_other_captions_is_refused(videos: Path, tmp_path: Path) -> None:
    """As can happen on machines that do not share the captions file."""
    other = tmp_path / "captions.jsonl"
    other.write_text(json.dumps({"video": "clips/000000.mp4", "caption": "another"}) + "\n")
    out = tmp_path / "frames"
    words = ["prepare", "--captions", str(other), "--videos", str(videos), "--out", str(out), *SETTINGS]
    variables, processes = group(), []
    for rank, its_words in enumerate((command(videos, out), words)):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes += ranks.start(its_words, 1, tmp_path / f"said_{rank}", variables | own)
    assert ranks.finish(processes) == [2, 2]
    first, second = ((tmp_path / f"said_{rank}/stderr_0.txt").read_text(encoding="utf-8") for rank in range(2))
    assert "4 of 8 shards are missing" in first and "was begun with other captions" in second
