"""What a task is to the trainer: an objective, its batches, and what is kept of it. The loop asks no task's name.

`ClipTask` is the transformer in each of its roles; `superres_task.py` and `tokenizer_task.py` have the others.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.config import to_dict
from cogvideo.data.dataset import ClipDataset
from cogvideo.data.loader import ClipLoader, LoaderConfig
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.model.initialise import inherit_trunk, initialise
from cogvideo.model.transformer import CogVideoTransformer, is_temporal
from cogvideo.planning.budgets import training_flops
from cogvideo.rng import generator_for
from cogvideo.sequence.batch import Batch
from cogvideo.tokenizers.image import open_image_tokenizer
from cogvideo.tokenizers.text import open_text_tokenizer
from cogvideo.training.config import TrainConfig
from cogvideo.training.deepspeed_engine import autocast, gathered
from cogvideo.training.export import FrozenTrunk, export_model
from cogvideo.training.memory import tell_memory
from cogvideo.worlds.digits.embedded import EmbeddedClips

B = TypeVar("B")
EXPORT_NAMES = {"image": "trunk"}
"""Folders of run_dir/export are named as in a bundle of weights: by task, but for the trunk."""
PARTS = (
    ("embeddings", "embeddings"),
    ("layernorm", "layernorm"),
    ("mix_logit", "mix"),
    ("temporal_attention", "temporal"),
    ("high_res_attention", "high_res"),
    ("attention", "spatial"),
    ("mlp", "mlp"),
)
"""Part of a parameter by the first of these words in its name."""


class Outcome(NamedTuple):
    """One forward; a tuple, since DeepSpeed looks for tensors in what a module returns."""

    loss: Tensor
    """Scalar with a gradient."""
    metrics: Mapping[str, tuple[float, float]]
    """(sum, weight) by name."""


class Task(Protocol, Generic[B]):
    """All that the trainer knows of what it trains."""

    @property
    def objective(self) -> nn.Module:
        """forward(batch) -> Outcome."""

    def batches(self, first_step: int) -> Iterator[B]:
        """This process's part of every step's batch from `first_step` on."""

    def validation_batches(self) -> list[B]:
        """Fixed batches never learned from; empty: none were given."""

    def part(self, batch: B, index: int, count: int) -> B:
        """Every `count`-th row from `index` on, ready on the device."""

    def tokens(self, batch: B) -> int:
        """Tokens (of text and frames) in a batch."""

    def flops(self, batch: B) -> float:
        """Of the model's forward and backward over a batch, nothing recomputed; 0: not known."""

    def part_of(self, parameter: str) -> str:
        """The part of the model that a parameter of `objective` counts to, in gradient norms."""

    def after_step(self, step: int, good: bool) -> None:
        """What is updated without a gradient; nothing of a step that is not `good`, whose numbers are not finite."""

    def report(self) -> dict[str, float]:
        """Numbers of the weights themselves, for the log."""

    @property
    def moving(self) -> tuple[str, ...]:
        """Parameters of `objective` that change without a gradient."""

    def export(self, folder: Path, step: int) -> Path:
        """Write the model into `folder` in our own format; returns its place."""


class ClipObjective(nn.Module):
    """Mean negative log-likelihood of the supervised tokens."""

    def __init__(self, model: CogVideoTransformer, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self._run = config

    def forward(self, batch: Batch) -> Outcome:
        with autocast(self._run, batch.frames.device):
            losses = self.model.token_losses(batch)
        by_frame = losses.detach().mean(2).cpu().double()
        rows = len(by_frame)
        metrics = {"loss": (float(by_frame.mean(1).sum()), float(rows))}
        supervised = self.model.config.layout.supervised_frames
        if len(supervised) > 1:
            for column, frame in enumerate(supervised):
                metrics[f"loss/frame_{frame}"] = (float(by_frame[:, column].sum()), float(rows))
        if self.model.config.has_temporal_channel:
            for seconds in batch.seconds.unique().tolist():
                chosen = by_frame[batch.seconds.cpu() == seconds].mean(1)
                metrics[f"loss/{seconds:g}s"] = (float(chosen.sum()), float(len(chosen)))
        return Outcome(losses.mean(), metrics)


class ClipTask:
    """The transformer: text-to-image trunk, stage 1 or stage 2."""

    moving: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.config, self.device = config, device
        self.text_tokenizer = open_text_tokenizer(config.data.text_tokenizer or BUNDLED_WEIGHTS / "text.model")
        vocabulary = self.text_tokenizer.vocabulary
        self.model_config = dataclasses.replace(config.model, task=config.task, vocabulary=vocabulary)  # type: ignore[arg-type]
        self._loader = self._load(self._open(config.data.path), rank, world)
        self._validation = None
        if config.data.validation is not None:
            self._validation = self._load(self._open(config.data.validation), rank, world)
        self.model = CogVideoTransformer(self.model_config)
        self.model.recompute = config.train.recompute
        self._start_weights()
        tell_memory(config, self.model_config, world, device)
        self._clip_flops = sum(training_flops(self.model_config, frozen_trunk=config.init.freeze_trunk))
        self.objective = ClipObjective(self.model.to(device), config)

    def batches(self, first_step: int) -> Iterator[Batch]:
        return self._loader.batches(first_step)

    def validation_batches(self) -> list[Batch]:
        loader, count = self._validation, self.config.log.validation_batches
        return [] if loader is None else [loader.batch(index) for index in range(count)]

    def sheet_batch(self, rows: int) -> Batch:
        """A few clips to look at, always the same."""
        batch = (self._validation or self._loader).batch(0)
        return self.part(batch, 0, max(1, len(batch.frames) // rows))

    def part(self, batch: Batch, index: int, count: int) -> Batch:
        rows = slice(index, None, count)
        chosen = Batch(batch.text[rows], batch.text_mask[rows], batch.frames[rows], batch.seconds[rows])
        return chosen.trim_text().to(self.device)

    def tokens(self, batch: Batch) -> int:
        return int(batch.text_mask.sum()) + batch.frames.numel()

    def flops(self, batch: Batch) -> float:
        return self._clip_flops * len(batch.frames)

    def part_of(self, parameter: str) -> str:
        """`embeddings`, `spatial`, `temporal` (attention), `mlp`, `layernorm` or `mix`."""
        return next(part for word, part in PARTS if word in parameter)

    def after_step(self, step: int, good: bool) -> None:
        pass

    def report(self) -> dict[str, float]:
        """alpha/layer_i: how much of each layer is the spatial channel, 0 to 1."""
        named = [(name, p) for name, p in self.model.named_parameters() if name.endswith("mix_logit")]
        with gathered(p for _, p in named):
            alphas = {name.split(".")[1]: p.detach().float().sigmoid().mean() for name, p in named}
            return {f"alpha/layer_{layer}": float(alpha) for layer, alpha in alphas.items()}

    def export(self, folder: Path, step: int) -> Path:
        """A frozen trunk is written once, beside the model, which points to it."""
        place = folder / EXPORT_NAMES.get(self.config.task, self.config.task)
        extra = {"step": step, "prompt": to_dict(self.config.data.prompt)}
        frozen, init = None, self.config.init
        if init.freeze_trunk:
            assert init.checkpoint is not None, "a trunk is frozen only where it comes from a checkpoint"
            frozen = FrozenTrunk(init.checkpoint, dataclasses.replace(self.model_config, task="image"))
        export_model(place, self.model, extra, frozen)
        return place

    def _open(self, path: list[Path] | None) -> ClipDataset | EmbeddedClips:
        lengths, count = self.config.data.clip_seconds, self.config.data.embedded_clips
        if path is not None:
            return ClipDataset(path, lengths)
        if count is None:
            raise ValueError("data.path is not set; give a folder that `cogvideo prepare` made, or data.embedded_clips")
        tokenizer = open_image_tokenizer(self.config.data.image_tokenizer or BUNDLED_WEIGHTS / "image_tokenizer")
        return EmbeddedClips(tokenizer, count, clip_seconds=lengths, num_frames=self.model_config.num_frames)

    def _load(self, data: ClipDataset | EmbeddedClips, rank: int, world: int) -> ClipLoader:
        config, model = self.config, self.model_config
        frames = data.num_frames if model.has_temporal_channel else model.num_frames
        if (data.frame_len, frames) != (model.frame_len, model.num_frames):
            raise ValueError(
                f"the data holds clips of {data.num_frames} frames of {data.frame_len} tokens, the model reads "
                f"{model.num_frames} of {model.frame_len}; set model.num_frames and model.frame_side"
            )
        settings = LoaderConfig(
            task=model.task,
            batch_size=config.train.batch_size,
            text_len=model.text_len,
            guidance_dropout=config.data.guidance_dropout,
            suffix_probability=config.data.suffix_probability,
            balance_lengths=config.data.balance_lengths,
            seed=config.train.seed,
            prompt=config.data.prompt,
        )
        return ClipLoader(data, self.text_tokenizer, settings, rank=rank, world=world)

    def _start_weights(self) -> None:
        init = self.config.init
        if init.freeze_trunk and (init.checkpoint is None or not self.model_config.has_temporal_channel):
            raise ValueError("init.freeze_trunk=true needs a video task and a trunk to freeze; set init.checkpoint")
        initialise(self.model, generator_for(self.config.train.seed, "initialise"), mix_logit=init.mix_logit)
        if init.checkpoint is not None:
            start_from(self.model, init.checkpoint, init.temporal)
        if init.freeze_trunk:
            self.model.freeze_trunk()
        if init.trunk_weights == "int8":
            self.model.narrow_trunk()


@torch.no_grad()
def start_from(model: CogVideoTransformer, folder: Path, temporal: str) -> None:
    """Take weights of one of our checkpoints: all of them if it is of the model's task, else the trunk.

    Raises: ValueError, FileNotFoundError in one line, if it is damaged or does not fit.
    """
    checkpoint = load_checkpoint(folder)
    stored = checkpoint.config.get("model", {})
    tensors = checkpoint.tensors()
    named = dict(model.named_parameters())
    if model.config.has_temporal_channel:
        try:
            inherit_trunk(model, tensors, temporal_init="qkv" if temporal == "qkv" else "qkv_and_dense")
        except ValueError as error:
            raise ValueError(f"{folder} does not fit the model: {error}") from None
        if stored.get("task") != model.config.task and temporal != "copy":
            return
        named = {name: p for name, p in named.items() if is_temporal(name)}
    take(named, tensors, folder)


def take(named: Mapping[str, Tensor], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Set parameters to the tensors of their names. Raises: ValueError, about `folder`, if one does not fit."""
    for name, p in named.items():
        if name not in tensors or tensors[name].shape != p.shape:
            got = f"shape {tuple(tensors[name].shape)}" if name in tensors else "no such tensor"
            raise ValueError(
                f"{folder} does not fit the model: {name} should have shape {tuple(p.shape)}, it has {got}; "
                "use equal sizes, vocabularies and num_frames"
            )
    for name, p in named.items():
        p.copy_(tensors[name])
