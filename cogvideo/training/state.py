"""The state of a training engine as whole, named tensors and plain numbers, whatever the ZeRO stage."""

import hashlib
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideo.tensor_file import TensorInfo
from cogvideo.training.deepspeed_engine import MOMENTS, gathered, initialise_moments, inner_optimiser, restart_ema
from cogvideo.training.optimiser import EMA

WEIGHTS, BUFFERS = "weights", "buffers"
ENGINE_COUNTERS = ("global_steps", "global_samples", "skipped_steps")


class TrainingState:
    """Reads and sets an engine's weights, moments, buffers and counters; every rank must make the same calls.

    Tensors are whole and named, whatever the ZeRO stage: `weights/NAME` (float32, the master copy where weights are in
    low precision), `exp_avg/NAME`, `exp_avg_sq/NAME` and, if weights are averaged, `ema/NAME` of every trainable
    parameter, and `buffers/NAME` for everything else that changes. Frozen parameters, and the scales of quantised ones,
    are not included.
    """

    def __init__(self, engine: Any, updated_without_gradient: Collection[str] = (), *, with_ema: bool = False) -> None:
        """`updated_without_gradient`: names of parameters that change but have no gradient."""
        self._engine, self.has_ema = engine, with_ema
        module = engine.module
        self._trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        others = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        saved = module.state_dict().keys()  # without the scales of quantised weights, which are frozen like the weights
        scales = {name: buffer for name, buffer in module.named_buffers() if name not in saved}
        frozen = {name: p for name, p in others.items() if name not in updated_without_gradient}
        self._frozen: dict[str, Tensor] = scales | frozen
        buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
        self._buffers: dict[str, Tensor] = buffers | {name: others[name] for name in updated_without_gradient}
        self._frozen_hashes: dict[str, str] | None = None
        initialise_moments(engine, with_ema)

    def infos(self) -> dict[str, TensorInfo]:
        """Type and shape of every tensor."""
        shapes = {name: _whole_shape(p) for name, p in self._trainable.items()}
        infos = {
            f"{kind}/{name}": TensorInfo(torch.float32, shape)
            for name, shape in shapes.items()
            for kind in (WEIGHTS, *MOMENTS, *([EMA] if self.has_ema else []))
        }
        return infos | {f"{BUFFERS}/{name}": TensorInfo.of(buffer) for name, buffer in self._buffers.items()}

    def read(self, name: str) -> Tensor:
        """One whole tensor, on every rank."""
        kind, _, name = name.partition("/")
        if kind == BUFFERS:
            return self._buffers[name].detach()
        p = self._trainable[name]
        value: Tensor
        if not _is_partitioned(p):
            value = p.detach() if kind == WEIGHTS else self._engine.optimizer.state[p][kind]
            return value
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value = safe_get_full_fp32_param(p) if kind == WEIGHTS else safe_get_full_optimizer_state(p, kind)
        return value

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Set one tensor from its whole value, which every rank passes."""
        kind, _, name = name.partition("/")
        if kind == BUFFERS:
            self._buffers[name].copy_(value)
            return
        p = self._trainable[name]
        if not _is_partitioned(p):
            (p if kind == WEIGHTS else self._engine.optimizer.state[p][kind]).copy_(value)
            return
        if kind == WEIGHTS:
            _write_low_precision(p, value)
        _write_partitioned(p, value, None if kind == WEIGHTS else kind)

    def restart_ema(self) -> None:
        """Restart the averages from the current weights."""
        restart_ema(self._engine)

    def numbers(self) -> dict[str, Any]:
        """The engine's counters, the optimiser's step count and the loss scaler's numbers, as plain JSON."""
        counters = {name: getattr(self._engine, name) for name in ENGINE_COUNTERS}
        steps = int(next(iter(inner_optimiser(self._engine).state.values()))["step"])
        return {"engine": counters, "optimiser_steps": steps, "scaler": dict(self._scaler_numbers())}

    def set_numbers(self, numbers: dict[str, Any]) -> None:
        for name in ENGINE_COUNTERS:
            setattr(self._engine, name, numbers["engine"][name])
        # micro_steps counts micro-batches, and their number per step may have changed with the number of processes
        self._engine.micro_steps = self._engine.global_steps * self._engine.gradient_accumulation_steps()
        for state in inner_optimiser(self._engine).state.values():
            state["step"].fill_(float(numbers["optimiser_steps"]))
        for name in self._scaler_numbers().keys() & numbers["scaler"].keys():
            setattr(self._engine.optimizer.loss_scaler, name, numbers["scaler"][name])

    def frozen_hashes(self) -> dict[str, str]:
        """SHA-256 of every frozen parameter and scale, computed once; empty strings on all ranks but 0."""
        if self._frozen_hashes is None:
            self._frozen_hashes = {}
            for name, p in self._frozen.items():
                with gathered([p]):  # one at a time, so that no rank has to hold them all
                    self._frozen_hashes[name] = tensor_hash(p) if dist.get_rank() == 0 else ""
        return self._frozen_hashes

    def _scaler_numbers(self) -> dict[str, Any]:
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        return {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler is not None else {}


def _write_low_precision(p: Any, value: Tensor) -> None:
    """Set the copy that the forward pass reads."""
    if not hasattr(p, "ds_id"):
        p.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
        p.data.copy_(value)


def _write_partitioned(p: Any, value: Tensor, moment: str | None) -> None:
    """Set a parameter's float32 master copy (`moment` None), or one of its moments."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(p, "ds_id"):
        flat = value.to(p.device)
        safe_set_full_fp32_param(p, flat) if moment is None else safe_set_full_optimizer_state(p, flat, moment)
        return
    # ZeRO 3's own setter of whole tensors fails if the length is not a multiple of the world size, so partition here:
    # rank r holds elements r * size to (r + 1) * size, the last rank zero-padded
    size = p.ds_tensor.numel()
    piece = value.flatten()[dist.get_rank() * size :][:size]
    local = torch.zeros(size, dtype=torch.float32, device=p.ds_tensor.device)
    local[: len(piece)] = piece
    safe_set_local_fp32_param(p, local) if moment is None else safe_set_local_optimizer_state(p, local, moment)


def _is_partitioned(p: Any) -> bool:
    return hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")


def _whole_shape(p: Any) -> tuple[int, ...]:
    return tuple(p.ds_shape) if hasattr(p, "ds_id") else tuple(p.shape)


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    whole = tensor.detach().cpu().contiguous()
    return hashlib.sha256(whole.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
