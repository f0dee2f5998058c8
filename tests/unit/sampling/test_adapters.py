"""Adapters in a pipeline: merged or apart they draw alike, and taken out they leave no trace."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo.checkpoint.adapter import Base, fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model
from cogvideo.inference.backends import BACKENDS, EagerBackend
from cogvideo.kernels import cpu, decode_cpu
from cogvideo.model.decode import decode_layers
from cogvideo.model.inputs import DecodeInputs
from cogvideo.model.lora import has_adapters
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sampling import adapters as adapters_module
from cogvideo.sampling.adapters import AdapterChoice
from cogvideo.sampling.bundle import open_bundle
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
    return write_bundle(tmp_path_factory.mktemp("bundle") / "bundle", shared_trunk=True)


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


class RecordingBackend(EagerBackend):
    """Decodes by layers of its own, and reads memory where the first step found it, as recorded graphs do."""

    def __init__(self, model: CogVideoTransformer) -> None:
        super().__init__(model)
        self._layers = decode_layers(model)
        self._recorded: list[tuple[int, tuple[int, ...]]] | None = None

    def decode(self, steps: Sequence[DecodeInputs]) -> list[Tensor]:
        tensors = [x for layer in self._layers for x in (*layer.parameters(), *layer.buffers())]
        places = [(x.data_ptr(), tuple(x.shape)) for x in tensors]
        self._recorded = self._recorded or places
        assert places == self._recorded, "a graph would read memory that is freed or old"
        return [step.finish(self.model.decode(step, layers=self._layers)) for step in steps]


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch, bundle: Path, adapters: dict[str, Path]) -> Pipeline:
    """A pipeline whose models share the trunk's layers, each decoded by graphs as it were."""
    monkeypatch.setitem(BACKENDS, "recording", RecordingBackend)
    opened = open_bundle(bundle, "fp32", torch.device("cpu"))
    pipeline = Pipeline(
        encode=opened.text_tokenizer.encode,
        prompt_format=opened.config.prompt,
        image_tokenizer=opened.image_tokenizer,
        sequential=opened.sequential,
        trunk=opened.trunk,
        interpolation=opened.interpolation,
        labels=opened.labels,
        backend="recording",
        checkpoints=opened.checkpoints,
    )
    assert opened.trunk.layers[0].attention.query_key_value is opened.sequential.layers[0].attention.query_key_value
    for name, folder in adapters.items():
        pipeline.add_adapter(name, folder)
    return pipeline


@pytest.mark.parametrize("merge", [True, False])
def test_engines_of_all_models_read_the_weights_of_today(recording: Pipeline, merge: bool) -> None:
    tokens = recording.sample(PROMPTS, CONFIG)
    for name in ("a", "second", "first"):
        recording.set_adapters({name: 1.0}, merge=merge)
        recording.sample(PROMPTS, CONFIG)
    recording.set_adapters({})
    assert torch.equal(recording.sample(PROMPTS, CONFIG), tokens)


def test_a_failure_halfway_leaves_no_adapter_and_no_old_engine(
    recording: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, engines, left = recording.sample(PROMPTS, CONFIG), set(recording.engines.values()), [3]
    merged = adapters_module.merged_weight

    def run_out(*words: Any) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no memory")
        return merged(*words)

    with monkeypatch.context() as patch:
        patch.setattr(adapters_module, "merged_weight", run_out)
        with pytest.raises(torch.OutOfMemoryError):
            recording.set_adapters({"second": 1.0, "a": 1.0})
    assert engines.isdisjoint(recording.engines.values()) and len(recording.engines) == 3
    assert torch.equal(recording.sample(PROMPTS, CONFIG), tokens)


def test_engines_stay_where_nothing_changes(recording: Pipeline) -> None:
    """What they compiled and recorded is worth keeping."""
    engines = set(recording.engines.values())
    recording.set_adapters({})
    with pytest.raises(ValueError, match="no adapter is named 'c'"):
        recording.set_adapters({"c": 1.0})
    assert engines == set(recording.engines.values())


def test_merged_models_use_the_kernels_and_others_do_not(bundle: Path, adapters: dict[str, Path]) -> None:
    def uses_kernels(model: CogVideoTransformer) -> bool:
        with torch.inference_mode():  # with gradients, no model does
            return decode_cpu.is_supported(model, [])

    pipeline, available = open_pipeline(bundle, adapters), cpu.library() is not None
    pipeline.set_adapters({"a": 1.0}, merge=False)
    assert has_adapters(pipeline.sequential) and not has_adapters(pipeline.trunk)
    assert not uses_kernels(pipeline.sequential) and uses_kernels(pipeline.trunk) == available
    pipeline.set_adapters({"a": 1.0})
    assert not has_adapters(pipeline.sequential) and uses_kernels(pipeline.sequential) == available


def test_names_and_scales_are_checked_before_anything_changes(bundle: Path, adapters: dict[str, Path]) -> None:
    pipeline = open_pipeline(bundle, {"a": adapters["a"]})
    pipeline.set_adapters({"a": 1.0})
    before = losses(pipeline.sequential)
    for scales, message in (
        ({"b": 1.0}, "no adapter is named 'b'"),
        ({"a": float("nan")}, "scale nan"),
        ({"a": 1e9}, "scale"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.set_adapters(scales)
    assert torch.equal(losses(pipeline.sequential), before)


def test_an_adapter_of_another_bundle_is_refused(bundle: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    larger = Pipeline.load(write_bundle(tmp_path / "larger", num_layers=3))
    with pytest.raises(ValueError, match="different base weights"):
        larger.add_adapter("a", adapters["a"])
    smaller = Pipeline.load(write_bundle(tmp_path / "smaller", num_layers=1))
    with pytest.raises(ValueError, match=r"has no matrix layers\.1"):
        smaller.add_adapter("a", adapters["a"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", 1.0)),
        ("a:0.5", ("a", 0.5)),
        ("a:b", ("a:b", 1.0)),
        ("x/a:b:-2", ("x/a:b", -2.0)),
        ("7", ("7", 1.0)),
        ("nan", ("nan", 1.0)),
        ("1e5:2", ("1e5", 2.0)),
    ],
)
def test_words_of_the_command_line(text: str, expected: tuple[str, float]) -> None:
    assert AdapterChoice.parse(text) == (Path(expected[0]), expected[1])


def test_a_folder_whose_name_ends_like_a_scale(tmp_path: Path) -> None:
    (tmp_path / "run:2").mkdir()
    assert AdapterChoice.parse(f"{tmp_path}/run:2") == (tmp_path / "run:2", 1.0)
    assert AdapterChoice.parse(f"{tmp_path}/run:2:0.5") == (tmp_path / "run:2", 0.5)
    assert AdapterChoice.parse(f"{tmp_path}/run:3") == (tmp_path / "run", 3.0)


@pytest.mark.parametrize("text", ["a:nan", "a:inf", "a:1e9", ":1", ""])
def test_words_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="adapter"):
        AdapterChoice.parse(text)
