"""Tiny super-resolution models, batches and training settings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cogvideo.checkpoint.format import save_checkpoint
from cogvideo.config import from_dict, to_dict
from cogvideo.model.initialise import initialise
from cogvideo.sampling.bundle import SUPERRES
from cogvideo.sequence.layout import Vocabulary
from cogvideo.superres.batch import SuperresBatch, pad_captions
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.tokenizers.text import TextTokenizer
from cogvideo.training.config import TrainConfig

TINY_VOCABULARY = Vocabulary(size=60, num_image_tokens=40, pad=40, newline=41, start_of_image=42)
TINY_DIRECT = SuperresConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    text_len=5,
    low_res_side=4,
    high_res_side=12,
    num_positions=32,
    low_res_position_start=7,
    dropout=0.0,
    attention_dropout=0.0,
    vocabulary=TINY_VOCABULARY,
)
LOW, HIGH = 2, 6
"""Tokens along the sides of frames in `superres_settings`."""
TINY_CONFIGS = {"direct": TINY_DIRECT, "iterative": replace(TINY_DIRECT, method="iterative")}


def tiny_superres(config: SuperresConfig) -> SuperresTransformer:
    """Random weights, biases and LayerNorms included, so that every parameter has an effect."""
    model = SuperresTransformer(config)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def tiny_superres_batch(config: SuperresConfig, frames: int = 4) -> SuperresBatch:
    """Random frames with captions of 1 to 3 tokens and target masks of different rounds."""
    generator = torch.Generator().manual_seed(1)
    text, mask = pad_captions([[50, 51, 52][: 1 + i % 3] for i in range(frames)], config)
    low = torch.randint(40, (frames, config.low_res_len), generator=generator)
    high = torch.randint(40, (frames, config.high_res_len), generator=generator)
    rounds = torch.arange(frames) * 5 % len(round_masks(config))
    return SuperresBatch(text, mask, low, high, round_masks(config)[rounds], rounds + 1)


def superres_settings(scene: Path, run_dir: Path, method: str = "direct", **groups: dict[str, Any]) -> TrainConfig:
    """A run of six steps on pairs/ and bundle/ in `scene`; `groups` as in `helpers.training.settings`."""
    values: dict[str, dict[str, Any]] = {
        "superres": {
            "method": method,
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "text_len": 16,
            "low_res_side": LOW,
            "high_res_side": HIGH,
            "num_positions": 64,
            "low_res_position_start": 33,
        },
        "data": {"path": str(scene / "pairs"), "text_tokenizer": str(scene / "bundle/text.model")},
        "init": {"checkpoint": str(scene / "bundle/trunk"), "freeze_trunk": method == "direct"},
        "optimiser": {"lr": 1e-2, "warmup_steps": 2},
        "train": {"steps": 6, "batch_size": 8, "micro_batch_size": 4},
        "log": {"every": 1, "save_every": 100, "preview_every": 0},
    }
    merged = {name: values.get(name, {}) | groups.get(name, {}) for name in values.keys() | groups.keys()}
    return from_dict(TrainConfig, {"task": "superres", "run_dir": str(run_dir)} | merged)


def add_superres(bundle: Path) -> None:
    """Put models of random weights into a bundle of `write_bundle`, for frames of LOW x LOW tokens."""
    config = replace(
        TINY_DIRECT,
        text_len=16,
        low_res_side=LOW,
        high_res_side=HIGH,
        num_positions=64,
        low_res_position_start=33,
        vocabulary=TextTokenizer.load(bundle / "text.model").vocabulary,
    )
    for method, folder in SUPERRES.items():
        write_superres(bundle / folder, replace(config, method=method))  # type: ignore[arg-type]


def write_superres(folder: Path, config: SuperresConfig) -> None:
    """A checkpoint of random weights, as `cogvideo upsample` reads it."""
    torch.manual_seed(0)
    save_checkpoint(folder, dict(SuperresTransformer(config).state_dict()), {"superres": to_dict(config)})
