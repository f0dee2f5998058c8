"""The table of parameters, compared with the models and with the published counts."""

import math

import pytest

from cogvideo.checkpoint.parameters import ModelKind, Sizes, model_parameters, parameter_shapes
from cogvideo.model.config import ModelConfig, ModelTask
from cogvideo.model.transformer import CogVideoTransformer, is_temporal
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.transformer import SuperresTransformer


@pytest.mark.parametrize("task", ["image", "sequential", "interpolation"])
def test_table_matches_the_model(task: ModelTask) -> None:
    config = ModelConfig(task=task, num_layers=3, hidden_size=16, num_heads=2, text_len=8, frame_side=4)
    model = CogVideoTransformer(config)
    shapes = parameter_shapes(config)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    trunk = {p.name for p in model_parameters("image", config.num_layers)}
    assert {name for name in shapes if is_temporal(name)} == shapes.keys() - trunk


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_table_matches_the_superres_model(method: str) -> None:
    config = SuperresConfig(method, 3, 16, 2, 8, low_res_side=3, high_res_side=6, num_positions=600)  # type: ignore[arg-type]
    model = SuperresTransformer(config)
    assert parameter_shapes(config) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "extra", "count"),
    [
        ("image", 0, 5_902_307_328),
        ("video", 2000, 7_721_127_936),
        ("direct_superres", 3600, 7_725_895_680),
        ("iterative_superres", 3600, 5_913_366_528),
    ],
)
def test_published_counts(kind: ModelKind, extra: int, count: int) -> None:
    sizes = Sizes(48, 3072, 150010, 1024, extra)
    parameters = model_parameters(kind, 48)
    assert sum(math.prod(sizes.shape_of(p)) for p in parameters) == count
    assert len({p.name for p in parameters}) == len({p.sat_name for p in parameters}) == len(parameters)
