"""Gradient norms by part of a model, read where AdamW is about to use them, whole or spread by ZeRO."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideo.training.engine_state import flat_parameters


class GradientNorms:
    """Squares summed by part over this process's share of the gradients, until `take`."""

    def __init__(self, engine: Any, part_of: Callable[[str], str]) -> None:
        """`part_of` names the part of a parameter by its name."""
        learned = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self._parts = sorted({part_of(name) for name, _ in learned})
        self._squares = torch.zeros(len(self._parts), dtype=torch.float64)
        self._is_spread = False
        self._pieces: dict[int, list[tuple[int, int, int]]] = {}
        """By id of what AdamW updates: (part, start, length) of each piece of a parameter in it."""
        flat = flat_parameters(engine)
        positions = getattr(engine.optimizer, "grad_position", None)
        for name, p in learned:
            part = self._parts.index(part_of(name))
            if hasattr(p, "ds_id") and positions is not None:
                group, start, length = positions[p.ds_id]
                self._add_piece(flat[group], part, start, length)
            elif hasattr(p, "_hp_mapping"):
                self._is_spread = True
                if p._hp_mapping is not None:  # None: all of it is on other processes
                    address = p._hp_mapping.hp_fragment_address
                    self._add_piece(flat[p._hp_mapping.param_group_index], part, address.start, address.numel)
            else:
                self._add_piece(p, part, 0, p.numel())
        self._is_spread |= any(hasattr(p, "ds_id") for _, p in learned)

    def add(self, updated: Iterable[Tensor]) -> None:
        """Take in the gradients of what AdamW updates now."""
        for p in updated:
            if p.grad is None:
                continue
            gradient = p.grad.detach().reshape(-1)
            for part, start, length in self._pieces.get(id(p), ()):
                self._squares[part] += float(gradient[start : start + length].double().square().sum())

    def take(self, total: float) -> dict[str, float]:
        """grad_norm/PART, which together make up the `total` before clipping. Every process must call this."""
        squares = self._squares
        self._squares = torch.zeros_like(squares)
        if self._is_spread and dist.get_world_size() > 1:
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, squares.tolist())
            squares = torch.tensor(shares, dtype=torch.float64).sum(0)
        whole = math.sqrt(float(squares.sum()))
        scale = total / whole if whole > 0 else 0.0
        norms = squares.sqrt() * scale
        return {f"grad_norm/{part}": float(norm) for part, norm in zip(self._parts, norms, strict=True)}

    def _add_piece(self, p: Tensor, part: int, start: int, length: int) -> None:
        self._pieces.setdefault(id(p), []).append((part, start, length))
