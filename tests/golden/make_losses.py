"""Golden losses: the twenty steps of configs/train/debug.yaml, float32, one thread.

    python tests/golden/make_losses.py       writes tests/golden/losses_debug.json

Run it only where numbers are meant to change (another model, optimiser, data or bundled tokenizer), and say why in
docs/log.md. `tests/integration/test_golden_losses.py` compares: bitwise on the processor and the version of torch that
the file names, within 1e-4 elsewhere.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from cogvideo.files import BUNDLED_WEIGHTS, read_json, write_json

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("losses_debug.json")


def numbers() -> dict[str, Any]:
    """Losses and gradient norms of every step, and a hash of all weights and moments at the end."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"run_dir={folder}/run", "train.num_threads=1", "log.preview_every=0", "log.peak_tflops=1"]
        command = [sys.executable, "-m", "cogvideo", "train", "--config", "configs/train/debug.yaml", *words]
        # a process of its own: DeepSpeed's stage 3 changes how this one multiplies matrices for good
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        manifest = read_json(Path(folder, "run/checkpoints/step_00000020/manifest.json"))
    tensors = hashlib.sha256(json.dumps(manifest["tensors"], sort_keys=True).encode()).hexdigest()
    losses = [line["loss"] for line in lines if "loss" in line]
    return {"losses": losses, "grad_norms": [line["grad_norm"] for line in lines if "loss" in line], "tensors": tensors}


def made_on() -> dict[str, str]:
    """What bitwise equality hangs on, besides the code."""
    return {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "cpu": _cpu_model()}


def tokenizers() -> str:
    """A hash of the bundled tokenizers, which make the debug run's data."""
    files = [BUNDLED_WEIGHTS / "text.model", BUNDLED_WEIGHTS / "image_tokenizer/model.safetensors"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    write_json(FILE, {"made_on": made_on(), "tokenizers": tokenizers()} | numbers())
    print(f"wrote {FILE}")
