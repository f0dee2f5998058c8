"""Adapters on disk, as PEFT saves them, and merging them into a checkpoint.

    adapter_config.json         PEFT's settings: rank, alpha, names of the layers
    adapter_model.safetensors   base_model.model.LAYER.lora_A.weight (rank, in), .lora_B.weight (out, rank); for
                                word embeddings .lora_embedding_A (rank, rows), .lora_embedding_B (columns, rank)
    base.json                   the model it is for; our own addition, absent from folders that PEFT wrote

The folder is written under a temporary name and renamed. Files are not trusted: names, shapes and numbers are checked
before anything is multiplied.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired

import torch
from annotated_types import Ge, Le
from safetensors import SafetensorError, safe_open
from torch import Tensor
from typing_extensions import TypedDict

from cogvideo.checkpoint.format import Checkpoint, write_checkpoint
from cogvideo.checkpoint.parameters import TransformerConfig, model_kind, name_list
from cogvideo.dtypes import FLOAT_DTYPES
from cogvideo.files import Count, atomic_directory, read_json, write_json
from cogvideo.model.config import MAX_LORA_RANK, LoraConfig, ModelConfig
from cogvideo.model.lora import adapter_shapes, matrix_shapes, update
from cogvideo.tensor_file import TensorInfo, read_header, write_tensor_file

SETTINGS, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
FINGERPRINT = "fingerprint"
LOST = "lost_by_rounding"
"""Keys of `extra`: the first in a bundle's models, the second in merged models."""
MAX_LOST = 0.1
"""Largest share of an adapter's update that rounding may lose without a warning."""
FORMAT = 1
PREFIX, TABLE = "base_model.model.", "word_embeddings"
KEYS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_A", "lora_embedding_B")}
"""Endings of tensor names, by whether the layer is an embedding table."""
NAME = re.compile(rf"{re.escape(PREFIX)}(?P<layer>[\w.]+)\.(?P<factor>lora_[AB]\.weight|lora_embedding_[AB])")
MAX_JSON_BYTES = 1 << 20
MAX_SCALE = 1000.0
"""Bound on an adapter's weight, far beyond useful values."""
UNSUPPORTED = {
    "use_dora": False,
    "bias": "none",
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "fan_in_fan_out": False,
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
}
"""PEFT's settings that change what an adapter computes, and the values that they may have here."""


class Settings(TypedDict):
    """adapter_config.json, as far as it is read."""

    peft_type: str
    r: Annotated[int, Ge(1), Le(MAX_LORA_RANK)]
    lora_alpha: Annotated[float, Ge(0), Le(1e9)] | Annotated[int, Ge(0), Le(10**9)]
    use_rslora: NotRequired[bool]


class Base(TypedDict):
    """base.json apart from its format: the model that the adapter was trained on."""

    model: str
    sha256: str
    step: Count


class Factors(NamedTuple):
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class Adapter:
    """An adapter read from its folder."""

    directory: Path
    rank: int
    scale: float
    factors: Mapping[str, Factors]
    """By the layer's name, float32."""
    base: Base | None

    def update(self, layer: str, weight: float) -> Tensor:
        """What the adapter adds to a layer's matrix, scaled by `weight`, in float32."""
        return update(*self.factors[layer], self.scale * weight, layer == TABLE)


def model_name(config: TransformerConfig) -> str:
    """A model's name in base.json: its folder in a bundle."""
    if isinstance(config, ModelConfig):
        return {"image": "trunk"}.get(config.task, config.task)
    return model_kind(config)


@torch.no_grad()
def fingerprint(checkpoint: Checkpoint) -> str:
    """The hex SHA-256 of a model's tensor names, shapes, vectors and first rows of matrices.

    Values are hashed in bfloat16, so that a bundle that stores the model in another type has the fingerprint of its
    source. fp16 rounds differently, so a fingerprint recorded in `extra` (`fingerprint_to_store`) takes precedence.
    """
    recorded = checkpoint.extra.get(FINGERPRINT)
    if isinstance(recorded, str):
        return recorded
    digest = hashlib.sha256()
    for name in sorted(checkpoint.names):
        tensor = checkpoint.tensor(name)
        row = (tensor[0] if tensor.ndim > 1 else tensor).to(torch.bfloat16).contiguous()
        digest.update(f"{name} {list(tensor.shape)}\n".encode() + row.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_to_store(source: Checkpoint) -> dict[str, Any]:
    """The entry for `extra` in a copy of a model in another number type."""
    return {FINGERPRINT: fingerprint(source)}


def save_adapter(
    directory: Path, config: LoraConfig, shapes: Mapping[str, TensorInfo], read: Callable[[str], Tensor], base: Base
) -> None:
    """Write an adapter's folder, which replaces an existing adapter once it is complete.

    `shapes`: those of the parameters LAYER.lora.A and LAYER.lora.B, as models name them; `read` returns one by name.
    """
    own_name = {_file_name(name): name for name in shapes}
    layers = sorted({name.rpartition(".lora.")[0] for name in shapes})
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": layers,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with atomic_directory(directory, replace=(directory / SETTINGS).is_file()) as building:
        write_json(building / SETTINGS, settings)
        infos = {name: shapes[own] for name, own in own_name.items()}
        write_tensor_file(building / WEIGHTS, infos, lambda name: read(own_name[name]))
        write_json(building / BASE, {"format": FORMAT, **base})


def _file_name(parameter: str) -> str:
    layer, _, factor = parameter.rpartition(".lora.")
    return f"{PREFIX}{layer}.{KEYS[layer == TABLE]['AB'.index(factor)]}"


def load_adapter(directory: Path) -> Adapter:
    """Read an adapter that we or PEFT wrote. Raises: FileNotFoundError; ValueError, in one line, if it is damaged."""
    directory = Path(directory)
    for name in (SETTINGS, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} is not an adapter, it has no {name}; give the folder that holds it")
    path = directory / SETTINGS
    settings = read_json(path, dict[str, Any], max_bytes=MAX_JSON_BYTES)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {settings.get('peft_type')!r:.40}; only LORA can be read")
    settings = read_json(path, Settings, max_bytes=MAX_JSON_BYTES)
    for key, expected in UNSUPPORTED.items():
        if settings.get(key, expected) not in (expected, None):
            raise ValueError(f"{path} has {key}={settings[key]!r:.60}, which is not supported; expected {expected!r}")
    base = None
    if (directory / BASE).is_file():
        base = read_json(directory / BASE, Base, max_bytes=MAX_JSON_BYTES)
        if base.get("format") != FORMAT:
            raise ValueError(f"{directory / BASE} has format {base.get('format')!r:.40}, expected {FORMAT}")
    rank = settings["r"]
    scale = float(settings["lora_alpha"]) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    return Adapter(directory, rank, scale, _read_factors(directory / WEIGHTS, rank), base)


def _read_factors(path: Path, rank: int) -> dict[str, Factors]:
    """Raises: ValueError."""
    infos, found = read_header(path), dict[str, dict[str, str]]()
    for name, info in infos.items():
        match = NAME.fullmatch(name)
        if match is None or match["factor"] not in KEYS[match["layer"] == TABLE]:
            raise ValueError(f"{path} holds {name[:200]!r}, which is not a LoRA factor of a weight matrix")
        factor = "A" if "A" in match["factor"] else "B"
        if len(info.shape) != 2 or info.shape[factor == "B"] != rank or not info.dtype.is_floating_point:
            raise ValueError(f"{path} is damaged: {name[:200]} is {info}, expected a matrix of rank {rank}")
        found.setdefault(match["layer"], {})[factor] = name
    if not found:
        raise ValueError(f"{path} holds no adapter")
    lacking = [layer for layer, names in found.items() if len(names) < 2]
    if lacking:
        raise ValueError(f"{path} is damaged: it has only one of the two factors of {name_list(lacking)}")
    try:
        with safe_open(path, framework="pt") as file:

            def read(name: str) -> Tensor:
                tensor: Tensor = file.get_tensor(name).float()
                if not tensor.isfinite().all():
                    raise ValueError(f"{path} is damaged: {name} holds NaN or infinity")
                return tensor

            return {layer: Factors(read(names["A"]), read(names["B"])) for layer, names in sorted(found.items())}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {str(error)[:200]}") from None


def check_base(adapter: Adapter, model: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that an adapter fits a model called `model` with matrices of these shapes, keyed by layer.

    Raises: ValueError.
    """
    if adapter.base is not None and adapter.base["model"] != model:
        raise ValueError(f"{adapter.directory} is for a {adapter.base['model'][:40]} model, got {model}; give another")
    for layer, factors in adapter.factors.items():
        found = tuple(tuple(factor.shape) for factor in factors)
        if layer not in shapes:
            raise ValueError(f"{adapter.directory} does not fit {model}, which has no matrix {layer[:200]}")
        expected = adapter_shapes(shapes[layer], adapter.rank, layer == TABLE)
        if found != expected:
            raise ValueError(
                f"{adapter.directory} does not fit {model}: its factors for {layer} are {list(map(list, found))}, "
                f"expected {list(map(list, expected))}; it was trained on a base model of a different size"
            )


def check_fingerprint(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Raises: ValueError if an adapter records that it was trained on other weights than the checkpoint's."""
    if adapter.base is not None and adapter.base["sha256"] != fingerprint(checkpoint):
        raise ValueError(
            f"{adapter.directory} was trained on different base weights than {checkpoint.directory}; give those "
            f"weights, or remove {adapter.directory / BASE} to use it with these"
        )


def write_merged(
    directory: Path,
    checkpoint: Checkpoint,
    config: TransformerConfig,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a checkpoint with adapters, each scaled by its weight, merged into the matrices: a model of its own.

    Sums are computed in float32; all weights are stored as `dtype`. `extra` records the share of the update that each
    type would lose to rounding, for `lost_share`. Raises: ValueError for an adapter of another model; FileExistsError.
    """
    shapes = {name: info.shape for name, info in checkpoint.infos.items()}
    for adapter, _ in adapters:
        check_base(adapter, model_name(config), matrix_shapes(shapes))
        check_fingerprint(adapter, checkpoint)

    rounding = _Rounding()

    def read(name: str) -> Tensor:
        weight = checkpoint.tensor(name)
        merged = merged_weight(weight, name.removesuffix(".weight"), adapters)
        if merged is not weight:
            rounding.add(weight, merged)
        return merged

    merged = [{"adapter": str(adapter.directory.name), "weight": weight} for adapter, weight in adapters]
    # `rounding.lost` is filled in while tensors are read, before `extra` is written
    extra = checkpoint.extra | {"merged": [*checkpoint.extra.get("merged", []), *merged], LOST: rounding.lost}
    extra.pop(FINGERPRINT, None)
    infos = {
        name: TensorInfo(dtype if info.dtype.is_floating_point else info.dtype, info.shape)
        for name, info in checkpoint.infos.items()
    }
    write_checkpoint(directory, infos, read, checkpoint.config, extra=extra)


class _Rounding:
    """The share of an update lost by rounding the sum: 1 minus the rounded update's projection onto the exact one."""

    def __init__(self) -> None:
        self.lost: dict[str, float] = {}
        """By `FloatName`, from 0 to 1; kept up to date."""
        self._total = 0.0
        self._kept = dict.fromkeys(FLOAT_DTYPES, 0.0)

    @torch.no_grad()
    def add(self, weight: Tensor, merged: Tensor) -> None:
        """Include one matrix: `weight` without the update, `merged` with it, in float32."""
        update = (merged - weight.float()).double()
        self._total += float(update.square().sum())
        for name, dtype in FLOAT_DTYPES.items():
            kept = (merged.to(dtype).double() - weight.to(dtype).double()) * update
            self._kept[name] += float(kept.sum())
            self.lost[name] = round(min(1.0, max(0.0, 1 - self._kept[name] / self._total)), 3) if self._total else 0.0


def lost_share(extra: Mapping[str, Any], dtype: torch.dtype) -> float:
    """The share of the update of a merged model that `dtype` loses, 0 to 1; 0 for models that are not merged.

    `extra`: from its checkpoint, not trusted.
    """
    recorded = extra.get(LOST)
    name = next(name for name, known in FLOAT_DTYPES.items() if known == dtype)
    share = recorded.get(name) if isinstance(recorded, dict) else None
    return share if isinstance(share, float) else 0.0


@torch.no_grad()
def merged_weight(weight: Tensor, layer: str, adapters: Sequence[tuple[Adapter, float]]) -> Tensor:
    """`weight` itself, or the float32 sum with the updates of those adapters that have one for the layer."""
    for adapter, scale in adapters:
        if layer in adapter.factors:
            weight = weight.float() + adapter.update(layer, scale)
    return weight
