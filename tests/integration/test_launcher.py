"""Training under the `deepspeed` command: two processes on a CPU learn what one does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cogvideo.config import dump_yaml
from tests.integration.train_data import numbers, prepare_data, settings

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(words: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    data = prepare_data(tmp_path / "prepared")
    runs = []
    two_processes = ["--num_accelerators", "2", "--master_port", str(free_port()), "--no_local_rank"]
    launchers = {
        "one": [sys.executable, "-m", "cogvideo"],
        "two": [str(BIN / "deepspeed"), *two_processes, "--module", "cogvideo"],
    }
    for name, launcher in launchers.items():
        config = settings(data, tmp_path / name, deepspeed={"stage": 1})
        file = tmp_path / f"{name}.yaml"
        file.write_text(dump_yaml(config), encoding="utf-8")
        run([*launcher, "train", "--config", str(file)])
        runs.append(numbers(config.run_dir))
    one, two = runs
    assert [line["step"] for line in two] == [line["step"] for line in one] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-4)
    assert [line["grad_norm"] for line in two] == pytest.approx([line["grad_norm"] for line in one], rel=1e-3)
