"""`cogvideo sample` in two processes writes the same files as in one, also under torchrun after an interruption.

With `--upsample`, for both of its steps.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogvideo.cli.main import main
from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.ranks import finish, start
from tests.helpers.superres import add_superres

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    add_superres(bundle)
    (tmp_path / "prompts.txt").write_text("\n".join([CAPTIONS[0], "a", CAPTIONS[0]]), encoding="utf-8")
    words = ["--model", str(bundle), "--prompts", str(tmp_path / "prompts.txt"), "rounds=1", "num_clusters=32"]
    words += ["samples_per_prompt=2", "clips_at_once=1", "--upsample", "upsample.noise=shared"]
    assert main(["sample", *words, "--out", str(tmp_path / "one")]) == 0

    monkeypatch.chdir(tmp_path)
    words += ["--out", "two"]
    processes = start(["sample", *words, "--resume"], 2, tmp_path / "stderr")
    deadline = time.monotonic() + 240
    while all(p.is_alive() for p in processes) and not list(tmp_path.glob("two/unfinished/0*-key-frames*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for process in processes:  # as a launcher does
        process.terminate()
    assert all(finish(processes)), "all exit codes are those of failures"
    assert (tmp_path / "two" / "unfinished" / "work.json").is_file()
    command = [*TORCHRUN, "-m", "cogvideo", "sample", *words, "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("6 clips of 9 frames, 2 per second: two\n") == 1
    assert done.stdout.count("6 clips of 9 frames, 2 per second: two/large\n") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    assert finish(start(["sample", *words], 2, tmp_path / "refused")) == [2, 2]
    said = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "refused").glob("stderr_*.txt"))
    assert said.count("cogvideo: error: two is not empty; choose another folder") == 1
