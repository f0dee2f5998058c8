"""Adapters for loaded models: applied, changed without reloading the model, and removed without a trace.

An adapted layer stands in for the original, which stays in memory unchanged: removing the adapters puts it back, and
models that share a trunk's layers do not share adapters.
"""

import contextlib
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cogvideo.checkpoint.adapter import (
    MAX_SCALE,
    SETTINGS,
    WEIGHTS,
    Adapter,
    check_base,
    check_fingerprint,
    load_adapter,
    merged_weight,
)
from cogvideo.checkpoint.format import Checkpoint
from cogvideo.config import expand_path
from cogvideo.files import sha256_file
from cogvideo.hub import describe, resolve
from cogvideo.model.lora import Matrix, adapted_layer, matrices, set_weight
from cogvideo.model.quantize import Linear, LowRank
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.superres.transformer import SuperresTransformer

Model = CogVideoTransformer | SuperresTransformer


class AdapterChoice(NamedTuple):
    """An adapter's folder, and the scale that its update is multiplied by."""

    folder: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "AdapterChoice":
        """Parse `DIR` or `DIR:SCALE`; if the whole text names a folder, it is DIR. DIR is as for `hub.resolve`.

        Raises: ValueError; OSError if it cannot be fetched.
        """
        folder, scale = text, 1.0
        before, colon, number = text.rpartition(":")
        if colon and not Path(text).is_dir():
            with contextlib.suppress(ValueError):
                folder, scale = before, float(number)
        if not folder:
            raise ValueError(f"--adapter {text}: expected DIR or DIR:SCALE")
        scale = check_scale(scale, text)
        return cls(resolve(expand_path(folder)), scale)

    def __str__(self) -> str:
        return describe(self.folder) if self.scale == 1 else f"{describe(self.folder)}:{self.scale:g}"

    def identity(self) -> dict[str, Any]:
        """What determines its effect, ready for JSON."""
        hashes = [sha256_file(self.folder / name) for name in (WEIGHTS, SETTINGS)]
        return {"sha256": hashlib.sha256(" ".join(hashes).encode()).hexdigest(), "scale": self.scale}


def check_scale(scale: float, name: str) -> float:
    """Raises: ValueError for a scale that is not finite or absurdly large."""
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise ValueError(f"adapter {name}: scale {scale}; expected a number from -{MAX_SCALE:g} to {MAX_SCALE:g}")
    return scale


class AdapterSet:
    """The adapters loaded for the models of a pipeline, and which of them are in effect."""

    def __init__(self, models: Mapping[str, Model], checkpoints: Mapping[str, Checkpoint]) -> None:
        """Both by the models' names in a bundle; `checkpoints`, what the models were loaded from, may lack some."""
        self._models = {name: AdaptedModel(model, checkpoints.get(name)) for name, model in models.items()}
        self._adapters: dict[str, tuple[str, Adapter]] = {}

    def add(self, name: str, folder: Path) -> None:
        """Read an adapter for the model that it was trained for; if it does not record one, for the first model.

        Raises: FileNotFoundError, ValueError if it is damaged or does not fit.
        """
        adapter = load_adapter(folder)
        part = next(iter(self._models)) if adapter.base is None else adapter.base["model"]
        if part not in self._models:
            raise ValueError(f"{folder} is for the model {part[:40]}; this pipeline has only {', '.join(self._models)}")
        adapted = self._models[part]
        check_base(adapter, part, {layer: _shape_of(module) for layer, module in matrices(adapted.model).items()})
        if adapted.stored is not None:
            check_fingerprint(adapter, adapted.stored)
        self._adapters[name] = part, adapter

    @property
    def in_effect(self) -> bool:
        """Whether any adapter is in effect."""
        return any(adapted.is_changed for adapted in self._models.values())

    def check(self, scales: Mapping[str, float]) -> None:
        """Raises: ValueError for an unknown name or an invalid scale."""
        for name, scale in scales.items():
            if name not in self._adapters:
                raise ValueError(
                    f"no adapter is named {name!r}; call add_adapter first (added so far: {list(self._adapters)})"
                )
            check_scale(scale, name)

    def set(self, scales: Mapping[str, float], *, merge: bool) -> bool:
        """Replace the adapters in effect with these, which passed `check`, each multiplied by its scale.

        Returns whether any model changed. If anything is raised, no adapter is left in effect in any model.
        """
        known = [(*self._adapters[name], scale) for name, scale in scales.items()]
        try:
            changed = [
                adapted.set([(adapter, scale) for of, adapter, scale in known if of == part], merge=merge)
                for part, adapted in self._models.items()
            ]
        except BaseException:
            for adapted in self._models.values():
                adapted.set([], merge=merge)
            raise
        return any(changed)


def _shape_of(layer: Matrix) -> tuple[int, int]:
    """(rows, columns) of a layer's matrix, however it is stored."""
    if isinstance(layer, Linear):
        return layer.out_features, layer.in_features
    return layer.num_embeddings, layer.embedding_dim


class AdaptedModel:
    """A model whose layers have stand-ins while adapters are in effect."""

    def __init__(self, model: Model, stored: Checkpoint | None = None) -> None:
        """`stored`: what the model was loaded from, whose exact weights are merged even if the model is quantized."""
        self.model, self.stored = model, stored
        self._originals: dict[str, Matrix] = {}

    @property
    def is_changed(self) -> bool:
        return bool(self._originals)

    def set(self, adapters: Sequence[tuple[Adapter, float]], *, merge: bool) -> bool:
        """Replace the adapters in effect with these, each multiplied by its weight; none: restore the original model.

        `merge` adds them to the weights; otherwise their products are computed beside the weights in every pass.
        Returns whether anything changed. Raises: ValueError, with no adapter in effect, if weights cannot be merged.
        """
        changed = bool(self._originals or adapters)
        for name, original in self._originals.items():
            self._replace(name, original)
        self._originals.clear()
        layers = matrices(self.model)
        names = sorted({layer for adapter, _ in adapters for layer in adapter.factors})
        stand_ins = {name: self._stand_in(name, layers[name], adapters, merge) for name in names}
        for name, stand_in in stand_ins.items():
            self._originals[name] = layers[name]
            self._replace(name, stand_in)
        return changed

    def _stand_in(self, name: str, layer: Matrix, adapters: Sequence[tuple[Adapter, float]], merge: bool) -> Matrix:
        stand_in = adapted_layer(layer)
        if not merge:
            stand_in.lora = _joined([(one, weight) for one, weight in adapters if name in one.factors], name)
            stand_in.lora.to(self.model.final_layernorm.weight)
        elif self.stored is not None:
            set_weight(stand_in, merged_weight(self.stored.tensor(f"{name}.weight"), name, adapters))
        elif layer.weight_scale is not None:
            raise ValueError(
                "adapters cannot be merged into quantized weights without their checkpoint; use merge=False"
            )
        else:
            set_weight(stand_in, merged_weight(layer.weight.detach().cpu(), name, adapters))
        return stand_in

    def _replace(self, name: str, layer: Matrix) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.model.get_submodule(parent), last, layer)


def _joined(parts: Sequence[tuple[Adapter, float]], layer: str) -> LowRank:
    """The updates of several adapters, each multiplied by its weight, as one whose rank is the sum of theirs."""
    a = torch.cat([adapter.factors[layer].a for adapter, _ in parts])
    b = torch.cat([adapter.factors[layer].b * (adapter.scale * weight) for adapter, weight in parts], 1)
    with torch.device("meta"):
        joined = LowRank(a.shape[1], b.shape[0], len(a), 1.0)
    joined.A, joined.B = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
    return joined.eval()
