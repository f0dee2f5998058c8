"""Training, sampling and scoring on fake tensors of a GPU: no operation mixes devices, no unexpected host sync."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_cuda import build

pytestmark = [
    pytest.mark.skipif(build.has_cuda_build(), reason="this PyTorch has CUDA, which the fake device cannot replace"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the fake device needs g++"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    try:
        build.build(library)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the fake device does not compile against this PyTorch: {error.stderr.strip()[-200:]}")
    return library


def problems(device: Path, choice: str, at_least: int) -> dict[str, str]:
    """What is wrong with each check of a list, run in a process of its own: the device must come before PyTorch."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.fake_cuda.checks", str(device), choice]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended after {[line['name'] for line in lines]}: {done.stderr[-2000:]}"
    assert len(lines) >= at_least
    return {line["name"]: line["problem"] for line in lines if line["problem"] is not None}


def test_every_task_trains_and_every_schedule_samples_on_a_gpu(device: Path) -> None:
    assert problems(device, "quick", at_least=19) == {}


@pytest.mark.slow
def test_every_setting_trains_and_samples_on_a_gpu(device: Path) -> None:
    assert problems(device, "slow", at_least=35) == {}
