"""Tiny super-resolution models and batches."""

from dataclasses import replace

import torch

from cogvideo.model.initialise import initialise
from cogvideo.sequence.layout import Vocabulary
from cogvideo.superres.batch import SuperresBatch, pad_captions
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.superres.transformer import SuperresTransformer

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
