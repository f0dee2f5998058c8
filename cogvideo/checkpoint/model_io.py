"""A transformer to and from a checkpoint folder, and model hubs' conventions. The format itself is `format.py`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from cogvideo.checkpoint.describe import check_fits, describe
from cogvideo.checkpoint.format import MAX_SHARD_BYTES, Checkpoint, load_checkpoint, save_checkpoint
from cogvideo.config import to_dict
from cogvideo.model.config import ModelConfig
from cogvideo.model.quantize import Embedding, Linear, quantised
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.transformer import SuperresTransformer

C = TypeVar("C", ModelConfig, SuperresConfig)
M = TypeVar("M", bound=nn.Module)


def save_model(
    directory: Path,
    model: CogVideoTransformer | SuperresTransformer,
    *,
    extra: dict[str, Any] | None = None,
    trunk: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model's tensors and config. With `trunk` (a checkpoint beside this one) its tensors are left out.

    Raises: ValueError if the model's trunk is not the one that `trunk` holds, or if int8 weights would be written.
    """
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    scales = {
        f"{name}.weight": module.weight_scale.cpu()
        for name, module in model.named_modules()
        if isinstance(module, Linear | Embedding) and module.weight_scale is not None
    }
    if trunk is not None:
        shared = load_checkpoint(trunk, verify=False)
        own = {name for name, _ in model.added_parameters()}
        for name in tensors.keys() - own:
            if name not in shared.infos or not _holds(tensors[name].cpu(), scales.pop(name, None), shared.tensor(name)):
                raise ValueError(f"{trunk} does not hold this model's {name}; save the model whole")
        tensors = {name: tensor for name, tensor in tensors.items() if name in own}
    if scales:
        raise ValueError(f"{min(scales)} is int8, of which no checkpoint is made; save the model that it was made from")
    config = {"superres" if isinstance(model, SuperresTransformer) else "model": to_dict(model.config)}
    save_checkpoint(directory, tensors, config, extra=extra, trunk=trunk, max_shard_bytes=max_shard_bytes)


def _holds(ours: Tensor, scale: Tensor | None, stored: Tensor) -> bool:
    """Whether what a model holds, be it in bf16 or int8 for training, was made from what is stored."""
    if scale is None:
        return torch.equal(stored.to(ours.dtype), ours)
    its_scale, its = quantised(stored)
    return torch.equal(its_scale, scale) and torch.equal(its, ours)


def load_model(
    directory: Path,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    verify: bool = True,
) -> CogVideoTransformer:
    """The model of a checkpoint folder, in evaluation mode. `dtype`: as stored, unless given.

    Where type and device are the stored ones, parameters are the file's own mapped pages, copied only when written to.
    Raises: FileNotFoundError, or ValueError in one line, if a tensor is missing, unexpected or of another shape than
    the config (the checkpoint's, or the one given) says.
    """
    return model_of(load_checkpoint(directory, verify=verify), config=config, dtype=dtype, device=device)


def model_of(
    checkpoint: Checkpoint,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CogVideoTransformer:
    """As `load_model`, of a checkpoint that is open."""
    if config is None:
        stored = describe(checkpoint)
        if not isinstance(stored, ModelConfig):
            raise ValueError(f"{checkpoint.directory} holds a super-resolution model, expected one of clips or images")
        config = stored
    return _filled(CogVideoTransformer, config, checkpoint, dtype, device)


def superres_of(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> SuperresTransformer:
    """As `model_of`, of a super-resolution model. Raises: as that, and ValueError for any other model."""
    config = describe(checkpoint)
    if not isinstance(config, SuperresConfig):
        raise ValueError(f"{checkpoint.directory} holds a model of clips or images, expected a super-resolution model")
    return _filled(SuperresTransformer, config, checkpoint, dtype, device)


def _filled(
    made: Callable[[C], M], config: C, checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device | str
) -> M:
    check_fits(checkpoint, config)
    with torch.device("meta"), _NothingRandom():
        model = made(config)
    tensors = {name: checkpoint.tensor(name).to(device=device, dtype=dtype) for name in checkpoint.names}
    model.load_state_dict(tensors, assign=True)
    return model.eval()


class _NothingRandom(TorchFunctionMode):
    """Draw no starting values: parameters on the meta device have none, but torch imports 800 modules to draw them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (init.normal_, init.uniform_, init.kaiming_uniform_):
            return None
        return func(*args, **(kwargs or {}))


def save_pretrained(directory: Path, model: CogVideoTransformer) -> None:
    """As `save_model`; the name that model hubs' users look for."""
    save_model(directory, model)


def from_pretrained(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CogVideoTransformer:
    """Load from a local folder, or from a repository of the Hugging Face hub if huggingface_hub is installed.

    Raises: as `load_model`; ValueError if it is neither a folder nor, without huggingface_hub, can be fetched.
    """
    if Path(path_or_repo).is_dir():
        return load_model(Path(path_or_repo), dtype=dtype, device=device)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{path_or_repo} is no local folder, and huggingface_hub, which could fetch it, is not installed; "
            "give a folder or `pip install huggingface_hub`"
        ) from None
    try:
        folder = snapshot_download(str(path_or_repo), revision=revision, allow_patterns=["*.json", "*.safetensors"])
    except Exception as error:  # of many kinds: network, names, permissions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path_or_repo} is no local folder and could not be fetched: {reason}") from None
    return load_model(Path(folder), dtype=dtype, device=device)
