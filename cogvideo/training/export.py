"""Exports of a run: the model in our checkpoint format, with a frozen trunk written once beside it; or adapters only.

With ZeRO 3 every rank takes part and rank 0 writes, one parameter at a time: no rank ever holds the whole model.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from cogvideo.checkpoint.adapter import Base, fingerprint, model_name, save_adapter
from cogvideo.checkpoint.format import load_checkpoint, write_checkpoint
from cogvideo.checkpoint.load import check_holds, quantization_scales, stored_settings
from cogvideo.checkpoint.parameters import TransformerConfig
from cogvideo.config import to_dict
from cogvideo.distributed import store_barrier
from cogvideo.files import atomic_directory, remove_leftovers
from cogvideo.model.config import LoraConfig, ModelConfig
from cogvideo.model.lora import adapter_parameters
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.tensor_file import TensorInfo
from cogvideo.tokenizers.records import TokenizerRecords
from cogvideo.training.config import TrainConfig
from cogvideo.training.deepspeed_engine import gathered
from cogvideo.training.optimiser import full_shape

Model = CogVideoTransformer | SuperresTransformer


ADAPTER = "adapter"
"""The folder in run_dir/export where adapters go."""


def base_of(config: TrainConfig, model: TransformerConfig) -> Base | None:
    """The base model of a run's adapters; None if it trains none."""
    if not config.lora.rank or config.init.checkpoint is None:
        return None
    stored = load_checkpoint(config.init.checkpoint, verify=False)
    return Base(model=model_name(model), sha256=fingerprint(stored), step=0)


class FrozenTrunk:
    """A trunk that a run does not train."""

    def __init__(self, source: Path, config: ModelConfig) -> None:
        """`source`: the checkpoint that it was loaded from; `config`: that of the trunk alone."""
        self.source, self.config = source, config
        self.is_verified = False
        """Whether this process has compared the exported trunk with the one in memory; once is enough."""


def export_model(folder: Path, model: Model, extra: dict[str, Any], frozen: FrozenTrunk | None) -> None:
    """Write `folder`; every rank must call this. A frozen trunk goes to trunk/ beside it, and `folder` refers to it.

    Raises: OSError on rank 0 if it cannot be written; ValueError if trunk/ holds a different trunk.
    """
    _write_on_rank_0(dict(model.named_parameters()), lambda read: _write(folder, model, extra, frozen, read))


def export_adapter(folder: Path, model: Model, config: LoraConfig, base: Base) -> None:
    """Write a model's adapters into `folder`; every rank must call this. Raises: OSError on rank 0."""
    parameters = dict(adapter_parameters(model))
    infos = {name: TensorInfo(p.dtype, full_shape(p)) for name, p in parameters.items()}

    def write(read: Callable[[str], Tensor]) -> None:
        remove_leftovers(folder)
        save_adapter(folder, config, infos, read, base)

    _write_on_rank_0(parameters, write)


def _write_on_rank_0(parameters: dict[str, Any], write: Callable[[Callable[[str], Tensor]], None]) -> None:
    """Run `write` on rank 0, with a function that reads parameters by name; the others help to gather ZeRO 3's."""
    is_partitioned = any(hasattr(p, "ds_id") for p in parameters.values())
    if dist.is_initialized() and dist.get_rank() != 0:
        if is_partitioned:
            _gather_for_rank_0(parameters)
        return

    def read(name: str) -> Tensor:
        if is_partitioned:
            _ask_for(name)
        with gathered([parameters[name]]):
            return parameters[name].detach().cpu()

    try:
        write(read)
    finally:
        if is_partitioned:
            _ask_for(None)


def _ask_for(name: str | None) -> None:
    """Tell the other ranks which parameter to take part in gathering; None: there are no more."""
    if dist.get_world_size() > 1:
        store_barrier()  # they wait here, and not in a collective, while rank 0 writes
        dist.broadcast_object_list([name])


def _gather_for_rank_0(parameters: dict[str, Any]) -> None:
    """Take part in gathering each parameter that rank 0 asks for, until it needs no more."""
    while True:
        wanted: list[Any] = [None]
        store_barrier()
        dist.broadcast_object_list(wanted)
        if wanted[0] is None:
            return
        with gathered([parameters[wanted[0]]]):
            pass


def _write(
    folder: Path, model: Model, extra: dict[str, Any], frozen: FrozenTrunk | None, read: Callable[[str], Tensor]
) -> None:
    trunk = None if frozen is None else folder.parent / "trunk"
    for path in (folder, folder.parent / "trunk"):
        remove_leftovers(path)  # of a run that was killed while exporting
    infos = {name: TensorInfo(p.dtype, full_shape(p)) for name, p in model.named_parameters()}
    if frozen is not None and trunk is not None:
        _export_trunk(trunk, model, frozen)
        if not frozen.is_verified:
            names = [name for name, _ in model.trunk_parameters()]
            check_holds(trunk, names, read, quantization_scales(model))
            frozen.is_verified = True
        infos = {name: infos[name] for name, _ in model.extra_parameters()}
    write_checkpoint(folder, infos, read, stored_settings(model), extra=extra, trunk=trunk)


def _export_trunk(folder: Path, model: Model, frozen: FrozenTrunk) -> None:
    if _is_complete(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    stored = load_checkpoint(frozen.source, verify=False)
    if stored.config.get("model", {}).get("task") == "image":
        with atomic_directory(folder, replace=True) as temporary:
            # an exact copy, so that the stages of one trunk can share it
            shutil.copytree(frozen.source, temporary, dirs_exist_ok=True)
        return
    # the source's tensors, not those in memory, which may be quantized
    infos = {name: stored.infos[name] for name, _ in model.trunk_parameters()}
    tokenizers = TokenizerRecords.of_export(stored.extra).to_extra()
    write_checkpoint(folder, infos, stored.tensor, {"model": to_dict(frozen.config)}, extra=tokenizers)


def _is_complete(folder: Path) -> bool:
    """Whether `folder` is a checkpoint with all its files."""
    try:
        load_checkpoint(folder, verify=False)
    except (OSError, ValueError):
        return False
    return True
