"""Sample sheets during training: real clips beside what the model makes of them. Not a command; `train` hands it over.

For the transformer, what it generates from the text and the given frames; for super-resolution, frames in coarse
tokens, in fine ones, and in those that the model draws; for the image tokenizer, its reconstructions.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.inference import schedules
from cogvideo.inference.batching import Together
from cogvideo.inference.engine import compile_program
from cogvideo.inference.sampler import ClusterDraw
from cogvideo.media.contact_sheet import contact_sheet
from cogvideo.rng import SampleKey, sample_keys, sample_uniforms
from cogvideo.sampling.batches import FrameSampler
from cogvideo.sampling.config import DrawConfig
from cogvideo.sampling.prompts import EncodedPrompt
from cogvideo.sampling.superres import draw_fine, redraw, top_k_samplers
from cogvideo.superres.batch import SuperresBatch
from cogvideo.tokenizers.image import ImageTokenizer, open_image_tokenizer
from cogvideo.training.tasks.clips import ClipTask, Task
from cogvideo.training.tasks.superres import SuperresTask
from cogvideo.training.tasks.tokenizer import TokenizerTask

ROWS, SCALE = 8, 3
DRAW = DrawConfig(temperature=1.0, token_temperature=1.0, top_k_clusters=16, text_bonus=0.0)
"""Plain top-k, unguided: what the model believes, not its best face."""


class SheetWriter:
    """Called by the trainer every so many steps; always with the same clips and the same random numbers."""

    def __init__(self, image_tokenizer: Path | None) -> None:
        """`image_tokenizer`: its folder, opened now, to fail before training does; None: the bundled one.

        Raises: as `ImageTokenizer.load`.
        """
        self._path = image_tokenizer or BUNDLED_WEIGHTS / "image_tokenizer"
        if image_tokenizer is not None:
            _ = self._tokenizer

    @cached_property
    def _tokenizer(self) -> ImageTokenizer:
        return open_image_tokenizer(self._path)

    @torch.no_grad()
    def __call__(self, task: Task, step: int, path: Path) -> None:
        if isinstance(task, TokenizerTask):
            images = task.sheet_batch(4 * ROWS).to(task.device)
            rows_of_tokens = images.shape[2] // task.tokenizer.compress_rate
            rebuilt = task.tokenizer.decode(task.tokenizer.encode(images), rows_of_tokens)
            pairs = zip(images.split(ROWS), rebuilt.split(ROWS), strict=True)
            rows = [_pixels(part) for pair in pairs for part in pair]
            contact_sheet(path, rows, ["original", "reconstruction"] * (len(rows) // 2), scale=SCALE)
        elif isinstance(task, ClipTask):
            real, made, captions = _generate(task)
            rows = [self._decode(clip) for pair in zip(real, made, strict=True) for clip in pair]
            labels = [text for caption in captions for text in (f"real: {caption}", f"step {step}")]
            contact_sheet(path, rows, labels, scale=SCALE)
        elif isinstance(task, SuperresTask):
            batch, coarse = task.sheet_batch(ROWS)
            rows = [self._decode(frames) for frames in (coarse, batch.high_res, _sharpened(task, batch))]
            contact_sheet(path, rows, ["coarse", "fine", f"step {step}"], scale=1)

    def _decode(self, frames: Tensor) -> np.ndarray:
        return _pixels(self._tokenizer.decode(frames))


def _generate(task: ClipTask) -> tuple[Tensor, Tensor, list[str]]:
    """Real and generated tokens (clips, frames, frame_len), and captions."""
    batch, model = task.sheet_batch(ROWS), task.model
    texts = [row[mask].tolist() for row, mask in zip(batch.text, batch.text_mask, strict=True)]
    captions = [" ".join(task.text_tokenizer.decode(text).split()) for text in texts]
    layout, codes = model.config.layout, model.config.vocabulary.num_image_tokens
    program = compile_program(
        model.config,
        schedules.sequential(layout, layout.given_frames, layout.generation_order),
        temporal=model.config.has_temporal_channel,
    )
    draw = ClusterDraw(np.arange(codes), DRAW.temperature, DRAW.top_k_clusters, DRAW.token_temperature)
    sampler = FrameSampler(Together(model), program.to(task.device), draw.to(task.device), DRAW)
    prompts = [EncodedPrompt(text, None) for text in texts]
    known = batch.frames.clone()
    known[:, list(layout.supervised_frames)] = 0
    numbers = sample_uniforms(sample_keys(0, captions), 0, range(layout.num_frames), layout.frame_len)
    return batch.frames, sampler.sample(known, prompts, numbers, clips_at_once=ROWS), captions


def _sharpened(task: SuperresTask, batch: SuperresBatch) -> Tensor:
    """Fine tokens by the direct model from coarse ones, or what all rounds of the iterative model make of real ones."""
    model, texts = task.model, (batch.text, batch.text_mask)
    codes, (frames, places) = model.config.vocabulary.num_image_tokens, batch.high_res.shape

    def random(stream: int) -> Tensor:
        return sample_uniforms([SampleKey(0, "", 0)], stream, range(frames), places)[0].to(task.device)

    if model.config.method == "direct":
        draw = ClusterDraw(np.arange(codes), DRAW.temperature, DRAW.top_k_clusters, DRAW.token_temperature)
        return draw_fine(model, *texts, batch.low_res, draw.to(task.device), random(0))
    fine = batch.high_res
    for number, draw_plainly in enumerate(top_k_samplers(codes, task.device), 1):
        fine = redraw(model, *texts, fine, number, draw_plainly, random(number))
    return fine


def _pixels(images: Tensor) -> np.ndarray:
    """(n, 3, H, W) in [0, 1] -> (n, H, W, 3) uint8."""
    return rearrange(images.mul(255).round().to(torch.uint8), "n c h w -> n h w c").numpy(force=True)
