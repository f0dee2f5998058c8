"""Training with the `deepspeed` command, and with the shell scripts that call it."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cogvideo.config import dump_yaml
from cogvideo.files import read_json
from cogvideo.training.launch import train
from tests.helpers.ranks import free_port
from tests.helpers.training import prepare_data, read_metrics, settings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(words: list[str], **environment: str) -> str:
    """Run a command; returns its stderr."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "DS_ACCELERATOR": "cpu"} | environment
    done = subprocess.run(words, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pretrain_stage2.sh", "finetune.sh"])
def test_the_shell_scripts_start_runs(script: str, tmp_path: Path) -> None:
    """As on a cluster, with a hostfile and without ssh, at small scale; the next test starts pretrain_stage1.sh."""
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    data = prepare_data(tmp_path / "prepared")
    task = "interpolation" if "2" in script else "sequential"
    config, alone = (
        settings(data, tmp_path / name, task, train={"steps": 3, "micro_batch_size": 2}) for name in ("run", "alone")
    )
    file = tmp_path / "small.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    words: list[str] = []
    if script == "finetune.sh":
        image = settings(data, tmp_path / "image", "image", train={"steps": 1})
        train(image)
        words = [str(tmp_path / "image/export/trunk"), str(data / "clips")]
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n", encoding="utf-8")
    cluster = {"HOSTFILE": str(hosts), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment = {"CONFIG": str(file), "MACHINE": "cpu", "MASTER_PORT": str(free_port())} | cluster
    stderr = run([f"scripts/{script}", *words, "--resume"], **environment)
    assert "2 processes on CPU" in stderr
    assert [line["step"] for line in read_metrics(config.run_dir)] == [1, 2, 3]
    assert read_json(config.run_dir / "checkpoints/step_00000003/manifest.json")["world"] == 2
    if script == "pretrain_stage2.sh":  # two processes train like one, dropout included
        train(alone)
        one, two = (read_metrics(run.run_dir) for run in (alone, config))
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-4)
        for name in ("grad_norm", "grad_norm/temporal", "grad_norm/embeddings"):
            assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-3)


@pytest.mark.slow
def test_sigterm_to_a_script_saves_and_stops_its_processes(tmp_path: Path) -> None:
    config = settings(prepare_data(tmp_path / "prepared"), tmp_path / "run", train={"steps": 100_000})
    file = tmp_path / "small.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    launch = {"CONFIG": str(file), "MACHINE": "cpu", "PROCESSES": "2", "MASTER_PORT": str(free_port())}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "DS_ACCELERATOR": "cpu"} | launch
    with open(tmp_path / "stderr.txt", "w+", encoding="utf-8") as stderr:
        script = subprocess.Popen([ROOT / "scripts/pretrain_stage1.sh"], env=environment, stdout=stderr, stderr=stderr)
        deadline = time.monotonic() + 120
        try:
            while not (config.run_dir / "metrics.jsonl").is_file() or not read_metrics(config.run_dir):
                assert time.monotonic() < deadline and script.poll() is None
                time.sleep(0.1)
        finally:
            script.terminate()  # also ends the training of a test that fails
        assert script.wait(120) == 143
        stderr.seek(0)
        assert "stopped at step" in stderr.read()
    latest = (config.run_dir / "checkpoints/latest").read_text().strip()
    assert latest == f"step_{read_metrics(config.run_dir)[-1]['step']:08d}"
