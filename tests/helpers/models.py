"""Small models and batches for the tests beside this file."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from cogvideo.model.config import ModelConfig, ModelTask
from cogvideo.model.initialise import initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import Batch
from cogvideo.sequence.layout import Vocabulary
from cogvideo.sequence.prompt import left_pad

TINY = ModelConfig(
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    text_len=6,
    frame_side=4,
    num_frames=5,
    num_positions=32,
    frame_position_start=8,
    dropout=0.0,
    attention_dropout=0.0,
    vocabulary=Vocabulary(30, 20, 20, 21, 22),
)

# Every kind of model there is: the three tasks, temporal attention in full, in windows, and in odd windows.
VARIANTS: dict[str, dict[str, Any]] = {
    "image": {"task": "image"},
    "sequential": {"task": "sequential"},
    "sequential_windowed": {"task": "sequential", "window_size": 2},
    "sequential_odd_window": {"task": "sequential", "frame_side": 6, "num_positions": 44, "window_size": 3},
    "interpolation": {"task": "interpolation", "window_size": 2},
    "interpolation_unwindowed": {"task": "interpolation"},
}


def tiny_config(task: ModelTask = "sequential", **changes: Any) -> ModelConfig:
    return replace(TINY, task=task, **changes)


def tiny_model(config: ModelConfig, seed: int = 0) -> CogVideoTransformer:
    """Weights large enough that attention is far from uniform and nothing is symmetric."""
    model = CogVideoTransformer(config)
    initialise(model, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def tiny_batch(config: ModelConfig, batch: int = 2, seed: int = 0) -> Batch:
    """Texts of unequal lengths and random frames."""
    rng = np.random.default_rng(seed)
    words = config.vocabulary
    texts = [rng.integers(23, words.size, config.text_len - 2 * (i % 2)).tolist() for i in range(batch)]
    text, mask = (torch.from_numpy(a) for a in left_pad(texts, config.text_len, words.pad))
    frames = rng.integers(0, words.num_image_tokens, (batch, config.layout.num_frames, config.frame_len))
    return Batch(text, mask, torch.from_numpy(frames), torch.full((batch,), 4.0))
