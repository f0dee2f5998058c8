"""The shipped full-size configs have the names and shapes of the published checkpoints; no weights are allocated."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from cogvideo.checkpoint.parameters import parameter_shapes
from cogvideo.config import load_config
from cogvideo.model.config import ModelConfig
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.superres.config import SuperresConfig
from tests.helpers.packs import GOLDEN, our_name

CONFIGS = Path(__file__).parents[2] / "configs" / "model"
PUBLISHED = json.loads((GOLDEN / "params_full_size.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class File:
    model: ModelConfig = field(default_factory=ModelConfig)
    superres: SuperresConfig = field(default_factory=SuperresConfig)


def load(name: str) -> File:
    return load_config(File, [CONFIGS / f"{name}.yaml"])


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Our names and the published shapes of a stage."""
    shapes: dict[str, tuple[int, ...]] = {}
    for pattern, (shape, *layers) in PUBLISHED["params"].items():
        names = [pattern.replace("{i}", str(i)) for i in range(layers[0])] if layers else [pattern]
        shapes |= {our_name(name): tuple(shape) for name in names}
    return shapes


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in CogVideoTransformer(config).named_parameters()}


@pytest.mark.parametrize("name", ["cogvideo_stage1", "cogvideo_stage2"])
def test_stages(name: str) -> None:
    config = load(name).model
    shapes = shapes_of(config)
    assert shapes == published_shapes()
    assert sum(map(math.prod, shapes.values())) == PUBLISHED["counts"]["total"] == 7_721_127_936
    assert (config.task, config.window_size) == (("sequential", None) if name[-1] == "1" else ("interpolation", 10))


def test_trunk() -> None:
    shapes = shapes_of(load("cogview2").model)
    everything = published_shapes()
    assert shapes == {name: everything[name] for name in shapes}
    assert sum(map(math.prod, shapes.values())) == PUBLISHED["counts"]["frozen"] == 5_902_307_328


@pytest.mark.parametrize(("name", "total"), [("cogview2_dsr", 7_725_895_680), ("cogview2_itersr", 5_913_366_528)])
def test_super_resolution(name: str, total: int) -> None:
    config = load(name).superres
    assert sum(math.prod(shape) for shape in parameter_shapes(config).values()) == total


def test_every_shipped_model_config_loads() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        load_config(File, [file])
