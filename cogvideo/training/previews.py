"""Sample sheets during training: real data beside what the model makes of it, always from the same random numbers.

Beside the sheet of each step, OVER_TIME compares what the model made of the same data at several steps, row by row.

Sheets show, for the transformer, clips that it generates from the text and the given frames; for super-resolution,
frames as coarse tokens, as fine tokens, and as the model draws them; for the image tokenizer, reconstructions.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.evaluation.packaged_networks import clip_moments, moment_distances
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.inference.engine import Engine, build_program
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import sequential
from cogvideo.media.contact_sheet import contact_sheet, sheets_over_time
from cogvideo.rng import SampleKey, sample_keys, sample_uniforms
from cogvideo.sampling.config import DrawConfig
from cogvideo.sampling.pipeline import FrameSampler
from cogvideo.sampling.prompts import EncodedPrompt
from cogvideo.sampling.superres import draw_fine, redraw, top_k_samplers
from cogvideo.sequence.batch import Batch
from cogvideo.superres.batch import SuperresBatch
from cogvideo.tokenizers.image import ImageTokenizer, open_image_tokenizer
from cogvideo.tokenizers.records import are_different, hash_tokenizer
from cogvideo.training.config import errors_name_key
from cogvideo.training.tasks.base import Task
from cogvideo.training.tasks.clips import ClipTask
from cogvideo.training.tasks.superres import SuperresTask
from cogvideo.training.tasks.tokenizer import TokenizerTask

ROWS, SCALE = 8, 3
OVER_TIME = "over_time.png"
DRAW = DrawConfig(temperature=1.0, token_temperature=1.0, top_k_clusters=16, text_bonus=0.0)
"""Plain top-k without guidance: shows what the model has learned, not its best-looking samples."""


class PreviewWriter:
    """Writes a sample sheet for a task at some step."""

    def __init__(self, image_tokenizer: Path | None, high_res_tokenizer: Path | None = None) -> None:
        """Open the given folders at once, so that a bad one fails before training.

        `image_tokenizer`: None is the bundled one. `high_res_tokenizer` decodes super-resolution's large frames; None:
        `image_tokenizer` does.
        Raises: ValueError as `ImageTokenizer.load`, naming the config key.
        """
        self._path = image_tokenizer or BUNDLED_WEIGHTS / "image_tokenizer"
        self._high_res_path = high_res_tokenizer or self._path
        if image_tokenizer is not None:
            with errors_name_key("data.image_tokenizer"):
                _ = self._tokenizer
        if high_res_tokenizer is not None:
            with errors_name_key("data.high_res_tokenizer"):
                _ = self._high_res_tokenizer

    @cached_property
    def _tokenizer(self) -> ImageTokenizer:
        return open_image_tokenizer(self._path)

    @cached_property
    def _high_res_tokenizer(self) -> ImageTokenizer:
        return self._tokenizer if self._high_res_path == self._path else open_image_tokenizer(self._high_res_path)

    @torch.no_grad()
    def distances(self, task: ClipTask, networks: Mapping[str, FeatureNetwork], count: int) -> dict[str, float]:
        """Distances between up to `count` generated clips and the real ones that they start from, and their floors.

        Real clips are decoded from tokens too, so the image tokenizer has no share in the distances. A floor is the
        distance between two halves of the real clips; it is of fewer clips, and therefore higher than with as many.
        """
        self._check_decoder(task)
        real: list[NDArray[np.uint8]] = []
        generated: list[NDArray[np.uint8]] = []
        for batch in task.first_clips(count):
            for clips, tokens in zip((real, generated), _generate_clips(task, batch)[:2], strict=True):
                clips += [self._decode(clip) for clip in tokens]
        half = len(real) // 2
        parts = (real, generated, real[:half], real[half : 2 * half])
        of_real, of_generated, left, right = (clip_moments(networks, np.stack(part), ROWS) for part in parts)
        floors = {f"{name}_floor": value for name, value in moment_distances(left, right).items()}
        return moment_distances(of_real, of_generated) | floors

    @torch.no_grad()
    def write(self, task: Task[Any], step: int, folder: Path) -> Path:
        """Write the sheet after `step` steps and, if there are earlier ones, OVER_TIME; returns the sheet's path."""
        path = folder / f"step_{step:08d}.png"
        self._write_sheet(task, step, path)
        sheets = sorted(other for other in folder.glob("step_*.png") if other.name <= path.name)
        sheets_over_time(folder / OVER_TIME, sheets)
        return path

    def _write_sheet(self, task: Task[Any], step: int, path: Path) -> None:
        if isinstance(task, TokenizerTask):
            images = task.preview_batch(4 * ROWS).to(task.device)
            side = images.shape[2] // task.tokenizer.compress_rate
            rebuilt = task.tokenizer.decode(task.tokenizer.encode(images), side)
            pairs = zip(images.split(ROWS), rebuilt.split(ROWS), strict=True)
            rows = [_pixels(part) for pair in pairs for part in pair]
            contact_sheet(path, rows, ["original", f"step {step}"] * (len(rows) // 2), scale=SCALE)
        elif isinstance(task, ClipTask):
            self._check_decoder(task)
            real, generated, captions = _generate_clips(task, task.preview_batch(ROWS))
            rows = [self._decode(clip) for pair in zip(real, generated, strict=True) for clip in pair]
            labels = [text for caption in captions for text in (f"real: {caption}", f"step {step}")]
            contact_sheet(path, rows, labels, scale=SCALE)
        elif isinstance(task, SuperresTask):
            self._check_decoder(task)
            batch, coarse = task.preview_batch(ROWS)
            large = (batch.high_res, _draw_fine_tokens(task, batch))
            rows = [self._decode(coarse), *(_pixels(self._high_res_tokenizer.decode(frames)) for frames in large)]
            contact_sheet(path, rows, ["coarse", "fine", f"step {step}"], scale=1)

    def _check_decoder(self, task: ClipTask | SuperresTask) -> None:
        records = task.tokenizers
        if are_different(records.image, hash_tokenizer(self._path)):
            raise ValueError("data.image_tokenizer did not make these tokens; set it to the one that did")
        if isinstance(task, SuperresTask) and are_different(
            records.high_res or records.image, hash_tokenizer(self._high_res_path)
        ):
            raise ValueError(
                "data.high_res_tokenizer did not make the tokens of large frames; set it to the one that did"
            )

    def _decode(self, frames: Tensor) -> NDArray[np.uint8]:
        return _pixels(self._tokenizer.decode(frames))


def _generate_clips(task: ClipTask, batch: Batch) -> tuple[Tensor, Tensor, list[str]]:
    """Real and generated tokens of a batch, each (clips, frames, frame_len), and captions."""
    model = task.model
    texts = [row[mask].tolist() for row, mask in zip(batch.text, batch.text_mask, strict=True)]
    captions = [" ".join(task.text_tokenizer.decode(text).split()) for text in texts]
    layout, codes = model.config.layout, model.config.vocabulary.num_image_tokens
    program = build_program(
        model.config,
        sequential(layout, layout.given_frames, layout.generation_order),
        temporal=model.config.has_temporal_channel,
        joined=model.is_joined,
    )
    draw = ClusterSampler(np.arange(codes), DRAW.temperature, DRAW.top_k_clusters, DRAW.token_temperature)
    sampler = FrameSampler(Engine(model), program.to(task.device), draw.to(task.device), DRAW)
    prompts = [EncodedPrompt(text, None) for text in texts]
    known = batch.frames.clone()
    known[:, list(layout.supervised_frames)] = 0
    uniforms = sample_uniforms(sample_keys(0, captions), 0, range(layout.num_frames), layout.frame_len)
    return batch.frames, sampler.sample(known, prompts, uniforms, clips_at_once=ROWS), captions


def _draw_fine_tokens(task: SuperresTask, batch: SuperresBatch) -> Tensor:
    """Fine tokens: drawn from coarse ones by the direct model, or real ones redrawn by the iterative model's rounds."""
    model, texts = task.model, (batch.text, batch.text_mask)
    codes, (num_frames, frame_len) = model.config.vocabulary.num_image_tokens, batch.high_res.shape

    def uniforms(round_number: int) -> Tensor:
        return sample_uniforms([SampleKey(0, "", 0)], round_number, range(num_frames), frame_len)[0].to(task.device)

    if model.config.method == "direct":
        draw = ClusterSampler(np.arange(codes), DRAW.temperature, DRAW.top_k_clusters, DRAW.token_temperature)
        return draw_fine(model, *texts, batch.low_res, draw.to(task.device), uniforms(0))
    fine = batch.high_res
    for number, token_sampler in enumerate(top_k_samplers(codes, task.device), 1):
        fine = redraw(model, *texts, fine, number, token_sampler, uniforms(number))
    return fine


def _pixels(images: Tensor) -> NDArray[np.uint8]:
    """(n, 3, H, W) in [0, 1] -> (n, H, W, 3) uint8."""
    return rearrange(images.mul(255).round().to(torch.uint8), "n c h w -> n h w c").numpy(force=True)
