"""The DeepSpeed engine of a run: its settings, and everything that depends on how ZeRO partitions the model.

Not here: the training loop (`trainer.py`), the state on disk (`checkpointing.py`).
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvideo.files import read_json
from cogvideo.training.config import TrainConfig
from cogvideo.training.optimiser import EMA, GuardedAdamW, make_optimiser

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
"""DeepSpeed settings that the trainer depends on too, and the config keys that determine them."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's names for its moments."""
SWAPPED_ELEMENTS = 1 << 24
"""Number of weights that are swapped with their averages at a time, which bounds the size of the temporary copy."""


def deepspeed_settings(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own settings for `world_size` processes; `deepspeed.file` overrides all but OWNED.

    Raises: ValueError if the batch cannot be divided evenly, or settings contradict each other.
    """
    loop = config.train
    accumulation = loop.accumulation(world_size)
    stage = zero_stage(config)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": loop.batch_size // (world_size * accumulation),
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if trainer_clips_gradients(config) else config.optimiser.grad_clip,
        "zero_optimization": {"stage": stage} | _offloading(config),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
    }
    if loop.weights == "dtype" and loop.dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    elif loop.weights == "dtype" and loop.dtype == "fp16":
        # the published loss scaler
        settings["fp16"] = {"enabled": True, "loss_scale": 0, "loss_scale_window": 400, "hysteresis": 2}
    if loop.weights == "dtype" and loop.gradients == "fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    if config.deepspeed.file is not None:
        overrides: dict[str, Any] = read_json(config.deepspeed.file, dict[str, Any])
        if "tensor_parallel" in overrides:
            raise ValueError(
                f"{config.deepspeed.file}: tensor_parallel is not supported, see docs/guides/pretrain.md; "
                "use deepspeed.stage"
            )
        for key, config_key in OWNED.items():
            inner = overrides.get(key.partition(".")[0])
            if key in overrides or ("." in key and isinstance(inner, dict) and key.partition(".")[2] in inner):
                raise ValueError(
                    f"{config.deepspeed.file}: {key} follows from {config_key}; set that, and leave it out here"
                )
        for key, value in overrides.items():
            nested = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = settings[key] | value if nested else value
    held = config.init.trunk_weights
    if held != "full" and stage == 3:
        raise ValueError(
            f"deepspeed.stage=3 cannot partition {held} weights, and init.trunk_weights={held}; use deepspeed.stage=0, "
            "1 or 2, or init.trunk_weights=full"
        )
    return settings


def zero_stage(config: TrainConfig) -> int:
    """The ZeRO stage in effect.

    With weights in low precision it is at least 1: DeepSpeed's stage 0 has no float32 copies accessible by name, and
    stage 1 on a single process is equivalent.
    """
    return max(config.deepspeed.stage, 1 if config.train.weights == "dtype" else 0)


def _offloading(config: TrainConfig) -> dict[str, Any]:
    if not config.deepspeed.offload_optimizer:
        return {}
    return {"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}}


def trainer_clips_gradients(config: TrainConfig) -> bool:
    """Whether the trainer clips gradients itself: at ZeRO stage 0 in float32, DeepSpeed does not report their norm."""
    return config.deepspeed.stage == 0 and config.train.weights == "fp32"


def make_engine(objective: nn.Module, config: TrainConfig, world_size: int) -> Any:
    """Wrap an objective (its forward returns the loss) and an optimiser over its trainable parameters.

    Raises: ValueError if DeepSpeed rejects the settings of `deepspeed.file`.
    """
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    optimiser, settings = make_optimiser(objective, config.optimiser), deepspeed_settings(config, world_size)
    with _errors_name_file(config):
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimiser, config=settings, dist_init_required=True
        )
    return engine


def partition_parameters(module: nn.Module, config: TrainConfig) -> None:
    """Replace a module's parameters with this rank's ZeRO 3 partitions of them; every rank must call this.

    Raises: ValueError if DeepSpeed rejects the settings of `deepspeed.file`.
    """
    import deepspeed

    settings = deepspeed_settings(config, dist.get_world_size())
    with _errors_name_file(config):
        deepspeed.zero.Init(module=module, config_dict_or_path=settings)


@contextlib.contextmanager
def _errors_name_file(config: TrainConfig) -> Iterator[None]:
    """Turn DeepSpeed's errors into one line that names `deepspeed.file`, if there is one: the settings may be wrong."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    # DeepSpeed checks some settings by assert and others by use, and imports packages that a setting needs
    except (DeepSpeedConfigError, AssertionError, ValueError, TypeError, LookupError, AttributeError, ImportError) as e:
        if config.deepspeed.file is None:
            raise
        reason = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{config.deepspeed.file} does not fit this run: {reason}") from e


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Gather parameters partitioned by ZeRO 3 on every rank, for reading; does nothing for others."""
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None):
        yield


def step_in_fp16(engine: Any, *, loss_is_finite: bool) -> bool:
    """`engine.step()` in fp16. Returns whether the step was skipped because gradients overflowed, as they sometimes do.

    The loss scaler lowers its scale for gradients that are not finite. But a non-finite loss says nothing about the
    scale, which is then restored, and at the lowest scale non-finite gradients do not count as an overflow.
    """
    scaler = engine.optimizer.loss_scaler
    before = dict(vars(scaler))
    scaler.raise_error_at_min_scale = False  # the trainer reports it, and ends the run after several such steps
    engine.step()
    if not loss_is_finite:
        vars(scaler).update(before)
        return False
    return bool(engine.optimizer.overflow) and before["cur_scale"] > scaler.min_scale


def inner_optimiser(engine: Any) -> GuardedAdamW:
    """The AdamW of `make_optimiser`, inside whatever DeepSpeed wrapped around it."""
    optimiser: GuardedAdamW = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimiser


def flat_parameters(engine: Any) -> list[Tensor]:
    """The tensors that AdamW updates on this rank: the parameters, or ZeRO's flat partitions of them."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    if partitions is not None:
        return list(partitions)
    return [p for group in inner_optimiser(engine).param_groups for p in group["params"]]


def initialise_moments(engine: Any, with_ema: bool = False) -> None:
    """Create AdamW's state at step 0, instead of in the first update, so that a checkpoint can be loaded into it.

    `with_ema`: also create averages of weights beside the moments, so that ZeRO partitions and offloads them alike.
    """
    optimiser = inner_optimiser(engine)
    for p in flat_parameters(engine):
        if p not in optimiser.state:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            optimiser.state[p] = {"step": step} | {moment: torch.zeros_like(p) for moment in MOMENTS}
            if with_ema:
                optimiser.state[p][EMA] = p.detach().clone()
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


@torch.no_grad()
def restart_ema(engine: Any) -> None:
    """Restart the averages of weights from the current weights."""
    state = inner_optimiser(engine).state
    for p in flat_parameters(engine):
        state[p][EMA].copy_(p)


@contextlib.contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Run the block with the averages as the model's weights, on every rank; then restore the weights bit for bit."""
    _swap_with_ema(engine)
    try:
        yield
    finally:
        _swap_with_ema(engine)


@torch.no_grad()
def _swap_with_ema(engine: Any) -> None:
    """Swap the float32 weights with their averages in place, and update the copies that forward passes read."""
    state = inner_optimiser(engine).state
    for p in flat_parameters(engine):
        for weights, averages in zip(
            p.view(-1).split(SWAPPED_ELEMENTS), state[p][EMA].view(-1).split(SWAPPED_ELEMENTS), strict=True
        ):
            kept = weights.clone()
            weights.copy_(averages)
            averages.copy_(kept)
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3: as at the end of its step
        zero._partition_all_parameters()
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    elif hasattr(zero, "update_lp_params"):  # ZeRO 1 and 2
        zero.update_lp_params()


class GradientNorms:
    """Gradient norms by component of the model, read just before AdamW uses the gradients, partitioned or not.

    `add` accumulates squares over this rank's partition; `take` sums them over ranks and clears them.
    """

    def __init__(self, engine: Any, component_of: Callable[[str], str]) -> None:
        """`component_of` maps a parameter's name to its component's."""
        trainable = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self._components = sorted({component_of(name) for name, _ in trainable})
        self._is_partitioned = False
        self._slices: dict[int, list[tuple[int, int, int]]] = {}
        """By id of a tensor that AdamW updates: (component, start, length) of each parameter's slice of it."""
        flat = flat_parameters(engine)
        device = flat[0].device if flat else torch.device("cpu")
        self._squares = torch.zeros(len(self._components), dtype=torch.float64, device=device)
        positions = getattr(engine.optimizer, "grad_position", None)
        for name, p in trainable:
            component = self._components.index(component_of(name))
            if hasattr(p, "ds_id") and positions is not None:  # ZeRO 3
                group, start, length = positions[p.ds_id]
                self._add_slice(flat[group], component, start, length)
            elif hasattr(p, "_hp_mapping"):  # ZeRO 1 and 2
                self._is_partitioned = True
                if p._hp_mapping is not None:  # None: other ranks hold all of it
                    address = p._hp_mapping.hp_fragment_address
                    self._add_slice(flat[p._hp_mapping.param_group_index], component, address.start, address.numel)
            else:
                self._add_slice(p, component, 0, p.numel())
        self._is_partitioned |= any(hasattr(p, "ds_id") for _, p in trainable)

    def add(self, updated: Iterable[Tensor]) -> None:
        """Add the gradients of the tensors that AdamW is about to update."""
        for p in updated:
            if p.grad is None:
                continue
            gradient = p.grad.detach().reshape(-1)
            for component, start, length in self._slices.get(id(p), ()):
                self._squares[component] += gradient[start : start + length].double().square().sum()

    def take(self, total: float) -> dict[str, float]:
        """grad_norm/COMPONENT, scaled to the joint norm `total`, that before clipping. Every rank must call this."""
        squares = self._squares.cpu()
        self._squares = torch.zeros_like(self._squares)
        if self._is_partitioned and dist.get_world_size() > 1:
            gathered_squares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered_squares, squares.tolist())
            squares = torch.tensor(gathered_squares, dtype=torch.float64).sum(0)
        clipped_total = math.sqrt(float(squares.sum()))
        scale = total / clipped_total if clipped_total > 0 else 0.0
        norms = squares.sqrt() * scale
        return {f"grad_norm/{name}": float(norm) for name, norm in zip(self._components, norms, strict=True)}

    def _add_slice(self, p: Tensor, component: int, start: int, length: int) -> None:
        self._slices.setdefault(id(p), []).append((component, start, length))
