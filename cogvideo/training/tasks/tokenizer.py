"""Training of the image tokenizer, as a task: an autoencoder first, then with codes that follow by running averages."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cogvideo.data.dataset import FrameDataset
from cogvideo.data.loader import FrameLoader
from cogvideo.rng import generator_for
from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from cogvideo.tokenizers.quantise import initialise_codebook, revive_dead_codes, update_codebook
from cogvideo.tokenizers.vqvae import TokenizerLoss, TokenizerLossConfig, VQVAEConfig, tokenizer_loss
from cogvideo.training.config import TokenizerTraining, TrainConfig
from cogvideo.training.deepspeed_engine import autocast
from cogvideo.training.tasks.clips import Outcome

KMEANS_ROWS_PER_CODE = 24


def tokenizer_config(config: TokenizerTraining) -> ImageTokenizerConfig:
    """The image tokenizer that a run's settings describe: one level of the hierarchy, the published structure."""
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
    return ImageTokenizerConfig(network, config.level, config.pixel_mean, config.pixel_std)


class TokenizerObjective(nn.Module):
    """Reconstruction and commitment; keeps what the codebook's update needs of the step's forwards."""

    def __init__(self, tokenizer: ImageTokenizer, config: TrainConfig) -> None:
        super().__init__()
        self.model = tokenizer.model
        self._tokenizer, self._run = tokenizer, config
        self._weights = TokenizerLossConfig(edge=config.tokenizer.edge_weight, commitment=config.tokenizer.commitment)
        self.use_codes = False
        self.done: list[TokenizerLoss] = []

    def forward(self, images: Tensor) -> Outcome:
        level = self._tokenizer.config.level
        with autocast(self._run, images.device):
            step = tokenizer_loss(self.model, self._tokenizer.normalise(images), level, self._weights, self.use_codes)
        if self.training:
            self.done.append(step)
        rows = float(len(images))
        metrics = {("loss" if k == "loss" else f"loss/{k}"): (v * rows, rows) for k, v in step.metrics.items()}
        return Outcome(step.loss, metrics)


class TokenizerTask:
    moving = ("model.quantize.embed.weight",)

    def __init__(self, config: TrainConfig, device: torch.device, rank: int = 0, world: int = 1) -> None:
        if config.train.weights != "fp32" or config.deepspeed.stage > 1:
            raise ValueError("the task tokenizer needs train.weights=fp32 and deepspeed.stage=0 or 1; it is small")
        if config.data.path is None:
            raise ValueError("data.path is not set; give frames that `cogvideo prepare --frames` made")
        self.config, self.device, self.world = config, device, world
        self._loader = FrameLoader(
            FrameDataset(config.data.path), config.train.batch_size, seed=config.train.seed, rank=rank, world=world
        )
        self._validation = None
        if config.data.validation is not None:
            frames = FrameDataset(config.data.validation)
            self._validation = FrameLoader(frames, config.train.batch_size, rank=rank, world=world)
        self.tokenizer = self._make()
        self.tokenizer.model.to(device).train()  # not channels last, as batches are: DeepSpeed broadcasts plain weights
        self.objective = TokenizerObjective(self.tokenizer, config)

    def batches(self, first_step: int) -> Iterator[Tensor]:
        self._set_phase(first_step)
        return self._loader.batches(first_step)

    def validation_batches(self) -> list[Tensor]:
        loader, count = self._validation, self.config.log.validation_batches
        return [] if loader is None else [loader.batch(index) for index in range(count)]

    def sheet_batch(self, rows: int) -> Tensor:
        """A few frames to look at, always the same."""
        return (self._validation or self._loader).batch(0)[:rows]

    def part(self, batch: Tensor, index: int, count: int) -> Tensor:
        return batch[index::count].to(self.device, memory_format=torch.channels_last)

    def tokens(self, batch: Tensor) -> int:
        return len(batch) * (batch.shape[-1] // self.tokenizer.compress_rate) ** 2

    def after_step(self, step: int, good: bool) -> None:
        """Move the codebook after 0-based `step`; where the next step is the first with codes, make it by k-means.

        A step that is not `good` moves nothing.
        """
        own, quantizer = self.config.tokenizer, self.tokenizer.model.quantize
        done, self.objective.done = self.objective.done, []
        features = torch.cat([part.features for part in done])
        ids = [part.ids for part in done if part.ids is not None]
        if ids and good:
            update_codebook(quantizer, features, torch.cat(ids), decay=own.ema_decay)
            reviving = step < own.revive_until * self.config.train.steps
            if reviving and (step + 1) % own.revive_every == 0:
                generator = generator_for(self.config.train.seed, "revive", step)
                revive_dead_codes(quantizer, features, generator, own.revive_below)
        elif not ids and step + 1 == own.continuous_steps:
            generator = generator_for(self.config.train.seed, "codebook")
            initialise_codebook(quantizer, self._features_for_start(step + 1, len(features)), generator)
        self._set_phase(step + 1)

    def flops(self, batch: Tensor) -> float:
        return 0.0  # convolutions are not counted

    def part_of(self, parameter: str) -> str:
        return parameter.split(".")[1]

    def report(self) -> dict[str, float]:
        return {}

    def export(self, folder: Path, step: int) -> Path:
        place = folder / "image_tokenizer"
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            self.tokenizer.save(place, replace=True)
            self.tokenizer.model.train()
        return place

    def _make(self) -> ImageTokenizer:
        if self.config.init.checkpoint is not None:
            return ImageTokenizer.load(self.config.init.checkpoint)
        with torch.random.fork_rng():
            torch.manual_seed(generator_for(self.config.train.seed, "initialise").initial_seed())
            return ImageTokenizer(tokenizer_config(self.config.tokenizer))

    def _set_phase(self, step: int) -> None:
        loaded = self.config.init.checkpoint is not None
        self.objective.use_codes = loaded or step >= self.config.tokenizer.continuous_steps

    @torch.no_grad()
    def _features_for_start(self, step: int, rows_a_step: int) -> Tensor:
        """Encoder outputs of coming batches, enough for k-means."""
        wanted = KMEANS_ROWS_PER_CODE * self.config.tokenizer.num_codes
        parts = []
        for offset in range(math.ceil(wanted / rows_a_step)):
            images = self._loader.batch(step + offset).to(self.device)
            features = self.tokenizer.model.features(self.tokenizer.normalise(images), self.tokenizer.config.level)
            parts.append(features.flatten(2).transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)
