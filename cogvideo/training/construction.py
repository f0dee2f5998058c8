"""Builds a transformer with its starting weights, parameter by parameter: each in its final dtype, on its device.

The whole float32 model never exists. The host holds one parameter at a time; the device holds what training holds
anyway, or with ZeRO 3 this rank's partitions and one layer.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from cogvideo.checkpoint.format import Checkpoint, load_checkpoint
from cogvideo.checkpoint.load import on_meta
from cogvideo.dtypes import FLOAT_DTYPES
from cogvideo.model.initialise import codebook_embeddings, draw_parameters
from cogvideo.model.lora import adapter_parameters, add_adapters, draw_adapter
from cogvideo.model.quantize import Embedding, Linear
from cogvideo.model.transformer import CogVideoTransformer, TrunkModel
from cogvideo.rng import generator_for
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.tokenizers.image import open_image_tokenizer
from cogvideo.training.config import TrainConfig, errors_name_key
from cogvideo.training.deepspeed_engine import partition_parameters, zero_stage

M = TypeVar("M", CogVideoTransformer, SuperresTransformer)

Values = Mapping[str, Callable[[], Tensor]]
"""By parameter name, functions that read starting values; all other parameters are drawn at random."""
EMBEDDINGS = "word_embeddings.weight"
RELEASE_BYTES = 1 << 29
"""A checkpoint's files are unmapped each time this much was read, since mapped pages count as the process's memory."""


class CheckpointTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors, mapped into memory one at a time and unmapped now and then."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._read = checkpoint, 0

    def __getitem__(self, name: str) -> Tensor:
        self._read += self._checkpoint.infos[name].nbytes
        if self._read > RELEASE_BYTES:
            self._checkpoint.release()
            self._read = 0
        return self._checkpoint.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.infos)

    def __len__(self) -> int:
        return len(self._checkpoint.infos)


def starting_values(
    model: nn.Module,
    folder: Path,
    *,
    loads_all_parameters: Callable[[Checkpoint], bool],
    inherit: Callable[[Checkpoint, Mapping[str, Tensor]], Values],
) -> Values:
    """The values that a model takes from a checkpoint: all if `loads_all_parameters`, else those from `inherit`.

    Raises: ValueError, FileNotFoundError in one line, if the checkpoint is damaged or does not fit.
    """
    checkpoint = load_checkpoint(folder)
    tensors = CheckpointTensors(checkpoint)
    if not loads_all_parameters(checkpoint):
        if any(adapter_parameters(model)):
            raise ValueError(
                f"{folder} is for another task, and lora.rank adapts a model as it is; give a checkpoint of this task, "
                "or train all weights from it (lora.rank=0)"
            )
        try:
            return inherit(checkpoint, tensors)
        except ValueError as error:
            raise ValueError(f"{folder} does not fit the model: {error}") from None
    names = [name for name, _ in model.named_parameters() if ".lora." not in name]
    for name in names:
        p, info = model.get_parameter(name), checkpoint.infos.get(name)
        if info is None or info.shape != tuple(p.shape):
            got = "no such tensor" if info is None else f"shape {info.shape}"
            raise ValueError(
                f"{folder} does not fit the model: {name} should have shape {tuple(p.shape)}, got {got}; "
                "use the same sizes, vocabulary and num_frames"
            )
    return {name: lambda name=name: tensors[name] for name in names}  # type: ignore[misc]


def construct(
    make: Callable[[], M], config: TrainConfig, device: torch.device, values_from: Callable[[M, Path], Values]
) -> M:
    """Make the model of a run with its starting weights, as `config.init` says.

    `make` constructs it (on the meta device); `values_from` gives the values that it takes from init.checkpoint.
    Weights have the dtype that training holds them in, float32 or train.dtype, and are partitioned at ZeRO stage 3.
    """
    model = on_meta(make)
    init, loop = config.init, config.train
    if init.freeze_trunk:
        model.freeze_trunk()
    if config.lora.rank:
        add_adapters(model, config.lora)
    values: Values = {}
    if init.checkpoint is not None:
        with errors_name_key("init.checkpoint"):
            values = values_from(model, init.checkpoint)
    values = {**values, **_adapter_values(model, loop.seed)}
    codes = _codebook_embeddings(model, config) if init.codebook else None
    generator = generator_for(loop.seed, "initialise")
    drawn = draw_parameters(model, generator, mix_logit=init.mix_logit, skip=values)
    dtype = FLOAT_DTYPES[loop.dtype] if loop.weights == "dtype" else torch.float32
    quantized = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if init.trunk_weights != "full" and _is_trunk_matrix(model, name, module)
    }
    blocks = _blocks(model)
    left = {name: sum(1 for _ in block.parameters()) for name, block in blocks.items()}
    for name, p in sorted(model.named_parameters()):
        value = values[name]() if name in values else next(drawn)[1]
        if name == EMBEDDINGS and codes is not None:
            value[: len(codes)] = codes
        _set_parameter(model, name, nn.Parameter(_finished(value, dtype, device, name in quantized), p.requires_grad))
        if name in quantized and init.trunk_weights != "full":
            quantized[name].quantize(init.trunk_weights)
            quantized[name].to(device)
        del value
        block = next(block for block in blocks if name.startswith(f"{block}."))
        left[block] -= 1
        if left[block] == 0 and zero_stage(config) == 3:
            partition_parameters(blocks[block], config)
    return model


def _codebook_embeddings(model: CogVideoTransformer | SuperresTransformer, config: TrainConfig) -> Tensor:
    """Starting embeddings of image tokens from the run's image tokenizers. Raises: ValueError, OSError."""
    codebooks = []
    known = model.config.vocabulary.num_image_tokens
    for key in ("image_tokenizer", "high_res_tokenizer"):
        path = getattr(config.data, key)
        if path is not None:
            with errors_name_key(f"data.{key}"):
                codebooks.append(open_image_tokenizer(path).codebook)
            if len(codebooks[-1]) != known:
                raise ValueError(f"data.{key} has {len(codebooks[-1])} codes, but the text tokenizer expects {known}")
    hidden_size = dict(model.named_parameters())[EMBEDDINGS].shape[1]
    return codebook_embeddings(codebooks, hidden_size, generator_for(config.train.seed, "codebook"))


def _adapter_values(model: nn.Module, seed: int) -> Values:
    """How to draw each adapter parameter, from its own generator, so that other parameters do not depend on it."""

    def draw(name: str, shape: torch.Size) -> Tensor:
        return draw_adapter(name, shape, generator_for(seed, f"lora {name}"))

    return {name: partial(draw, name, p.shape) for name, p in adapter_parameters(model)}


def _finished(value: Tensor, dtype: torch.dtype, device: torch.device, is_quantized_next: bool) -> Tensor:
    """The value copied to its device in its final dtype, or in float32 on the host if it is quantized next."""
    if is_quantized_next:
        return value.to(torch.float32)
    return value.to(device=device, dtype=dtype, copy=True)


def _is_trunk_matrix(model: TrunkModel, name: str, module: nn.Module) -> bool:
    return isinstance(module, Linear | Embedding) and not model.is_extra(f"{name}.weight")


def _blocks(model: TrunkModel) -> dict[str, nn.Module]:
    """The layers and every other top-level module, by name: the units in which ZeRO 3 partitions the model."""
    layers = {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    return layers | {name: child for name, child in model.named_children() if name != "layers"}


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, parameter)
