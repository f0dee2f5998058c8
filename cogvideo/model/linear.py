"""Linear layers and embeddings whose weights may be stored in fewer bits than the activations have.

    convert_weights(model, "int8")       # for sampling: weights int8, activations float32

Decoding reads all weights for every step, so its speed is that of their bytes. Matrices are stored as asked for;
vectors, position tables and all that flows through the model are float32, or what an accelerator computes in.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideo.model import few_rows

WeightDtype = Literal["fp32", "bf16", "fp16", "int8"]
_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class Linear(nn.Linear):
    """`nn.Linear`, quick for a few rows; after `convert_weights` its weight may be narrower than input and output."""

    weight_scale: Tensor | None
    """(out_features,) that int8 weights are to be multiplied by."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("weight_scale", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() and few_rows.serves(x):
            return few_rows.linear(x, self.weight, self.bias, self.weight_scale)
        return F.linear(x, _widened(self.weight, self.weight_scale, x.dtype), self.bias)


class Embedding(nn.Embedding):
    """`nn.Embedding` whose table also scores: the tied output layer."""

    weight_scale: Tensor | None
    """(num_embeddings,) that int8 weights are to be multiplied by."""
    activations: torch.dtype | None = None
    """What rows come out in, whatever they are stored in; None: as stored."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.register_buffer("weight_scale", None, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids) if self.weight.is_floating_point() else self.weight[ids]
        if self.weight_scale is not None:
            rows = rows * self.weight_scale[ids].unsqueeze(-1)
        return rows if self.activations is None else rows.to(self.activations)

    def scores(self, hidden: Tensor, count: int) -> Tensor:
        """Products with the first `count` rows, float32: (..., embedding_dim) -> (..., count)."""
        weight, scale = self.weight[:count], None if self.weight_scale is None else self.weight_scale[:count]
        if not torch.is_grad_enabled() and few_rows.serves(hidden):
            return few_rows.linear(hidden, weight, None, scale)
        return F.linear(hidden, _widened(weight, scale, hidden.dtype)).float()


def _widened(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = weight.to(dtype)
    return wide if scale is None else wide * scale[:, None].to(dtype)


@torch.no_grad()
def convert_weights(model: nn.Module, dtype: WeightDtype, activations: torch.dtype = torch.float32) -> None:
    """Store the matrices of `model` in `dtype`, in place, for inference; all else in `activations`, as it computes.

    int8 is weight-only, symmetric, with one scale an output row. Matrices that are stored so already stay where they
    are, mapped files included. Raises: ValueError for weights that are int8 and are to be something else.
    """
    stored = _STORED[dtype]
    matrices = [module for module in model.modules() if isinstance(module, Linear | Embedding)]
    owned = {id(module.weight) for module in matrices}
    for module in matrices:
        if isinstance(module, Embedding):
            module.activations = activations
        if module.weight.dtype == stored:
            continue
        if module.weight_scale is not None:
            raise ValueError(f"the weights are int8 already; load the model again for {dtype}")
        weight = module.weight.detach()
        if stored == torch.int8:
            scale, narrow = _quantised(weight)
            module.weight_scale = scale
        else:
            narrow = weight.to(stored)
        module.weight = nn.Parameter(narrow, requires_grad=False)
        owned.add(id(module.weight))
    for parameter in model.parameters():
        if id(parameter) not in owned:
            parameter.data = parameter.data.to(activations)


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (rows,) float32 and the weights over them, int8; some rows at a time, to be small beside the result."""
    scales, narrow = weight.new_empty(len(weight), dtype=torch.float32), torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, len(weight), 4096):
        some = weight[start : start + 4096].float()
        scale = some.abs().amax(dim=1).clamp(min=1e-30) / 127
        scales[start : start + 4096] = scale
        narrow[start : start + 4096] = (some / scale[:, None]).round().to(torch.int8)
    return scales, narrow
