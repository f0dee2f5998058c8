"""Training of super-resolution: the direct model beside a trunk, or the iterative one as a whole.

`superres.method` chooses between them; all that differs is in their configs and batches.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo.checkpoint.format import Checkpoint
from cogvideo.checkpoint.load import stored_config
from cogvideo.checkpoint.parameters import model_kind
from cogvideo.data.dataset import PairDataset
from cogvideo.data.loader import PairLoader
from cogvideo.inference.backends import install_kernels
from cogvideo.model.config import ModelConfig
from cogvideo.planning.counts import superres_training_flops
from cogvideo.superres.batch import SuperresBatch
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.superres.initialise import inherited_values
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.text import normalise
from cogvideo.training.config import TrainConfig, errors_name_key
from cogvideo.training.construction import Values, construct, starting_values
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


class SuperresObjective(nn.Module):
    """Mean negative log-likelihood of the tokens that each frame's round redraws."""

    def __init__(self, model: SuperresTransformer, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self._config, self._has_rounds = config, len(round_masks(model.config)) > 1

    def forward(self, batch: SuperresBatch) -> LossAndMetrics:
        with autocast(self._config, batch.text.device):
            losses = self.model.frame_losses(batch)
        by_frame = losses.detach().double()
        metrics = {"loss": (by_frame.sum(), float(len(by_frame)))}
        if self._has_rounds:
            for number in batch.round.unique().tolist():
                rows = (batch.round == number).nonzero()[:, 0]
                metrics[f"loss/round_{number}"] = (by_frame[rows.to(by_frame.device)].sum(), float(len(rows)))
        return LossAndMetrics(losses.mean(), metrics)


class SuperresTask:
    """The task `superres`: a direct or an iterative model."""

    updated_without_gradient: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig, device: torch.device, rank: int = 0, world_size: int = 1) -> None:
        init = config.init
        self.config, self.device = config, device
        self.text_tokenizer = open_vocabulary(config.data)
        self.model_config = dataclasses.replace(config.superres, vocabulary=self.text_tokenizer.vocabulary)
        if config.data.path is None:
            raise ValueError("data.path is not set; give pairs that `cogvideo prepare ... low_res_pixels=` made")
        with errors_name_key("data.path"):
            pairs = PairDataset(config.data.path)
        with errors_name_key("data.validation"):
            held_out = None if config.data.validation is None else PairDataset(config.data.validation)
        self.tokenizers = check_tokenizers(config, self.text_tokenizer, pairs, held_out)
        self._loader = self._open_loader(pairs, rank, world_size, config.data.weights)
        self._validation = None if held_out is None else self._open_loader(held_out, rank, world_size)
        check_captions(
            config.data,
            self.text_tokenizer,
            sampled_texts(pairs),
            lambda _, caption: self.text_tokenizer.encode(normalise(caption)),
            self.model_config.max_caption_len,
            "raise superres.text_len to read them whole",
            sampling_refuses=False,
        )
        has_extra_part = self.model_config.method == "direct" or config.lora.rank > 0
        if init.freeze_trunk and (init.checkpoint is None or not has_extra_part):
            raise ValueError(
                "init.freeze_trunk=true needs superres.method=direct and a trunk to freeze; set init.checkpoint, or "
                "init.freeze_trunk=false"
            )
        log_plan(config, self.model_config, world_size, device)
        self.model = construct(lambda: SuperresTransformer(self.model_config), config, device, self._starting_values)
        check_codes(pairs)
        self.model.recompute = config.train.resolved_recompute
        install_kernels(self.model, device)
        compile_layers(self.model, config, device)
        self._flops_per_frame = sum(
            superres_training_flops(self.model_config, frozen_trunk=init.freeze_trunk, lora=config.lora.rank > 0)
        )
        self._frozen = None
        if init.freeze_trunk and init.checkpoint is not None and not config.lora.rank:
            self._frozen = FrozenTrunk(init.checkpoint, trunk_config(self.model_config))
        self._base = base_of(config, self.model_config)
        self.objective = SuperresObjective(self.model, config)

    def batches(self, first_step: int) -> Iterator[SuperresBatch]:
        return self._loader.batches(first_step)

    def validation_batches(self) -> list[SuperresBatch]:
        loader, count = self._validation, self.config.log.validation_batches
        return [] if loader is None else [loader.batch(index) for index in range(count)]

    def preview_batch(self, rows: int) -> tuple[SuperresBatch, Tensor]:
        """A few frames for sample sheets, always the same, and their coarse tokens, which not every model reads."""
        loader = self._validation or self._loader
        batch = loader.batch(0)
        _, coarse = loader.dataset.pairs(loader.rows(0)[:rows])
        return batch.select(slice(rows), self.device), torch.from_numpy(coarse)

    def micro_batch(self, batch: SuperresBatch, index: int, count: int) -> SuperresBatch:
        return batch.select(slice(index, None, count), self.device)

    def tokens(self, batch: SuperresBatch) -> int:
        return int(batch.text_mask.sum()) + batch.low_res.numel() + batch.high_res.numel()

    def flops(self, batch: SuperresBatch) -> float:
        return self._flops_per_frame * len(batch.high_res)

    def component_of(self, parameter: str) -> str:
        return component_of(parameter)

    def after_step(self, step: int, is_updated: bool) -> None:
        pass

    def weight_metrics(self) -> dict[str, float]:
        return {}

    def inputs(self) -> dict[str, Any]:
        return self.tokenizers.to_extra()

    def check_resumable(self, saved: Mapping[str, Any]) -> None:
        check_same_tokenizers(self.config, self.tokenizers, saved)

    def report(self) -> None:
        pass

    def export(self, folder: Path, step: int) -> Path:
        if self._base is not None:
            export_adapter(folder / ADAPTER, self.model, self.config.lora, self._base | {"step": step})
            return folder / ADAPTER
        path = folder / model_kind(self.model_config)
        export_model(path, self.model, {"step": step} | self.tokenizers.to_extra(), self._frozen)
        return path

    def _open_loader(
        self, pairs: PairDataset, rank: int, world_size: int, weights: list[float] | None = None
    ) -> PairLoader:
        loop = self.config.train
        return PairLoader(
            pairs,
            self.text_tokenizer,
            self.model_config,
            loop.batch_size,
            seed=loop.seed,
            rank=rank,
            world_size=world_size,
            weights=weights,
        )

    def _starting_values(self, model: SuperresTransformer, folder: Path) -> Values:
        """Start from a checkpoint of the same method, or from the trunk of another model."""
        config = self.model_config

        def loads_all_parameters(checkpoint: Checkpoint) -> bool:
            stored = stored_config(checkpoint)
            return isinstance(stored, SuperresConfig) and stored.method == config.method

        def inherit(checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> Values:
            stored = stored_config(checkpoint)
            if isinstance(stored, ModelConfig):
                side, start = stored.frame_side, stored.frame_position_start + 1
                if (side, start) != (config.low_res_side, config.low_res_position_start):
                    raise ValueError(
                        f"its images are {side}x{side} tokens, the second at position {start}; set "
                        f"superres.low_res_side={side} superres.low_res_position_start={start}"
                    )
            return inherited_values(model, tensors)

        return starting_values(model, folder, loads_all_parameters=loads_all_parameters, inherit=inherit)


def trunk_config(config: SuperresConfig) -> ModelConfig:
    """The text-to-image transformer inside a super-resolution model."""
    first = config.low_res_position_start - 1
    return ModelConfig(
        task="image",
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        text_len=min(config.text_len, first),
        frame_side=config.low_res_side,
        num_frames=1,
        num_positions=config.num_positions,
        frame_position_start=first,
        vocabulary=config.vocabulary,
    )
