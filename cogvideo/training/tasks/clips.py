"""Training of the video transformer: text-to-image trunk, stage 1 or stage 2."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo.checkpoint.format import Checkpoint
from cogvideo.config import to_dict
from cogvideo.data.dataset import ClipDataset, InMemoryClips
from cogvideo.data.loader import ClipLoader, LoaderConfig
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.inference.backends import install_kernels
from cogvideo.model.initialise import inherited_values
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.planning.counts import training_flops
from cogvideo.sequence.batch import TEXT_MULTIPLE, Batch
from cogvideo.text import LANGUAGES
from cogvideo.tokenizers.image import open_image_tokenizer
from cogvideo.training.config import TrainConfig, errors_name_key
from cogvideo.training.construction import Values, construct, starting_values
from cogvideo.training.deepspeed_engine import gathered
from cogvideo.training.export import ADAPTER, FrozenTrunk, base_of, export_adapter, export_model
from cogvideo.training.resources import log_plan
from cogvideo.training.tasks.base import LossAndMetrics, autocast, compile_layers, component_of
from cogvideo.training.tasks.checks import (
    check_captions,
    check_codes,
    check_same_tokenizers,
    check_tokenizers,
    open_vocabulary,
    sampled_texts,
)
from cogvideo.worlds.digits.files import clips_in_memory

EXPORT_NAMES = {"image": "trunk"}
"""Folders in run_dir/export have the names that a bundle of weights uses: the task's, except for the trunk."""


class ClipObjective(nn.Module):
    """Mean negative log-likelihood of the supervised tokens."""

    def __init__(self, model: CogVideoTransformer, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self._config = config

    def forward(self, batch: Batch) -> LossAndMetrics:
        with autocast(self._config, batch.frames.device):
            losses = self.model.token_losses(batch)
        by_frame = losses.detach().mean(2).double()
        clips = float(len(by_frame))
        metrics = {"loss": (by_frame.mean(1).sum(), clips)}
        supervised = self.model.config.layout.supervised_frames
        if len(supervised) > 1:
            for column, frame in enumerate(supervised):
                metrics[f"loss/frame_{frame}"] = (by_frame[:, column].sum(), clips)
        if self.model.config.has_temporal_channel:
            for seconds in batch.seconds.unique().tolist():
                rows = (batch.seconds == seconds).nonzero()[:, 0]
                metrics[f"loss/{seconds:g}s"] = (by_frame[rows.to(by_frame.device)].mean(1).sum(), float(len(rows)))
        for kind, numbers in zip(self._config.log.loss_by, batch.loss_groups.T, strict=True):
            for number in numbers.unique().tolist():
                rows = (numbers == number).nonzero()[:, 0]
                name = f"source_{number}" if kind == "source" else LANGUAGES[number].lower()
                metrics[f"loss/{name}"] = (by_frame[rows.to(by_frame.device)].mean(1).sum(), float(len(rows)))
        return LossAndMetrics(losses.mean(), metrics)


class ClipTask:
    """The tasks `image`, `sequential` and `interpolation`."""

    updated_without_gradient: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        init = config.init
        self.config, self.device = config, device
        self.text_tokenizer = open_vocabulary(config.data)
        vocabulary = self.text_tokenizer.vocabulary
        self.model_config = dataclasses.replace(config.model, task=config.task, vocabulary=vocabulary)  # type: ignore[arg-type]
        clips = self._open_clips("data.path", config.data.path)
        held_out = None
        if config.data.validation is not None:
            held_out = self._open_clips("data.validation", config.data.validation)
        self.tokenizers = check_tokenizers(config, self.text_tokenizer, clips, held_out)
        self._loader = self._open_loader(clips, rank, world_size)
        self._validation = None
        if held_out is not None:
            self._validation = self._open_loader(held_out, rank, world_size, validates=True)
        self._measured = clips if held_out is None else held_out
        check_captions(
            config.data,
            self.text_tokenizer,
            sampled_texts(clips),
            self._loader.full_text,
            self.model_config.text_len,
            f"set model.text_len={{}} (and model.frame_position_start, now {self.model_config.frame_position_start}, "
            "to at least that), or shorten them",
        )
        has_extra_part = self.model_config.has_temporal_channel or config.lora.rank > 0
        if init.freeze_trunk and (init.checkpoint is None or not has_extra_part):
            raise ValueError("init.freeze_trunk=true needs a video task and a trunk to freeze; set init.checkpoint")
        log_plan(config, self.model_config, world_size, device)
        self.model = construct(lambda: CogVideoTransformer(self.model_config), config, device, self._starting_values)
        check_codes(clips)
        self.model.recompute = config.train.resolved_recompute
        install_kernels(self.model, device, config.train.attention)
        compile_layers(self.model, config, device)
        few_shapes = config.train.compile or device.type == "cuda"
        self._text_multiple = config.train.text_multiple or (TEXT_MULTIPLE if few_shapes else 1)
        self._flops_per_clip = sum(
            training_flops(self.model_config, frozen_trunk=init.freeze_trunk, lora=config.lora.rank > 0)
        )
        self._frozen = None
        if init.freeze_trunk and init.checkpoint is not None and not config.lora.rank:
            self._frozen = FrozenTrunk(init.checkpoint, dataclasses.replace(self.model_config, task="image"))
        self._base = base_of(config, self.model_config)
        self.objective = ClipObjective(self.model, config)

    def batches(self, first_step: int) -> Iterator[Batch]:
        return self._loader.batches(first_step)

    def validation_batches(self) -> list[Batch]:
        loader, count = self._validation, self.config.log.validation_batches
        return [] if loader is None else [loader.batch(index) for index in range(count)]

    def preview_batch(self, rows: int) -> Batch:
        """About `rows` clips for sample sheets, always the same, on the host."""
        batch = (self._validation or self._loader).batch(0)
        return self._part(batch, 0, max(1, len(batch.frames) // rows))

    def first_clips(self, count: int) -> Iterator[Batch]:
        """Batches of up to `count` clips of the validation data, or else of the training data, always the same.

        They are on the host, and the same on every rank. No clip is repeated, so there may be fewer than `count`. All
        have their captions, whatever `data.guidance_dropout` is.
        """
        whole = self._validation or self._loader
        settings = dataclasses.replace(whole.config, balance_lengths=False, weights=None, guidance_dropout=0.0)
        loader = ClipLoader(self._measured, self.text_tokenizer, settings)
        left = min(count, loader.num_rows)
        for step in itertools.count():
            if left <= 0:
                return
            batch = loader.batch(step)
            yield self._rows(batch, slice(0, left))
            left -= len(batch.frames)

    def micro_batch(self, batch: Batch, index: int, count: int) -> Batch:
        return self._part(batch, index, count).to(self.device)

    def _part(self, batch: Batch, index: int, count: int) -> Batch:
        return self._rows(batch, slice(index, None, count))

    def _rows(self, batch: Batch, rows: slice) -> Batch:
        chosen = Batch(
            batch.text[rows], batch.text_mask[rows], batch.frames[rows], batch.seconds[rows], batch.loss_groups[rows]
        )
        return chosen.trim_text(self._text_multiple)

    def tokens(self, batch: Batch) -> int:
        return int(batch.text_mask.sum()) + batch.frames.numel()

    def flops(self, batch: Batch) -> float:
        return self._flops_per_clip * len(batch.frames)

    def component_of(self, parameter: str) -> str:
        return component_of(parameter)

    def after_step(self, step: int, is_updated: bool) -> None:
        pass

    def weight_metrics(self) -> dict[str, float]:
        """alpha/layer_i: the weight of the spatial channel in each layer, 0 to 1."""
        named = [(name, p) for name, p in self.model.named_parameters() if name.endswith("mix_logit")]
        with gathered(p for _, p in named):
            alphas = {name.split(".")[1]: p.detach().float().sigmoid().mean() for name, p in named}
            return {f"alpha/layer_{layer}": float(alpha) for layer, alpha in alphas.items()}

    def inputs(self) -> dict[str, Any]:
        return self.tokenizers.to_extra()

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        check_same_tokenizers(self.config, self.tokenizers, saved)

    def report(self) -> None:
        pass

    def export(self, folder: Path, step: int) -> Path:
        """A frozen trunk is written once, beside the model, which refers to it. Adapters are written alone."""
        if self._base is not None:
            export_adapter(folder / ADAPTER, self.model, self.config.lora, self._base | {"step": step})
            return folder / ADAPTER
        path = folder / EXPORT_NAMES.get(self.config.task, self.config.task)
        extra = {"step": step, "prompt": to_dict(self.config.data.prompt)} | self.tokenizers.to_extra()
        export_model(path, self.model, extra, self._frozen)
        return path

    def _open_clips(self, key: str, path: list[Path] | None) -> ClipDataset | InMemoryClips:
        lengths, count = self.config.data.clip_seconds, self.config.data.embedded_clips
        if path is not None:
            with errors_name_key(key):
                return ClipDataset(path, lengths)
        if count is None:
            raise ValueError("data.path is not set; give a folder that `cogvideo prepare` made, or data.embedded_clips")
        with errors_name_key("data.image_tokenizer"):
            tokenizer = open_image_tokenizer(self.config.data.image_tokenizer or BUNDLED_WEIGHTS / "image_tokenizer")
        return clips_in_memory(tokenizer, count, clip_seconds=lengths, num_frames=self.model_config.num_frames)

    def _open_loader(
        self, data: ClipDataset | InMemoryClips, rank: int, world_size: int, *, validates: bool = False
    ) -> ClipLoader:
        """`validates`: keep the caption of every clip, and weight folders by their size."""
        config, model = self.config, self.model_config
        frames = data.num_frames if model.has_temporal_channel else model.num_frames
        if (data.frame_len, frames) != (model.frame_len, model.num_frames):
            raise ValueError(
                f"the data has clips of {data.num_frames} frames of {data.frame_len} tokens, the model expects "
                f"{model.num_frames} of {model.frame_len}; set model.num_frames and model.frame_side"
            )
        settings = LoaderConfig(
            task=model.task,
            batch_size=config.train.batch_size,
            text_len=model.text_len,
            guidance_dropout=0.0 if validates else config.data.guidance_dropout,
            suffix_probability=config.data.suffix_probability,
            balance_lengths=config.data.balance_lengths,
            seed=config.train.seed,
            prompt=config.data.prompt,
            weights=None if validates else config.data.weights,
            loss_by=config.log.loss_by,
        )
        return ClipLoader(data, self.text_tokenizer, settings, rank=rank, world_size=world_size)

    def _starting_values(self, model: CogVideoTransformer, folder: Path) -> Values:
        """Start from all of a checkpoint of this task (init.temporal=copy: of any video task), else from its trunk."""
        temporal = self.config.init.temporal

        def loads_all_parameters(checkpoint: Checkpoint) -> bool:
            same_task = checkpoint.config.get("model", {}).get("task") == self.model_config.task
            if same_task or self.config.lora.rank:  # an adapter is for a model of its base's task
                return same_task
            return temporal == "copy" or not self.model_config.has_temporal_channel

        def inherit(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Values:
            return inherited_values(model, tensors, temporal_init="qkv" if temporal == "qkv" else "qkv_and_dense")

        return starting_values(model, folder, loads_all_parameters=loads_all_parameters, inherit=inherit)
