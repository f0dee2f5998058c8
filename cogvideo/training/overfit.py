"""Overfits a small model to a handful of clips, with the ordinary trainer, for `cogvideo check`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvideo.data.dataset import ClipDataset
from cogvideo.data.shards import (
    FORMATS,
    ROW,
    VERSION,
    read_manifest,
    read_shard,
    shard_folder,
    write_manifest,
    write_shard,
)
from cogvideo.model.config import ModelConfig
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.training.config import DataConfig, LogConfig, LoopConfig, OptimiserConfig, TrainConfig
from cogvideo.training.launch import train

NEVER = 1 << 30


@dataclass(frozen=True)
class Overfit:
    """What is trained, and how long."""

    text_tokenizer: Path
    image_tokenizer: Path | None
    """The one that made the tokens, if it is known."""
    text_len: int
    """Room for the longest text."""
    prompt: PromptFormat
    steps: int
    minutes: float
    """Training ends after this time, whatever `steps` says."""
    hidden_size: int = 128
    lr: float = 3e-3


def write_few(data: Path, rows: NDArray[np.int64], out: Path) -> Path:
    """Write some clips of a prepared folder as a prepared folder of their own."""
    clips, manifest = ClipDataset(data), read_manifest(data, "tokens")
    texts = clips.texts(rows)
    records = np.zeros(len(rows), ROW)
    records["caption"], records["seconds"] = np.arange(len(rows)), [seconds for seconds, _ in texts]
    out.mkdir(parents=True)
    lines = [json.dumps({"video": "", "text": caption}, ensure_ascii=False) + "\n" for _, caption in texts]
    (out / "captions.jsonl").write_text("".join(lines), encoding="utf-8")
    dtype = np.uint16 if 0 < clips.num_tokens <= 1 << 16 else np.int32
    arrays: dict[str, NDArray[Any]] = {"rows.npy": records, "tokens.npy": clips.frames(rows).astype(dtype)}
    write_shard(shard_folder(out, 0), arrays, [])
    plan = {"format": FORMATS["tokens"], "version": VERSION, "tokenizer": manifest["tokenizer"]}
    write_manifest(out, plan, [read_shard(shard_folder(out, 0))])
    return out


def overfit(data: Path, run_dir: Path, settings: Overfit) -> tuple[Path, list[float]]:
    """Train a small stage 1 on a prepared folder of few clips. Returns its export, and the loss of each step.

    Raises: as `train`.
    """
    clips = ClipDataset(data)
    side, text_len = int(clips.frame_len**0.5), settings.text_len
    config = TrainConfig(
        task="sequential",
        run_dir=run_dir,
        model=ModelConfig(
            num_layers=2,
            hidden_size=settings.hidden_size,
            num_heads=4,
            text_len=text_len,
            frame_side=side,
            num_frames=clips.num_frames,
            frame_position_start=text_len,
            num_positions=text_len + side**2,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        data=DataConfig(
            path=[data],
            text_tokenizer=settings.text_tokenizer,
            image_tokenizer=settings.image_tokenizer,
            balance_lengths=False,
            prompt=settings.prompt,
        ),
        optimiser=OptimiserConfig(lr=settings.lr, warmup_steps=min(20, settings.steps // 4), weight_decay=0.0),
        train=LoopConfig(steps=settings.steps, batch_size=len(clips), time_limit_minutes=settings.minutes),
        log=LogConfig(every=1, save_every=NEVER, preview_every=0, validate_every=NEVER),
    )
    train(config)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return run_dir / "export" / "sequential", [float(json.loads(line)["loss"]) for line in lines]
