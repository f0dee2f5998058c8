"""How likely given clips are to a model, token by token; and the file that keeps it. Nothing is sampled here.

Every frame is scored, given ones too: their numbers verify a conversion, but only supervised frames are what a model
learned, and given frames of stage 2, which see each other whole, are no likelihoods.
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from cogvideo.files import atomic_write
from cogvideo.model.config import ModelConfig
from cogvideo.model.plan import Plan
from cogvideo.model.transformer import CogVideoTransformer, TextBias
from cogvideo.sequence.batch import Batch, frame_inputs

CHUNK_ROWS = 2048
"""Rows whose logits are alive at once: 160 MB at 20,000 image tokens."""


@torch.inference_mode()
def score(model: CogVideoTransformer, plan: Plan, batch: Batch, logits_out: np.ndarray | None = None) -> np.ndarray:
    """Negative log-likelihood of every frame token, in nats: (batch, num_frames, frame_len) float32.

    `plan` is `plan_forward(model.config)` on the model's device. `logits_out` (batch, num_frames * frame_len, image
    tokens) is filled where given.
    """
    assert not model.training, "dropout is on; call model.eval() first"
    device = model.word_embeddings.weight.device
    batch = batch.trim_text().to(device)
    inputs = frame_inputs(batch.frames, model.config.vocabulary.start_of_image)
    hidden = model(inputs, plan, TextBias.of(batch.text_mask), text=batch.text).flatten(0, 1)
    losses = np.empty(len(hidden), np.float32)
    kept = None if logits_out is None else logits_out.reshape(len(hidden), -1)
    for start in range(0, len(hidden), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits = model.logits(hidden[rows])
        losses[rows] = F.cross_entropy(logits, batch.frames.flatten()[rows], reduction="none").cpu().numpy()
        if kept is not None:
            kept[rows] = logits.cpu().numpy()
    return losses.reshape(batch.frames.shape)


class FrameMeans:
    """Running mean of each frame's losses, in float64."""

    def __init__(self, num_frames: int) -> None:
        self.sums = np.zeros(num_frames)
        self.clips = 0

    def add(self, losses: np.ndarray) -> None:
        """Losses (clips, num_frames, frame_len)."""
        self.sums += losses.astype(np.float64).mean(2).sum(0)
        self.clips += len(losses)

    def report(self, config: ModelConfig) -> str:
        """One line a frame, and the mean that training minimises."""
        means = self.sums / max(self.clips, 1)
        supervised = list(config.layout.supervised_frames)
        lines = [f"{self.clips} clips; mean negative log-likelihood a token, in nats"]
        for frame, mean in enumerate(means):
            lines.append(f"  frame {frame}  {'learned' if frame in supervised else 'given':<8}{mean:.6f}")
        mean = float(means[supervised].mean())
        lines.append(f"  all learned       {mean:.6f}  (perplexity {math.exp(min(mean, 700)):.2f})")
        return "\n".join(lines)


@contextmanager
def score_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, np.ndarray]]:
    """A safetensors file of float32 arrays of these shapes, mapped to be filled row by row; it appears when complete.

    So scores of any number of clips need memory for one batch only.
    """
    ends = np.cumsum([4 * math.prod(shape) for shape in shapes.values()]).tolist()
    spans = dict(zip(shapes, zip([0, *ends], ends, strict=False), strict=True))
    header = {n: {"dtype": "F32", "shape": list(shapes[n]), "data_offsets": list(spans[n])} for n in shapes}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + ends[-1])  # a full disk says so now, not by a SIGBUS
        begin = 8 + len(text)
        maps = {
            name: np.memmap(temporary, np.float32, "r+", begin + spans[name][0], shape)
            for name, shape in shapes.items()
        }
        yield {**maps}
        for array in maps.values():
            array.flush()
