"""What an engine holds, as whole tensors by name, in whichever ZeRO stage and over however many processes it is spread.

`weights/NAME` (float32, the master copy where weights are held in less), `exp_avg/NAME` and `exp_avg_sq/NAME` of every
learned parameter, and `buffers/NAME` of all else that moves. None of these depends on how it was spread, so a run goes
on from them on any number of processes and in any stage. Frozen parameters, and the scales of int8 ones, are not among
them. Not here: files (`state.py`).
"""

import hashlib
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvideo.checkpoint.tensor_file import TensorInfo
from cogvideo.training.deepspeed_engine import gathered

MOMENTS = ("exp_avg", "exp_avg_sq")
WEIGHTS, BUFFERS = "weights", "buffers"


class EngineState:
    """Reads and sets an engine's numbers. Every process must make the same calls in the same order."""

    def __init__(self, engine: Any, moving: Collection[str] = ()) -> None:
        """`moving`: parameters of the module that change without a gradient."""
        self._engine = engine
        module = engine.module
        self._learned = {name: p for name, p in module.named_parameters() if p.requires_grad}
        rest = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        stored = module.state_dict().keys()  # scales of int8 weights are not in it: they are as frozen as those
        scales = {name: buffer for name, buffer in module.named_buffers() if name not in stored}
        self._frozen: dict[str, Tensor] = scales | {name: p for name, p in rest.items() if name not in moving}
        moved = {name: buffer for name, buffer in module.named_buffers() if name in stored}
        self._buffers: dict[str, Tensor] = moved | {name: rest[name] for name in moving}
        self._frozen_hashes: dict[str, str] | None = None
        start_moments(engine)

    def infos(self) -> dict[str, TensorInfo]:
        """Type and shape of all that `read` gives."""
        shapes = {name: _whole_shape(p) for name, p in self._learned.items()}
        infos = {
            f"{kind}/{name}": TensorInfo(torch.float32, shape)
            for name, shape in shapes.items()
            for kind in (WEIGHTS, *MOMENTS)
        }
        return infos | {f"{BUFFERS}/{name}": TensorInfo.of(buffer) for name, buffer in self._buffers.items()}

    def read(self, name: str) -> Tensor:
        """One whole tensor, on every process."""
        kind, _, name = name.partition("/")
        if kind == BUFFERS:
            return self._buffers[name].detach()
        p = self._learned[name]
        if not _is_spread(p):
            return p.detach() if kind == WEIGHTS else self._engine.optimizer.state[p][kind]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(p) if kind == WEIGHTS else safe_get_full_optimizer_state(p, kind)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Set one tensor from its whole value, given to every process."""
        kind, _, name = name.partition("/")
        if kind == BUFFERS:
            self._buffers[name].copy_(value)
            return
        p = self._learned[name]
        if not _is_spread(p):
            (p if kind == WEIGHTS else self._engine.optimizer.state[p][kind]).copy_(value)
            return
        if kind == WEIGHTS:
            self._write_low_precision(p, value)
        self._write_spread(p, value, None if kind == WEIGHTS else kind)

    def numbers(self) -> dict[str, Any]:
        """Plain numbers: the engine's counters, the optimiser's steps, the loss scaler."""
        counters = {name: getattr(self._engine, name) for name in ENGINE_COUNTERS}
        return {"engine": counters, "optimiser_steps": self._optimiser_steps(), "scaler": dict(self._scaler_numbers())}

    def set_numbers(self, numbers: dict[str, Any]) -> None:
        for name in ENGINE_COUNTERS:
            setattr(self._engine, name, numbers["engine"][name])
        # counted in micro-batches, of which another number of processes has another number a step
        self._engine.micro_steps = self._engine.global_steps * self._engine.gradient_accumulation_steps()
        for state in inner_optimiser(self._engine).state.values():
            state["step"].fill_(float(numbers["optimiser_steps"]))
        for name in self._scaler_numbers().keys() & numbers["scaler"].keys():
            setattr(self._engine.optimizer.loss_scaler, name, numbers["scaler"][name])

    def frozen_hashes(self) -> dict[str, str]:
        """SHA-256 of every frozen parameter and scale; taken once, since they stay."""
        if self._frozen_hashes is None:
            self._frozen_hashes = {}
            for name, p in self._frozen.items():
                with gathered([p]):  # one at a time: no process need hold them all
                    self._frozen_hashes[name] = tensor_hash(p) if dist.get_rank() == 0 else ""
        return self._frozen_hashes

    def _optimiser_steps(self) -> int:
        return int(next(iter(inner_optimiser(self._engine).state.values()))["step"])

    def _scaler_numbers(self) -> dict[str, Any]:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler is not None else {}

    def _write_low_precision(self, p: nn.Parameter, value: Tensor) -> None:
        """The copy that forwards read."""
        if not hasattr(p, "ds_id"):
            p.data.copy_(value)
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
            p.data.copy_(value)

    @staticmethod
    def _write_spread(p: Any, value: Tensor, kind: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if not hasattr(p, "ds_id"):
            flat = value.to(p.device)
            safe_set_full_fp32_param(p, flat) if kind is None else safe_set_full_optimizer_state(p, flat, kind)
            return
        # ZeRO-3's own whole-tensor setter fails where the length does not divide by the processes: cut it here
        size = p.ds_tensor.numel()
        piece = value.flatten()[dist.get_rank() * size :][:size]
        local = torch.zeros(size, dtype=torch.float32, device=p.ds_tensor.device)
        local[: len(piece)] = piece
        safe_set_local_fp32_param(p, local) if kind is None else safe_set_local_optimizer_state(p, local, kind)


ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def inner_optimiser(engine: Any) -> Any:
    """The AdamW that `make_optimiser` gave, inside whatever DeepSpeed wrapped around it."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def flat_parameters(engine: Any) -> list[Tensor]:
    """What AdamW really updates in this process: the parameters, or ZeRO's flat partitions of them."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    if partitions is not None:
        return list(partitions)
    return [p for group in inner_optimiser(engine).param_groups for p in group["params"]]


def start_moments(engine: Any) -> None:
    """Give AdamW its state at step 0, which it would make in its first step, so that it can be set before."""
    optimiser = inner_optimiser(engine)
    for p in flat_parameters(engine):
        if p not in optimiser.state:
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            optimiser.state[p] = {"step": step} | {kind: torch.zeros_like(p) for kind in MOMENTS}
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes: equal hashes, equal values."""
    whole = tensor.detach().cpu().contiguous()
    return hashlib.sha256(whole.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _is_spread(p: Any) -> bool:
    return hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")


def _whole_shape(p: Any) -> tuple[int, ...]:
    return tuple(p.ds_shape) if hasattr(p, "ds_id") else tuple(p.shape)
