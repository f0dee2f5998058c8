"""`cogvideo sample` under torchrun: two processes write the same files as one, also after an interruption.

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
from tests.helpers.superres import add_superres

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    add_superres(bundle)
    (tmp_path / "prompts.txt").write_text("\n".join([CAPTIONS[0], "a", CAPTIONS[0]]), encoding="utf-8")
    words = ["--model", str(bundle), "--prompts", str(tmp_path / "prompts.txt"), "rounds=1", "num_clusters=32"]
    words += ["samples_per_prompt=2", "clips_at_once=1", "--upsample", "upsample.noise=shared"]
    assert main(["sample", *words, "--out", str(tmp_path / "one")]) == 0

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, "-m", "cogvideo", "sample", *words, "--out", "two", "--resume"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while process.poll() is None and not list(tmp_path.glob("two/unfinished/0*-key-frames*")):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.01)
        process.terminate()
        assert process.wait(timeout=120) != 0, (tmp_path / "log").read_text()
    assert (tmp_path / "two" / "unfinished" / "work.json").is_file()
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("6 clips of 9 frames, 2 per second: two\n") == 1
    assert done.stdout.count("6 clips of 9 frames, 2 per second: two/large\n") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "one")

    refused = [word for word in command if word != "--resume"]
    done = subprocess.run(refused, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("cogvideo: error: two is not empty; choose another folder") == 1
