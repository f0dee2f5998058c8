"""Low-rank adapters (LoRA) in a model: which matrices have one, adding them for training, applying them in sampling.

    add_adapters(model, config)              # to train: freezes everything else
    adapted_layer(layer)                     # to sample: a stand-in to adapt; the original is unchanged

Not here: the arithmetic in a layer (`quantize.LowRank`), files (`checkpoint/adapter.py`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from cogvideo.model.config import LoraConfig
from cogvideo.model.quantize import Embedding, Linear, LowRank

PARTS = {
    "spatial": "layers.*.attention.*",
    "temporal": "layers.*.temporal_attention.*",
    "high_res": "layers.*.high_res_attention.*",
    "mlp": "layers.*.mlp.*",
    "embeddings": "word_embeddings",
}
"""Patterns of layer names by part of a model."""

Matrix = Linear | Embedding


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """The layers that can have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear | Embedding)}


def has_adapters(model: nn.Module) -> bool:
    """Whether any matrix has an adapter beside it."""
    return any(isinstance(module, Linear | Embedding) and module.lora is not None for module in model.modules())


def target_names(names: Iterable[str], config: LoraConfig) -> list[str]:
    """The layers of `names` that `config.targets` selects. Raises: ValueError for a target that matches none."""
    names = list(names)
    patterns = config.targets or [part for part in PARTS if part != "embeddings"]
    found: set[str] = set()
    for target in patterns:
        matching = {name for name in names if fnmatchcase(name, PARTS.get(target, target))}
        if not matching and config.targets:
            raise ValueError(
                f"lora.targets: this model has no matrix {target!r}; give parts ({', '.join(PARTS)}) or patterns of "
                f"layer names such as {names[-1]}"
            )
        found |= matching
    return [name for name in names if name in found]


def adapter_shapes(shape: tuple[int, ...], rank: int, is_table: bool) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B of an adapter for a matrix of `shape`, see `LowRank`."""
    rows, columns = shape
    out_features, in_features = (columns, rows) if is_table else (rows, columns)
    return (rank, in_features), (out_features, rank)


def matrix_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices that can have an adapter, by layer name, from those of all parameters."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "position_embeddings" not in name
    }


def count_adapters(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig) -> int:
    """Number of adapter parameters of a model whose own have these shapes. Raises: ValueError as `target_names`."""
    if not config.rank:
        return 0
    layers = matrix_shapes(shapes)
    # A and B share the rank, whichever of them belongs to the rows
    return sum(config.rank * sum(layers[name]) for name in target_names(layers, config))


def add_adapters(model: nn.Module, config: LoraConfig) -> None:
    """Freeze a model's parameters, and add adapters, not yet initialised. Raises: ValueError as `target_names`."""
    model.requires_grad_(False)
    layers = matrices(model)
    for name in target_names(layers, config):
        weight, is_table = layers[name].weight, isinstance(layers[name], Embedding)
        (_, in_features), (out_features, _) = adapter_shapes(tuple(weight.shape), config.rank, is_table)
        with weight.device:
            layers[name].lora = LowRank(in_features, out_features, config.rank, config.scale, config.dropout)


def draw_adapter(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The initial value of an adapter's parameter, for a zero update: A is uniform, B zero (for a table, the reverse).

    `name` is the parameter's. PEFT instead draws a table's B from a normal distribution of variance 1, so that a row
    moves many times as far per step as a row of another matrix at the same learning rate.
    """
    is_table = name.startswith(PARTS["embeddings"])
    if name.endswith("A" if is_table else "B"):
        return torch.zeros(shape)
    bound = 1 / math.sqrt(shape[0] if is_table else shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of all adapters in a model."""
    return ((name, p) for name, p in model.named_parameters() if ".lora." in name)


def update(a: Tensor, b: Tensor, scale: float, is_table: bool) -> Tensor:
    """scale * B A in float32, in the shape of the matrix that it updates."""
    product = scale * (b.float() @ a.float())
    return product.T if is_table else product


def adapted_layer(layer: Matrix) -> Matrix:
    """A stand-in that shares a layer's tensors: giving it a new weight or an adapter leaves the layer unchanged."""
    copy: Matrix
    with torch.device("meta"):
        if isinstance(layer, Linear):
            copy = Linear(layer.in_features, layer.out_features)
            copy.bias = layer.bias
        else:
            copy = Embedding(layer.num_embeddings, layer.embedding_dim)
            copy.activation_dtype = layer.activation_dtype
    copy.weight, copy.weight_scale = layer.weight, layer.weight_scale
    copy.kernel, copy.offloaded = layer.kernel, layer.offloaded
    return copy.train(layer.training)


@torch.no_grad()
def set_weight(layer: Matrix, value: Tensor) -> None:
    """Replace a layer's weight, keeping its device and the type in which it is stored."""
    weight, quantized_as = layer.weight, layer.quantized_as
    layer.weight = nn.Parameter(value.to(weight.device, None if quantized_as else weight.dtype), requires_grad=False)
    if quantized_as:
        layer.weight_scale = None
        layer.quantize(quantized_as)
