"""Save transformers to checkpoint folders and load them, config included, also under the names of Hugging Face's API.

Not here: the folder's format (`format.py`) and published checkpoints (`sat/`).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from cogvideo.checkpoint.format import CONFIG, MAX_SHARD_BYTES, Checkpoint, load_checkpoint, save_checkpoint
from cogvideo.checkpoint.parameters import TransformerConfig, model_kind, name_list, parameter_shapes
from cogvideo.config import from_dict, to_dict
from cogvideo.hub import resolve
from cogvideo.model.config import ModelConfig
from cogvideo.model.lora import has_adapters
from cogvideo.model.quantize import Embedding, Linear, quantize
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.transformer import SuperresTransformer

C = TypeVar("C", ModelConfig, SuperresConfig)
M = TypeVar("M", bound=nn.Module)


def stored_config(checkpoint: Checkpoint) -> TransformerConfig:
    """The config stored with a transformer. Raises: ValueError in one line."""
    path = str(checkpoint.directory / CONFIG)
    if "model" in checkpoint.config:
        return from_dict(ModelConfig, checkpoint.config["model"], origin=path)
    if "superres" in checkpoint.config:
        return from_dict(SuperresConfig, checkpoint.config["superres"], origin=path)
    raise ValueError(
        f"{path} has no config of a transformer, only {name_list(checkpoint.config) or 'no settings'}; "
        "give a transformer's checkpoint"
    )


def check_fits(checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """Compare the checkpoint's tensor names and shapes with those of the config; reads headers only.

    Raises: ValueError in one line.
    """
    if not 0 <= config.num_layers <= len(checkpoint.names):
        raise ValueError(
            f"{checkpoint.directory} has {len(checkpoint.names)} tensors, too few for num_layers={config.num_layers}; "
            "use the config that it was made with"
        )
    expected = parameter_shapes(config)
    missing, unexpected = expected.keys() - checkpoint.infos.keys(), checkpoint.infos.keys() - expected.keys()
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint.directory} does not fit a {model_kind(config)} model of {config.num_layers} layers: "
            f"missing {name_list(missing) or 'nothing'}; unexpected {name_list(unexpected) or 'nothing'}"
        )
    for name, info in checkpoint.infos.items():
        if info.shape != expected[name] or not info.dtype.is_floating_point:
            raise ValueError(
                f"{checkpoint.directory} does not fit its config: {name} is {info}, expected {list(expected[name])}; "
                "use the config that it was made with"
            )


def save_model(
    directory: Path,
    model: CogVideoTransformer | SuperresTransformer,
    *,
    extra: dict[str, Any] | None = None,
    trunk: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model's tensors and config; without the tensors of `trunk` (a checkpoint beside it) if given.

    Raises: ValueError if the model's trunk is not the one in `trunk`, a weight to be written is quantized, or the model
    has adapters.
    """
    if has_adapters(model):
        raise ValueError("the model has adapters, which checkpoints do not hold; save the adapters separately")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    scales = quantization_scales(model)
    if trunk is not None:
        extra_names = {name for name, _ in model.extra_parameters()}
        check_holds(trunk, [name for name in tensors if name not in extra_names], tensors.__getitem__, scales)
        tensors = {name: tensor for name, tensor in tensors.items() if name in extra_names}
        scales = {name: scale for name, scale in scales.items() if name in extra_names}
    if scales:
        raise ValueError(f"{min(scales)} is quantized, which checkpoints cannot hold; save the original model")
    save_checkpoint(
        directory, tensors, stored_settings(model), extra=extra, trunk=trunk, max_shard_bytes=max_shard_bytes
    )


def stored_settings(model: CogVideoTransformer | SuperresTransformer) -> dict[str, Any]:
    """The config that a checkpoint of this model holds."""
    return {"superres" if isinstance(model, SuperresTransformer) else "model": to_dict(model.config)}


def quantization_scales(model: nn.Module) -> dict[str, Tensor]:
    """The scales of quantized weights, by the weights' names."""
    return {
        f"{name}.weight": module.weight_scale.cpu()
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding) and module.weight_scale is not None
    }


def check_holds(trunk: Path, names: Iterable[str], read: Callable[[str], Tensor], scales: Mapping[str, Tensor]) -> None:
    """Check that the checkpoint `trunk` holds a model's tensors of these names, which `read` returns.

    Raises: ValueError if it holds others.
    """
    shared = load_checkpoint(trunk, verify=False)
    for name in names:
        if name not in shared.infos or not _is_made_from(read(name).cpu(), scales.get(name), shared.tensor(name)):
            raise ValueError(f"{trunk} does not hold this model's {name}; save the model without trunk=")


def _is_made_from(weight: Tensor, scale: Tensor | None, stored: Tensor) -> bool:
    """Whether a model's weight, in a training type (bf16, or quantized with its scale), is a cast of the stored one."""
    if scale is None:
        return torch.equal(stored.to(weight.dtype), weight)
    stored_scale, stored_weight = quantize(stored, "int8" if weight.dtype == torch.int8 else "float8")
    return torch.equal(stored_scale, scale) and torch.equal(stored_weight.view(torch.uint8), weight.view(torch.uint8))


def load_model(
    directory: Path,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> CogVideoTransformer:
    """Load a video or text-to-image model in evaluation mode, in the stored type unless `dtype` is given.

    Parameters that stay on the CPU in the file's type are memory-mapped pages of it, copied only when written to.
    Raises: FileNotFoundError; ValueError in one line for damaged files, or tensors that are missing, unexpected or of
    another shape than the config (the checkpoint's, or the one given) says.
    """
    return build_model(load_checkpoint(directory, verify=verify), config=config, dtype=dtype, device=device)


def build_model(
    checkpoint: Checkpoint,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CogVideoTransformer:
    """Build the video or text-to-image model of an open checkpoint; arguments and errors as for `load_model`."""
    if config is None:
        stored = stored_config(checkpoint)
        if not isinstance(stored, ModelConfig):
            raise ValueError(
                f"{checkpoint.directory} holds a super-resolution model, expected a video or text-to-image model"
            )
        config = stored
    return _build(CogVideoTransformer, config, checkpoint, dtype, device)


def build_superres(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> SuperresTransformer:
    """Build the super-resolution model of an open checkpoint; arguments and errors as for `load_model`."""
    config = stored_config(checkpoint)
    if not isinstance(config, SuperresConfig):
        raise ValueError(
            f"{checkpoint.directory} holds a video or text-to-image model, expected a super-resolution model"
        )
    return _build(SuperresTransformer, config, checkpoint, dtype, device)


def _build(
    model_class: Callable[[C], M],
    config: C,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> M:
    check_fits(checkpoint, config)
    model = on_meta(lambda: model_class(config))
    tensors = {name: checkpoint.tensor(name).to(device=device, dtype=dtype) for name in checkpoint.names}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def on_meta(make: Callable[[], M]) -> M:
    """A module whose parameters are on the meta device: shapes and types without memory."""
    with torch.device("meta"), _SkipInitialisation():
        return make()


class _SkipInitialisation(TorchFunctionMode):
    """Skip random initial values: meta parameters hold none, yet torch would import 800 modules to draw them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (init.normal_, init.uniform_, init.kaiming_uniform_):
            return None
        return func(*args, **(kwargs or {}))


save_pretrained = save_model
"""`save_model` under the name that Hugging Face users expect."""


def from_pretrained(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CogVideoTransformer:
    """Load from a local folder, or from USER/REPO[/FOLDER] of the Hugging Face hub (extra `[hub]`).

    Raises: as `load_model`, and as `hub.resolve`.
    """
    source = path_or_repo if revision is None else f"{path_or_repo}@{revision}"
    return load_model(resolve(source), dtype=dtype, device=device)
