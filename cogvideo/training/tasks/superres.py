"""Training of super-resolution, as a task: the direct model beside a trunk, or the iterative one whole.

Which of the two it is, `superres.method` says; what they differ in is their config's and their batches' business.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import stored_config
from cogvideo.checkpoint.parameters import model_kind
from cogvideo.data.dataset import PairDataset
from cogvideo.data.pairs import PairLoader
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import initialise
from cogvideo.planning.budgets import superres_training_flops
from cogvideo.rng import generator_for
from cogvideo.superres.batch import SuperresBatch
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import round_masks
from cogvideo.superres.initialise import inherit_trunk
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.tokenizers.text import open_text_tokenizer
from cogvideo.training.config import TrainConfig
from cogvideo.training.deepspeed_engine import autocast
from cogvideo.training.export import FrozenTrunk, export_model
from cogvideo.training.tasks.clips import PARTS, Outcome, take


class SuperresObjective(nn.Module):
    """Mean negative log-likelihood of the tokens that each frame's round asks for."""

    def __init__(self, model: SuperresTransformer, config: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self._run, self._has_rounds = config, len(round_masks(model.config)) > 1

    def forward(self, batch: SuperresBatch) -> Outcome:
        with autocast(self._run, batch.text.device):
            losses = self.model.frame_losses(batch)
        by_frame, rounds = losses.detach().cpu().double(), batch.round.cpu()
        metrics = {"loss": (float(by_frame.sum()), float(len(by_frame)))}
        if self._has_rounds:
            for number in rounds.unique().tolist():
                chosen = by_frame[rounds == number]
                metrics[f"loss/round_{number}"] = (float(chosen.sum()), float(len(chosen)))
        return Outcome(losses.mean(), metrics)


class SuperresTask:
    """A super-resolution model, direct or iterative."""

    moving: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.config, self.device = config, device
        self.text_tokenizer = open_text_tokenizer(config.data.text_tokenizer or BUNDLED_WEIGHTS / "text.model")
        self.model_config = dataclasses.replace(config.superres, vocabulary=self.text_tokenizer.vocabulary)
        if config.data.path is None:
            raise ValueError("data.path is not set; give pairs that `cogvideo prepare ... low_res_pixels=` made")
        self._loader = self._load(config.data.path, rank, world)
        self._validation = None
        if config.data.validation is not None:
            self._validation = self._load(config.data.validation, rank, world)
        self.model = SuperresTransformer(self.model_config)
        self.model.recompute = config.train.recompute
        self._start_weights()
        self._frame_flops = superres_training_flops(self.model_config, frozen_trunk=config.init.freeze_trunk)
        self.objective = SuperresObjective(self.model.to(device), config)

    def batches(self, first_step: int) -> Iterator[SuperresBatch]:
        return self._loader.batches(first_step)

    def validation_batches(self) -> list[SuperresBatch]:
        loader, count = self._validation, self.config.log.validation_batches
        return [] if loader is None else [loader.batch(index) for index in range(count)]

    def sheet_batch(self, rows: int) -> tuple[SuperresBatch, torch.Tensor]:
        """A few frames to look at, always the same, and their coarse tokens, which not every model reads."""
        loader = self._validation or self._loader
        batch = loader.batch(0)
        _, coarse = loader.dataset.pairs(loader.rows(0)[:rows])
        return batch.select(slice(rows), self.device), torch.from_numpy(coarse)

    def part(self, batch: SuperresBatch, index: int, count: int) -> SuperresBatch:
        return batch.select(slice(index, None, count), self.device)

    def tokens(self, batch: SuperresBatch) -> int:
        return int(batch.text_mask.sum()) + batch.low_res.numel() + batch.high_res.numel()

    def flops(self, batch: SuperresBatch) -> float:
        return self._frame_flops * len(batch.high_res)

    def part_of(self, parameter: str) -> str:
        """`embeddings`, `spatial` (the trunk's attention), `high_res` (the direct model's), `mlp`, `layernorm`."""
        return next(part for word, part in PARTS if word in parameter)

    def after_step(self, step: int, good: bool) -> None:
        pass

    def report(self) -> dict[str, float]:
        return {}

    def export(self, folder: Path, step: int) -> Path:
        place = folder / model_kind(self.model_config)
        frozen, init = None, self.config.init
        if init.freeze_trunk:
            assert init.checkpoint is not None, "a trunk is frozen only where it comes from a checkpoint"
            frozen = FrozenTrunk(init.checkpoint, trunk_config(self.model_config))
        export_model(place, self.model, {"step": step}, frozen)
        return place

    def _load(self, folders: list[Path], rank: int, world: int) -> PairLoader:
        loop = self.config.train
        return PairLoader(
            PairDataset(folders),
            self.text_tokenizer,
            self.model_config,
            loop.batch_size,
            seed=loop.seed,
            rank=rank,
            world=world,
        )

    def _start_weights(self) -> None:
        init = self.config.init
        if init.freeze_trunk and (init.checkpoint is None or self.model_config.method != "direct"):
            raise ValueError(
                "init.freeze_trunk=true needs superres.method=direct and a trunk to freeze; set init.checkpoint, or "
                "init.freeze_trunk=false"
            )
        initialise(self.model, generator_for(self.config.train.seed, "initialise"))
        if init.checkpoint is not None:
            start_from(self.model, init.checkpoint)
        if init.freeze_trunk:
            self.model.freeze_trunk()
        if init.trunk_weights == "int8":
            self.model.narrow_trunk()


@torch.no_grad()
def start_from(model: SuperresTransformer, folder: Path) -> None:
    """Take weights of one of our checkpoints: all of them if it is the same model, else its trunk.

    Raises: ValueError, FileNotFoundError in one line, if it is damaged or does not fit.
    """
    checkpoint = load_checkpoint(folder)
    stored, config = stored_config(checkpoint), model.config
    if isinstance(stored, SuperresConfig) and stored.method == config.method:
        return take(dict(model.named_parameters()), checkpoint.tensors(), folder)
    if isinstance(stored, ModelConfig):
        picture = (stored.frame_side, stored.frame_position_start + 1)
        if picture != (config.low_res_side, config.low_res_position_start):
            raise ValueError(
                f"{folder} knows pictures of {picture[0]}x{picture[0]} tokens, the second at position {picture[1]}; "
                f"set superres.low_res_side={picture[0]} superres.low_res_position_start={picture[1]}"
            )
    try:
        inherit_trunk(model, checkpoint.tensors())
    except ValueError as error:
        raise ValueError(f"{folder} does not fit the model: {error}") from None


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
