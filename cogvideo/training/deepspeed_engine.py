"""The DeepSpeed engine of a run: its config from ours, and gathering what ZeRO spread. Not the loop."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cogvideo.files import read_json
from cogvideo.training.config import TrainConfig
from cogvideo.training.optimiser import make_optimiser

OWNED = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "optimiser.grad_clip",
    "bf16": "train.dtype and train.weights",
    "fp16": "train.dtype and train.weights",
    "optimizer": "optimiser.*",
    "scheduler": "optimiser.*",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload_optimizer",
}
"""DeepSpeed's settings that the trainer has to know of too, and where it takes them from."""


def deepspeed_settings(config: TrainConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's own settings for a run in `world` processes; `deepspeed.file` has the last word on all but OWNED.

    Raises: ValueError for a batch that cannot be cut so, or settings that do not go together.
    """
    loop = config.train
    accumulation = loop.accumulation(world)
    # DeepSpeed's stage 0 has no float32 copies that could be read by name; its stage 1 is the same on one process
    stage = max(config.deepspeed.stage, 1 if loop.weights == "dtype" else 0)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": loop.batch_size // (world * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clips_itself(config) else config.optimiser.grad_clip,
        "zero_optimization": {"stage": stage} | _offloading(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    if loop.weights == "dtype" and loop.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    elif loop.weights == "dtype" and loop.dtype == "fp16":
        # the published scaler
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "loss_scale_window": 400, "hysteresis": 2}
    if config.deepspeed.file is not None:
        over = read_json(config.deepspeed.file)
        if not isinstance(over, dict):
            raise ValueError(f"{config.deepspeed.file}: expected a JSON object of DeepSpeed settings")
        if "tensor_parallel" in over:
            raise ValueError(f"{config.deepspeed.file}: no tensor_parallel, see docs/training.md; use deepspeed.stage")
        for key, ours in OWNED.items():
            inner = over.get(key.partition(".")[0])
            if key in over or ("." in key and isinstance(inner, dict) and key.partition(".")[2] in inner):
                raise ValueError(f"{config.deepspeed.file}: {key} follows from {ours}; set that, and leave it out here")
        for key, value in over.items():
            nested = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = settings[key] | value if nested else value
    if config.init.trunk_weights == "int8" and stage == 3:
        raise ValueError(
            "deepspeed.stage=3 spreads no int8 weights, and init.trunk_weights=int8; use deepspeed.stage=0, 1 or 2, "
            "or init.trunk_weights=full"
        )
    return settings


def _offloading(config: TrainConfig) -> dict[str, Any]:
    if not config.deepspeed.offload_optimizer:
        return {}
    return {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}


def clips_itself(config: TrainConfig) -> bool:
    """Whether the trainer clips gradients: DeepSpeed does not tell their norm where nothing is spread or scaled."""
    return config.deepspeed.stage == 0 and config.train.weights == "fp32"


def make_engine(objective: nn.Module, config: TrainConfig, world: int) -> Any:
    """Wrap an objective (forward gives the loss) with an optimiser over what learns.

    Raises: ValueError if DeepSpeed cannot take the settings of `deepspeed.file`.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    optimiser, settings = make_optimiser(objective, config.optimiser), deepspeed_settings(config, world)
    try:
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimiser, config=settings, dist_init_required=True
        )
    except (AssertionError, ValueError, TypeError, KeyError) as error:  # DeepSpeed asserts what its settings must be
        if config.deepspeed.file is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{config.deepspeed.file} does not fit this run: {reason}") from None
    return engine


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Whole values of parameters that ZeRO-3 spread, for reading, on every rank; nothing to do otherwise."""
    spread = [p for p in parameters if hasattr(p, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(spread, modifier_rank=None):
        yield


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Matrix products in train.dtype over float32 weights; does nothing where the weights have that type themselves."""
    enabled = config.train.dtype != "fp32" and config.train.weights == "fp32"
    dtype = torch.float16 if config.train.dtype == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=enabled)
