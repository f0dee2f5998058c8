"""Training of the image tokenizer: first as a plain autoencoder, then with a codebook updated by moving averages."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cogvideo.config import to_dict
from cogvideo.data.dataset import FrameDataset
from cogvideo.data.loader import FrameLoader
from cogvideo.data.statistics import CodeUse, spread
from cogvideo.logs import get_logger
from cogvideo.rng import generator_for
from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from cogvideo.tokenizers.quantise import (
    TokenizerLoss,
    TokenizerLossConfig,
    initialise_codebook,
    revive_dead_codes,
    tokenizer_loss,
    update_codebook,
)
from cogvideo.tokenizers.vqvae import VQVAE, VQVAEConfig
from cogvideo.training.config import TokenizerTraining, TrainConfig, errors_name_key
from cogvideo.training.tasks.base import LossAndMetrics, autocast

log = get_logger(__name__)

KMEANS_ROWS_PER_CODE = 24
"""Number of encoder outputs per code on which k-means runs."""
MEASURED_FRAMES = 512
"""Frames, evenly spaced, on which pixels and codes are counted."""
MIN_STD = 0.01
"""Lower bound of the pixels' standard deviation, for data of a single colour."""
CODEBOOK = ("quantize.embed.weight", "quantize.embed_avg", "quantize.cluster_size")
PIXELS = ("pixel_mean", "pixel_std")
PIXEL_TOLERANCE = 2e-5
"""Tolerance between two measurements of the same pixels, which are rounded to 1e-5."""
Channels = tuple[float, float, float]


def tokenizer_config(config: TokenizerTraining, frames: NDArray[np.uint8]) -> ImageTokenizerConfig:
    """The published structure with one level of the hierarchy, in the sizes that a run's settings give.

    `frames` (n, H, W, 3): the data on which the normalisation of pixels is measured where the settings leave it out.
    """
    network = VQVAEConfig(
        channels=config.channels,
        channel_multipliers=tuple(config.channel_multipliers),
        encoder_num_res_blocks=config.encoder_num_res_blocks,
        decoder_num_res_blocks=config.decoder_num_res_blocks,
        z_channels=config.z_channels,
        embedding_dim=config.embedding_dim,
        num_codes=config.num_codes,
        levels=(config.level,),
        norm_groups=config.norm_groups,
        norm_scope=config.norm_scope,
        mid_attention=config.mid_attention,
    )
    mean, std = measure_pixels(frames)
    return ImageTokenizerConfig(network, config.level, config.pixel_mean or mean, config.pixel_std or std)


def measure_pixels(frames: NDArray[np.uint8]) -> tuple[Channels, Channels]:
    """Mean and standard deviation of pixels in [0, 1] per channel, the latter at least MIN_STD; frames (n, H, W, 3)."""
    sums = np.zeros((2, 3))
    for frame in frames:
        pixels = frame.reshape(-1, 3) / 255
        sums += pixels.sum(0), np.square(pixels).sum(0)
    mean, square = sums / (frames.size / 3)
    std = np.sqrt(np.maximum(square - mean**2, MIN_STD**2))
    red, green, blue = mean.round(5).tolist()
    return (red, green, blue), tuple(std.round(5).tolist())


def initial_tokenizer(checkpoint: Path, config: TokenizerTraining) -> ImageTokenizer:
    """A trained tokenizer to train further, with the norms and the size of the codebook that the settings ask for.

    Raises: as `ImageTokenizer.load`; ValueError for settings that differ from the checkpoint's network.
    """
    tokenizer = ImageTokenizer.load(checkpoint)
    trained, asked, default = tokenizer.config, to_dict(config), to_dict(TokenizerTraining())
    has = to_dict(trained) | to_dict(trained.vqvae)
    for name in sorted(has.keys() & asked.keys() - {"norm_scope"}):
        if config.new_codebook and name == "num_codes":
            continue
        if asked[name] not in (has[name], default[name]):
            raise ValueError(
                f"tokenizer.{name}={asked[name]} differs from {has[name]} of init.checkpoint={checkpoint}; leave it out"
            )
    num_codes = config.num_codes if config.new_codebook else tokenizer.num_tokens
    norm_scope = "pixel" if config.norm_scope == "pixel" else trained.vqvae.norm_scope
    network = replace(trained.vqvae, num_codes=num_codes, norm_scope=norm_scope)
    if network == trained.vqvae:
        return tokenizer
    state = tokenizer.model.state_dict()
    if config.new_codebook:
        state |= {name: state[name].new_zeros((num_codes, *state[name].shape[1:])) for name in CODEBOOK}
    with torch.device("meta"):
        model = VQVAE(network)
    model.load_state_dict(state, assign=True)
    return ImageTokenizer(replace(trained, vqvae=network), model)


def has_codebook(config: TrainConfig) -> bool:
    """Whether a run starts with a codebook."""
    return config.init.checkpoint is not None and not config.tokenizer.new_codebook


def check_steps(config: TrainConfig) -> None:
    """Warn if a new codebook is used for fewer steps than continuous_steps.

    Raises: ValueError if it would never be used, or if new_codebook is set without init.checkpoint.
    """
    steps, continuous = config.train.steps, config.tokenizer.continuous_steps
    if config.tokenizer.new_codebook and config.init.checkpoint is None:
        raise ValueError(
            "tokenizer.new_codebook=true replaces the codebook of init.checkpoint; set that too, or leave it out"
        )
    if has_codebook(config):
        return
    if steps <= continuous:
        raise ValueError(
            f"train.steps={steps} ends before the codebook is made at tokenizer.continuous_steps={continuous}; raise "
            "train.steps, or lower tokenizer.continuous_steps to a tenth of it"
        )
    if steps < 2 * continuous:
        log.warning(
            "train.steps=%d leaves the codebook fewer steps than tokenizer.continuous_steps=%d; raise the former or "
            "lower the latter",
            *(steps, continuous),
        )


class TokenizerObjective(nn.Module):
    """Reconstruction and commitment losses; collects what the codebook update needs from a step's forward passes."""

    def __init__(self, tokenizer: ImageTokenizer, config: TrainConfig) -> None:
        super().__init__()
        self.model = tokenizer.model
        self._tokenizer, self._config = tokenizer, config
        own = config.tokenizer
        self._weights = TokenizerLossConfig(
            edge=own.edge_weight, commitment=own.commitment, relative_commitment=own.relative_commitment
        )
        self.use_codes = False
        self.forwards: list[TokenizerLoss] = []

    def forward(self, images: Tensor) -> LossAndMetrics:
        level = self._tokenizer.config.level
        with autocast(self._config, images.device):
            result = tokenizer_loss(self.model, self._tokenizer.normalise(images), level, self._weights, self.use_codes)
        if self.training:
            self.forwards.append(result)
        rows = float(len(images))
        names = {name: "loss" if name == "loss" else f"loss/{name}" for name in result.metrics}
        metrics = {names[name]: (value.double() * rows, rows) for name, value in result.metrics.items()}
        return LossAndMetrics(result.loss, metrics)


class TokenizerTask:
    """The task `tokenizer`."""

    updated_without_gradient = ("model.quantize.embed.weight",)

    def __init__(self, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        if config.train.weights != "fp32" or config.deepspeed.stage > 1:
            raise ValueError("task=tokenizer needs train.weights=fp32 and deepspeed.stage=0 or 1; set both")
        if config.data.path is None:
            raise ValueError("data.path is not set; give frames that `cogvideo prepare --frames` made")
        check_steps(config)
        self.config, self.device, self.world_size = config, device, world_size
        with errors_name_key("data.path"):
            frames = FrameDataset(config.data.path)
        self._sample = frames.frames(spread(len(frames), MEASURED_FRAMES))
        self._loader = FrameLoader(
            frames,
            config.train.batch_size,
            seed=config.train.seed,
            rank=rank,
            world_size=world_size,
            weights=config.data.weights,
        )
        self._validation = held_out = None
        if config.data.validation is not None:
            with errors_name_key("data.validation"):
                held_out = FrameDataset(config.data.validation)
            self._validation = FrameLoader(held_out, config.train.batch_size, rank=rank, world_size=world_size)
        self.tokenizer = self._make_tokenizer()
        self._check_sides("data.path", self._sample)
        if held_out is not None:
            self._check_sides("data.validation", held_out.frames([0]))
        # contiguous, though batches are channels last: DeepSpeed's broadcast needs it
        self.tokenizer.model.to(device).train()
        self.objective = TokenizerObjective(self.tokenizer, config)

    def batches(self, first_step: int) -> Iterator[Tensor]:
        self._set_phase(first_step)
        return self._loader.batches(first_step)

    def validation_batches(self) -> list[Tensor]:
        loader, count = self._validation, self.config.log.validation_batches
        return [] if loader is None else [loader.batch(index) for index in range(count)]

    def preview_batch(self, rows: int) -> Tensor:
        """A few frames for sample sheets, always the same."""
        return (self._validation or self._loader).batch(0)[:rows]

    def micro_batch(self, batch: Tensor, index: int, count: int) -> Tensor:
        return batch[index::count].to(self.device, memory_format=torch.channels_last)

    def tokens(self, batch: Tensor) -> int:
        return len(batch) * (batch.shape[-1] // self.tokenizer.compress_rate) ** 2

    def after_step(self, step: int, is_updated: bool) -> None:
        """Update the codebook after 0-based `step`, or create it by k-means if the next step is the first with codes.

        A step that was skipped (not `is_updated`) updates nothing.
        """
        own, quantizer = self.config.tokenizer, self.tokenizer.model.quantize
        forwards, self.objective.forwards = self.objective.forwards, []
        features = torch.cat([forward.features for forward in forwards])
        ids = [forward.ids for forward in forwards if forward.ids is not None]
        if ids and is_updated:
            update_codebook(quantizer, features, torch.cat(ids), decay=own.ema_decay)
            reviving = step < own.revive_until * self.config.train.steps
            if reviving and (step + 1) % own.revive_every == 0:
                generator = generator_for(self.config.train.seed, "revive", step)
                revive_dead_codes(quantizer, features, generator, own.revive_below)
        elif not ids and step + 1 == own.continuous_steps:
            generator = generator_for(self.config.train.seed, "codebook")
            initialise_codebook(quantizer, self._kmeans_features(step + 1, len(features)), generator)
        self._set_phase(step + 1)

    def flops(self, batch: Tensor) -> float:
        return 0.0  # unknown: convolutions are not counted

    def component_of(self, parameter: str) -> str:
        return parameter.split(".")[1]

    def weight_metrics(self) -> dict[str, float]:
        return {}

    def inputs(self) -> dict[str, Any]:
        return {name: list(getattr(self.tokenizer.config, name)) for name in PIXELS}

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        run_dir, stored = self.config.run_dir, saved.get("inputs", {})
        now = self.inputs()
        if any(
            not np.allclose(stored.get(name, now[name]), now[name], rtol=0, atol=PIXEL_TOLERANCE) for name in PIXELS
        ):
            was, found = (
                " ".join(f"tokenizer.{name}=[{','.join(map(str, values[name]))}]" for name in PIXELS)
                for values in (now | stored, now)
            )
            raise ValueError(
                f"{run_dir} was trained with pixel normalization {was}, but this run has {found}; resume it with the "
                "data or settings that it started with, or set the former values"
            )
        step, before = saved["step"], saved["config"].get("tokenizer", {})
        continuous, old = self.config.tokenizer.continuous_steps, before.get("continuous_steps", 0)
        if not has_codebook(self.config) and continuous <= step < old:
            raise ValueError(
                f"{run_dir} has no codebook yet at step {step}, and tokenizer.continuous_steps={continuous} (it was "
                f"{old}) makes it before that; give more than {step}"
            )

    def report(self) -> None:
        """Log how many codes the frames use."""
        if not self.objective.use_codes:
            log.warning(
                "the run ended before the codebook is made at tokenizer.continuous_steps=%d; --resume it, since the "
                "export is of no use yet",
                self.config.tokenizer.continuous_steps,
            )
            return
        images = torch.from_numpy(self._sample).movedim(3, 1).float() / 255
        use = CodeUse.count(self.tokenizer.encode(images).numpy(force=True), self.tokenizer.num_tokens)
        if use.is_low:
            log.warning(
                "%s: frames that differ may look alike; see the reconstructions in previews/, train for more "
                "train.steps, or lower tokenizer.num_codes",
                use,
            )
        else:
            log.info("%s", use)

    def export(self, folder: Path, step: int) -> Path:
        path = folder / "image_tokenizer"
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(path, replace=True)
            self.tokenizer.model.train()
        return path

    def _make_tokenizer(self) -> ImageTokenizer:
        if self.config.init.checkpoint is not None:
            with errors_name_key("init.checkpoint"):
                return initial_tokenizer(self.config.init.checkpoint, self.config.tokenizer)
        with torch.random.fork_rng():
            torch.manual_seed(generator_for(self.config.train.seed, "initialise").initial_seed())
            return ImageTokenizer(tokenizer_config(self.config.tokenizer, self._sample))

    def _check_sides(self, key: str, frames: NDArray[np.uint8]) -> None:
        """Raises: ValueError if the frames (n, H, W, 3) of a folder do not divide into tokens."""
        sides, rate = frames.shape[1:3], self.tokenizer.compress_rate
        if any(side % rate for side in sides):
            raise ValueError(
                f"the frames of {key} have {sides[1]}x{sides[0]} pixels, not a multiple of the compress rate {rate}; "
                "prepare them with such frame_pixels, or set tokenizer.level"
            )

    def _set_phase(self, step: int) -> None:
        self.objective.use_codes = has_codebook(self.config) or step >= self.config.tokenizer.continuous_steps

    @torch.no_grad()
    def _kmeans_features(self, step: int, rows_per_step: int) -> Tensor:
        """Encoder outputs of the batches from `step` on, enough for k-means: (rows, embedding_dim)."""
        num_rows = KMEANS_ROWS_PER_CODE * self.config.tokenizer.num_codes
        parts = []
        for offset in range(math.ceil(num_rows / rows_per_step)):
            images = self._loader.batch(step + offset).to(self.device)
            features = self.tokenizer.model.features(self.tokenizer.normalise(images), self.tokenizer.config.level)
            parts.append(features.flatten(2).transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)
