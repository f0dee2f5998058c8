"""Models of random weights, small enough to decode in a second, and a text tokenizer with an id per letter."""

from dataclasses import replace

import torch

from cogvideo.model.config import ModelConfig, ModelTask
from cogvideo.model.initialise import initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.layout import Vocabulary

NUM_CODES = 48
VOCABULARY = Vocabulary(size=160, num_image_tokens=NUM_CODES, pad=48, newline=49, start_of_image=50)
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=2,
    text_len=40,
    frame_side=4,  # the pipeline's frames are smaller still
    num_frames=5,
    num_positions=64,
    frame_position_start=40,
    dropout=0.0,
    attention_dropout=0.0,
    vocabulary=VOCABULARY,
)


def encode(text: str) -> list[int]:
    """One id per letter."""
    return [51 + ord(letter) % 100 for letter in text]


def model(
    task: ModelTask,
    window_size: int | None = None,
    seed: int = 0,
    frame_side: int = 4,
    learn_first_frame: bool = False,
) -> CogVideoTransformer:
    """Random weights, large enough that tokens depend on everything."""
    sizes = {"window_size": window_size, "frame_side": frame_side, "learn_first_frame": learn_first_frame}
    network = CogVideoTransformer(replace(CONFIG, task=task, **sizes))
    initialise(network, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else None
    return network.eval()
