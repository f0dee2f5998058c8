"""Small training runs: prepared data of a few random clips and frames, a text tokenizer, and settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from cogvideo.config import from_dict
from cogvideo.data.shards import FORMATS, ROW, VERSION, Kind, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.files import atomic_write
from cogvideo.tokenizers.text import TextTokenizer
from cogvideo.training.config import TrainConfig

CODES = 64
COLOURS, DIRECTIONS = ("red", "green", "blue"), ("left", "right", "up", "down")
CAPTIONS = [
    f"the {colour} digit {digit} moves {direction}"
    for colour in COLOURS
    for digit in range(10)
    for direction in DIRECTIONS
]
WALL_CLOCK = {"tokens_per_second", "seconds_per_step", "minutes_left", "memory_mib", "mfu"}


def prepare_data(folder: Path) -> Path:
    """Write clips/ (5 frames of 3x3 tokens), frames/ (16x16 pixels) and text.model into `folder`."""
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.integers(0, 3, (60, 5, 9)), axis=2).astype(np.uint16)
    _write(folder / "clips", "tokens", tokens, np.resize([4.0, 2.0, 1.0], 60))
    frames = rng.integers(0, 80, (40, 16, 16, 3)).astype(np.uint8)
    _write(folder / "frames", "frames", frames, np.zeros(40))
    TextTokenizer.train(CAPTIONS, folder / "text.model", 310, CODES)
    return folder


def settings(data: Path, run_dir: Path, /, task: str = "sequential", **groups: dict[str, Any]) -> TrainConfig:
    """A run of six steps; `groups` override single settings: train={"dtype": "bf16"}."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "text_len": 24,
            "frame_side": 3,
            "frame_position_start": 24,
            "num_positions": 40,
        },
        "data": {"path": data / ("frames" if task == "tokenizer" else "clips"), "text_tokenizer": data / "text.model"},
        "optimiser": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 8, "micro_batch_size": 4},
        "log": {"every": 1, "save_every": 100, "preview_every": 0, "peak_tflops": 1},
        "tokenizer": {
            "channels": 8,
            "channel_multipliers": [1, 1, 2],
            "z_channels": 8,
            "embedding_dim": 4,
            "norm_groups": 4,
            "num_codes": 16,
            "continuous_steps": 2,
            "revive_every": 2,
        },
    }
    names = [*values, *(name for name in groups if name not in values)]
    merged = {name: values.get(name, {}) | groups.get(name, {}) for name in names}
    return from_dict(TrainConfig, _plain({"task": task, "run_dir": run_dir} | merged))


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """A run's metrics without those that depend on the clock."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in WALL_CLOCK} for line in lines]


def read_averages(checkpoint: Path) -> dict[str, Tensor]:
    """The moving averages of weights in a folder of checkpoints/, by the names of the weights."""
    tensors = {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return {name.removeprefix("ema/"): tensor for name, tensor in tensors.items() if name.startswith("ema/")}


def draw_one_pixel(records: list[dict[str, Any]], path: Path) -> None:
    """Stands for `draw_curves`, which takes half of such a run."""
    with atomic_write(path) as temporary:
        Image.new("L", (1, 1)).save(temporary, "png")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def _write(folder: Path, kind: Kind, array: np.ndarray, seconds: np.ndarray) -> None:
    """Write prepared data as `cogvideo prepare` does."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"video": f"{index}.mp4", "text": text}) for index, text in enumerate(CAPTIONS)]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = np.zeros(len(array), ROW)
    rows["caption"], rows["seconds"] = np.arange(len(array)) % len(CAPTIONS), seconds
    write_shard(shard_folder(folder, 0), {"rows.npy": rows, f"{kind}.npy": array}, [])
    plan = {"format": FORMATS[kind], "version": VERSION, "tokenizer": {"num_tokens": CODES}}
    write_manifest(folder, plan, [read_shard(shard_folder(folder, 0))])
