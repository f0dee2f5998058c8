"""Models to and from a folder: mapped, merged with their trunk, refused in a line where config and tensors differ."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cogvideo.checkpoint import load_checkpoint, save_checkpoint
from cogvideo.checkpoint.load import from_pretrained, load_model, save_model, save_pretrained
from cogvideo.checkpoint.sat.config import SatSettings, VocabularyIds
from cogvideo.checkpoint.sat.convert import from_sat, to_sat
from cogvideo.config import to_dict
from cogvideo.dtypes import QuantizedName
from cogvideo.files import sha256_file
from cogvideo.model.config import ModelConfig, ModelTask
from cogvideo.model.initialise import inherit_trunk, initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import Batch
from cogvideo.sequence.layout import Vocabulary
from tests.helpers.hub import Hub

VOCABULARY = Vocabulary(size=24, num_image_tokens=16, pad=16, newline=17, start_of_image=18)
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    text_len=4,
    frame_side=2,
    num_frames=3,
    num_positions=16,
    frame_position_start=8,
    vocabulary=VOCABULARY,
)


def build(task: ModelTask = "sequential", seed: int = 0) -> CogVideoTransformer:
    model = CogVideoTransformer(dataclasses.replace(CONFIG, task=task))
    initialise(model, torch.Generator().manual_seed(seed))
    return model.eval()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        text=torch.randint(16, 24, (2, 4), generator=generator),
        text_mask=torch.tensor([[True] * 4, [False] * 2 + [True] * 2]),
        frames=torch.randint(0, 16, (2, 3, 4), generator=generator),
        seconds=torch.ones(2),
    )


def assert_same(left: CogVideoTransformer, right: CogVideoTransformer) -> None:
    others = right.state_dict()
    assert left.state_dict().keys() == others.keys()
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("task", ["image", "sequential", "interpolation"])
def test_round_trip(tmp_path: Path, task: ModelTask) -> None:
    model = build(task)
    save_model(tmp_path / "m", model, extra={"step": 3})
    loaded = load_model(tmp_path / "m")
    assert_same(model, loaded)
    assert loaded.config == model.config
    assert not loaded.training
    if task != "image":
        assert torch.equal(loaded.token_losses(batch()), model.token_losses(batch()))


def test_parameters_are_memory_mapped(tmp_path: Path) -> None:
    """One mapping a file, not a copy a tensor; writing to a parameter leaves the file alone."""
    save_model(tmp_path / "m", build())
    before = sha256_file(tmp_path / "m" / "model.safetensors")
    loaded = load_model(tmp_path / "m")
    small = loaded.final_layernorm.bias
    maps = Path("/proc/self/maps")
    if maps.exists():
        spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if str(tmp_path) in line]
        assert any(int(low, 16) <= small.data_ptr() < int(high, 16) for low, high in spans)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1.0)
    assert sha256_file(tmp_path / "m" / "model.safetensors") == before
    assert_same(load_model(tmp_path / "m"), build())


def test_a_loaded_model_can_be_trained(tmp_path: Path) -> None:
    save_model(tmp_path / "m", build())
    loaded = load_model(tmp_path / "m").train()
    loaded.token_losses(batch()).mean().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_dtype_can_be_chosen(tmp_path: Path) -> None:
    save_model(tmp_path / "m", build())
    loaded = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_stage_stores_only_its_extra_parameters(tmp_path: Path) -> None:
    trunk, stage = build("image", seed=1), build(seed=2)
    inherit_trunk(stage, trunk.state_dict())
    save_model(tmp_path / "trunk", trunk)
    save_model(tmp_path / "stage", stage, trunk=tmp_path / "trunk")
    assert_same(load_model(tmp_path / "stage"), stage)
    own = (tmp_path / "stage" / "model.safetensors").stat().st_size
    assert own < (tmp_path / "trunk" / "model.safetensors").stat().st_size
    with torch.no_grad():
        stage.final_layernorm.bias.add_(1)
    with pytest.raises(ValueError, match=r"final_layernorm\.bias"):
        save_model(tmp_path / "other", stage, trunk=tmp_path / "trunk")


@pytest.mark.parametrize("stored", ["int8", "float8"])
def test_a_quantized_trunk_is_stored_as_a_pointer_to_its_source(stored: QuantizedName, tmp_path: Path) -> None:
    trunk, stage = build("image", seed=1), build(seed=2)
    inherit_trunk(stage, trunk.state_dict())
    save_model(tmp_path / "trunk", trunk)
    save_model(tmp_path / "another", build("image", seed=3))
    stage.freeze_trunk()
    stage.quantize_trunk(stored)
    save_model(tmp_path / "stage", stage, trunk=tmp_path / "trunk")
    loaded = load_model(tmp_path / "stage")
    assert all(torch.equal(p, trunk.state_dict()[name]) for name, p in loaded.trunk_parameters())
    with pytest.raises(ValueError, match="does not hold this model's"):
        save_model(tmp_path / "other", stage, trunk=tmp_path / "another")
    with pytest.raises(ValueError, match="is quantized"):
        save_model(tmp_path / "other", stage)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"num_layers": 3}, r"missing layers\.2\."),
        ({"num_layers": 1}, r"unexpected layers\.1\."),
        ({"num_layers": 10**9}, "num_layers"),
        ({"hidden_size": 16}, "expected"),
        ({"num_frames": 5}, "extra_position_embeddings"),
        ({"task": "image"}, "unexpected"),
        ({"num_positions": 32}, "position_embeddings"),
        ({"vocabulary": dataclasses.replace(VOCABULARY, size=25)}, "word_embeddings"),
    ],
)
def test_a_config_that_does_not_fit(tmp_path: Path, change: dict, wrong: str) -> None:
    save_model(tmp_path / "m", build())
    other = dataclasses.replace(CONFIG, **change)
    with pytest.raises(ValueError, match=wrong) as caught:
        load_model(tmp_path / "m", config=other)
    assert "\n" not in str(caught.value)
    tensors = load_checkpoint(tmp_path / "m").tensors()
    save_checkpoint(tmp_path / "n", tensors, {"model": to_dict(other)})  # the same, stored so
    with pytest.raises(ValueError, match=wrong):
        load_model(tmp_path / "n")


@pytest.mark.parametrize(
    "config", [{}, {"model": 5}, {"model": {"layers": 2}}, {"superres": {}}, {"model": {"task": "${oc.env:HOME}"}}]
)
def test_stored_configs_of_other_models(tmp_path: Path, config: dict) -> None:
    save_checkpoint(tmp_path / "m", build().state_dict(), config)
    with pytest.raises(ValueError, match=str(tmp_path / "m")) as caught:
        load_model(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_round_trip_through_the_published_format(tmp_path: Path) -> None:
    model = build("interpolation")
    save_model(tmp_path / "m", model)
    to_sat(tmp_path / "m", tmp_path / "sat").run(lambda: None)
    settings = SatSettings(VocabularyIds(16, 16, 17, 18), frame_position_start=8)
    from_sat(tmp_path / "sat", tmp_path / "again", settings).run(lambda: None)
    again = load_model(tmp_path / "again")
    assert_same(again, model)
    assert again.config == model.config


def test_pretrained_models_from_a_folder_or_the_hub(hub: Hub) -> None:
    model = build()
    save_pretrained(Path("m"), model)
    assert_same(from_pretrained("m"), model)
    hub.commit_folder("someone/clips", Path("m"), "v1")
    hub.commit("someone/clips", {"config.json": b"{}"})
    assert_same(from_pretrained("someone/clips", revision="v1"), model)
    with pytest.raises(FileNotFoundError, match="no such repository"):
        from_pretrained("someone/absent")
