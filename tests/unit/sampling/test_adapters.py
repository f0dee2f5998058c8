"""Adapters in a pipeline: merged or apart they draw alike, and taken out they leave no trace."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from cogvideo.checkpoint.adapter import Base, fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model
from cogvideo.kernels import decode_cpu
from cogvideo.model.lora import has_adapters
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sampling.adapters import AdapterChoice
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.pipeline import Pipeline
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import write_bundle
from tests.helpers.models import tiny_batch

PROMPTS = ["the red digit 3 moves left slowly"]
CONFIG = SampleConfig(rounds=1, num_clusters=8)
WEIGHTS = ["fp32", "bf16", "int8", "int4"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def adapters(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, written = tmp_path_factory.mktemp("adapters"), {}
    for name, part, targets in (
        ("a", "sequential", ()),
        ("b", "sequential", ("temporal", "embeddings")),
        ("second", "interpolation", ("mlp",)),
        ("first", "trunk", ("spatial", "mlp")),
    ):
        record = Base(model=part, sha256=fingerprint(load_checkpoint(bundle / part)), step=1)
        model = load_model(bundle / part)
        written[name] = write_adapter(folder / name, model, record, targets=targets, seed=len(written))
    return written


def open_pipeline(bundle: Path, adapters: dict[str, Path], weights: str = "fp32") -> Pipeline:
    pipeline = Pipeline.load(bundle, SampleConfig(weights=weights))  # type: ignore[arg-type]
    for name, folder in adapters.items():
        pipeline.add_adapter(name, folder)
    return pipeline


def losses(model: CogVideoTransformer | None) -> Tensor:
    assert model is not None
    with torch.no_grad():
        return model.token_losses(tiny_batch(model.config))


def state(pipeline: Pipeline) -> dict[str, Tensor]:
    models = {"trunk": pipeline.trunk, "sequential": pipeline.sequential, "interpolation": pipeline.interpolation}
    return {
        f"{name}.{key}": tensor.clone()
        for name, model in models.items()
        if model is not None
        for key, tensor in (*model.named_parameters(), *model.named_buffers())
    }


@pytest.mark.parametrize("weights", WEIGHTS)
def test_taken_out_they_leave_no_trace(weights: str, bundle: Path, adapters: dict[str, Path]) -> None:
    pipeline = open_pipeline(bundle, adapters, weights)
    before, tokens = state(pipeline), pipeline.sample(PROMPTS, CONFIG)
    drawn = []
    for merge in (True, False):
        pipeline.set_adapters({"a": 1.0, "b": -0.5, "second": 2.0, "first": 1.0}, merge=merge)
        drawn.append(pipeline.sample(PROMPTS, CONFIG))
        assert not torch.equal(drawn[-1], tokens)
    if weights == "fp32":
        assert torch.equal(*drawn)
    pipeline.set_adapters({})
    after = state(pipeline)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(pipeline.sample(PROMPTS, CONFIG), tokens)


def test_each_changes_the_model_that_it_is_for_alone(bundle: Path, adapters: dict[str, Path]) -> None:
    pipeline = open_pipeline(bundle, adapters)
    for name, part in (("a", "sequential"), ("second", "interpolation"), ("first", "trunk")):
        models = {"trunk": pipeline.trunk, "sequential": pipeline.sequential, "interpolation": pipeline.interpolation}
        pipeline.set_adapters({})
        before = {key: losses(model) for key, model in models.items()}
        pipeline.set_adapters({name: 1.0})
        assert {key for key, model in models.items() if not torch.equal(losses(model), before[key])} == {part}


@pytest.mark.parametrize(("weights", "rounding"), [("fp32", 1e-5), ("int8", 0.05), ("int4", 0.5)])
def test_scales_add_up_and_apart_is_what_merged_is(
    weights: str, rounding: float, bundle: Path, adapters: dict[str, Path]
) -> None:
    pipeline = open_pipeline(bundle, adapters, weights)
    pipeline.add_adapter("again", adapters["a"])
    found = []
    for scales, merge in (({"a": 0.75}, True), ({"a": 0.5, "again": 0.25}, True), ({"a": 0.5, "again": 0.25}, False)):
        pipeline.set_adapters(scales, merge=merge)
        found.append(losses(pipeline.sequential))
    assert torch.allclose(found[0], found[1], atol=rounding)
    assert torch.allclose(found[0], found[2], atol=rounding)


def test_merged_models_use_the_kernels_and_others_do_not(bundle: Path, adapters: dict[str, Path]) -> None:
    pipeline = open_pipeline(bundle, adapters)
    pipeline.set_adapters({"a": 1.0}, merge=False)
    assert has_adapters(pipeline.sequential) and not has_adapters(pipeline.trunk)
    assert not decode_cpu.is_supported(pipeline.sequential, [])
    pipeline.set_adapters({"a": 1.0})
    assert not has_adapters(pipeline.sequential)


def test_names_and_scales_are_checked_before_anything_changes(bundle: Path, adapters: dict[str, Path]) -> None:
    pipeline = open_pipeline(bundle, {"a": adapters["a"]})
    pipeline.set_adapters({"a": 1.0})
    before = losses(pipeline.sequential)
    for scales, message in (({"b": 1.0}, "no adapter 'b'"), ({"a": float("nan")}, "scale nan"), ({"a": 1e9}, "scale")):
        with pytest.raises(ValueError, match=message):
            pipeline.set_adapters(scales)
    assert torch.equal(losses(pipeline.sequential), before)


def test_an_adapter_of_another_bundle_is_refused(bundle: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    larger = Pipeline.load(write_bundle(tmp_path / "larger", num_layers=3))
    with pytest.raises(ValueError, match="other weights"):
        larger.add_adapter("a", adapters["a"])
    smaller = Pipeline.load(write_bundle(tmp_path / "smaller", num_layers=1))
    with pytest.raises(ValueError, match=r"has no matrix layers\.1"):
        smaller.add_adapter("a", adapters["a"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", ("a", 1.0)), ("a:0.5", ("a", 0.5)), ("a:b", ("a:b", 1.0)), ("x/a:b:-2", ("x/a:b", -2.0))],
)
def test_words_of_the_command_line(text: str, expected: tuple[str, float]) -> None:
    assert AdapterChoice.parse(text) == (Path(expected[0]), expected[1])


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:1e9", ":1", ""])
def test_words_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="adapter"):
        AdapterChoice.parse(text)
