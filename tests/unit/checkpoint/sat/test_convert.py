"""Conversion of published checkpoints to ours and back, for all kinds of models and numbers of ranks."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from cogvideo.checkpoint import load_checkpoint
from cogvideo.checkpoint.load import check_fits, save_model, stored_config
from cogvideo.checkpoint.parameters import PARAMETERS, ModelKind, TransformerConfig, model_parameters
from cogvideo.checkpoint.sat.config import SatSettings
from cogvideo.checkpoint.sat.convert import from_sat, to_sat
from cogvideo.superres.config import SuperresConfig
from tests.helpers.models import tiny_config, tiny_model
from tests.helpers.sat import WriteSat, convert, ignore_progress, sat_tensors
from tests.helpers.superres import TINY_CONFIGS, tiny_superres

KINDS: list[ModelKind] = list(PARAMETERS)


def module_of(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    path = folder / "7" / f"mp_rank_{rank:02d}_model_states.pt"
    return torch.load(path, weights_only=True)["module"]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor.view(torch.int16), right[name].view(torch.int16)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_round_trip(write_sat: WriteSat, tmp_path: Path, settings: SatSettings, kind: ModelKind, ranks: int) -> None:
    source = write_sat(kind, ranks=ranks)
    if "superres" in kind:
        settings = SatSettings(settings.vocab, num_heads=2, frame_side=2, text_len=8)
    conversion = from_sat(source, tmp_path / "ours", settings)
    assert conversion.kind == kind
    assert {line.source for line in conversion.mappings} == set(module_of(source))
    conversion.run(ignore_progress)

    ours, whole = load_checkpoint(tmp_path / "ours"), sat_tensors(kind)
    assert set(ours.names) == {p.name for p in model_parameters(kind, 2)}
    for p in model_parameters(kind, 2):
        assert torch.equal(ours.tensor(p.name), whole[p.sat_name]), p.name

    to_sat(tmp_path / "ours", tmp_path / "back", ranks=ranks).run(ignore_progress)
    for rank in range(ranks):
        assert_same(module_of(tmp_path / "back", rank), module_of(source, rank))
    assert (tmp_path / "back" / "latest").read_text().strip() == "7"
    sat_config = json.loads((tmp_path / "back" / "model_config.json").read_text())
    assert sat_config == {"cogvideo_stage": 1, "model_parallel_size": ranks}


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("sequential", learn_first_frame=True),
        tiny_config("interpolation"),
        tiny_config("image"),
        replace(TINY_CONFIGS["direct"], low_res_position_start=11),
        TINY_CONFIGS["iterative"],
    ],
    ids=lambda config: getattr(config, "task", "") or config.method,
)
def test_own_models_come_back_with_all_their_settings(config: TransformerConfig, tmp_path: Path) -> None:
    model = tiny_superres(config) if isinstance(config, SuperresConfig) else tiny_model(config)
    save_model(tmp_path / "ours", model)
    to_sat(tmp_path / "ours", tmp_path / "sat").run(ignore_progress)
    convert(tmp_path / "sat", tmp_path / "back", SatSettings())
    back = load_checkpoint(tmp_path / "back")
    assert stored_config(back) == config
    check_fits(back, config)


def test_own_settings_must_fit_the_tensors(tmp_path: Path) -> None:
    save_model(tmp_path / "ours", tiny_model(tiny_config("image")))
    to_sat(tmp_path / "ours", tmp_path / "sat").run(ignore_progress)
    from_sat(tmp_path / "sat", tmp_path / "x", SatSettings(num_heads=tiny_config().num_heads))
    with pytest.raises(ValueError, match=r"cogvideo\.json has other values for num_heads; leave them out, or remove"):
        from_sat(tmp_path / "sat", tmp_path / "x", SatSettings(num_heads=1))
    own = tmp_path / "sat/cogvideo.json"
    whole = own.read_text()
    for right, wrong in (('"num_layers": 3', '"num_layers": 2'), ('"image"', '"sequential"')):
        assert right in whole
        own.write_text(whole.replace(right, wrong))
        with pytest.raises(ValueError, match=r"cogvideo\.json does not fit the tensors in .*; correct or remove it"):
            from_sat(tmp_path / "sat", tmp_path / "x")


def test_one_rank_can_be_written_as_two(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    convert(write_sat("video"), tmp_path / "ours", settings)
    to_sat(tmp_path / "ours", tmp_path / "two", ranks=2).run(ignore_progress)
    two = write_sat("video", "expected", ranks=2)
    for rank in range(2):
        assert_same(module_of(tmp_path / "two", rank), module_of(two, rank))
    with pytest.raises(ValueError, match="3 ranks"):
        to_sat(tmp_path / "ours", tmp_path / "three", ranks=3)


def test_old_names(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    def old(name: str) -> str:
        name = name.replace("mixins.extra_position_embedding.", "mixins.0.")
        name = name.replace("mixins.attention_plus.", "mixins.1.")
        return name.replace("transformer.word_embeddings", "word_embeddings")

    convert(write_sat("video", rename=old), tmp_path / "ours", settings)
    whole = sat_tensors("video")
    loaded = load_checkpoint(tmp_path / "ours")
    assert all(torch.equal(loaded.tensor(p.name), whole[p.sat_name]) for p in model_parameters("video", 2))


def test_shards_and_type(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    source = write_sat("video", ranks=2)
    convert(source, tmp_path / "ours", settings, dtype=torch.float32, max_shard_bytes=4096)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    whole = sat_tensors("video")
    for p, tensor in ((p, load_checkpoint(tmp_path / "ours").tensor(p.name)) for p in model_parameters("video", 2)):
        assert torch.equal(tensor, whole[p.sat_name].float())


def test_model_card_names_the_source(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    from cogvideo.files import sha256_file

    source = write_sat("video")
    convert(source, tmp_path / "ours", settings)
    card = (tmp_path / "ours" / "README.md").read_text()
    assert sha256_file(source / "7" / "mp_rank_00_model_states.pt") in card
    assert "stage 1" in card
    (tmp_path / "ours" / "README.md").write_text("edited")
    load_checkpoint(tmp_path / "ours")  # the card is the user's to edit


def test_differing_copies_are_reported_and_rank_0s_kept(
    write_sat: WriteSat, tmp_path: Path, settings: SatSettings
) -> None:
    name = "transformer.layers.1.third_layernorm.bias"
    drifted = write_sat("video", ranks=2, change=lambda t, rank: t.update({name: t[name] + rank}))
    convert(drifted, tmp_path / "ours", settings)
    assert f"rank 0's kept: {name}" in (tmp_path / "ours" / "README.md").read_text()
    kept = load_checkpoint(tmp_path / "ours").tensor("layers.1.third_layernorm.bias")
    assert torch.equal(kept, sat_tensors("video")[name])

    alike = write_sat("video", "alike", ranks=2, change=lambda t, rank: t[name].fill_(float("nan")))
    convert(alike, tmp_path / "other", settings)
    assert "rank 0's kept" not in (tmp_path / "other" / "README.md").read_text()


def add(name: str) -> Any:
    return lambda tensors, rank: tensors.update({name: torch.zeros(2).half()})


def test_an_unknown_tensor_can_be_dropped_by_name(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    source = write_sat("video", change=add("transformer.extra"))
    conversion = from_sat(source, tmp_path / "ours", settings, drop=("transformer.extra",))
    assert [str(line) for line in conversion.mappings if line.target is None] == [
        "transformer.extra dropped: asked for by --drop"
    ]
    conversion.run(ignore_progress)
    assert "`transformer.extra`" in (tmp_path / "ours" / "README.md").read_text()
    with pytest.raises(ValueError, match="no such tensor"):
        from_sat(source, tmp_path / "x", settings, drop=("transformer.absent",))


def test_an_interrupted_conversion_leaves_nothing(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    source = write_sat("video")
    conversion = from_sat(source, tmp_path / "ours", settings)
    count = 0

    def interrupt() -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.run(interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["sat"]
    convert(source, tmp_path / "ours", settings)
    load_checkpoint(tmp_path / "ours")


SAT_FILES = ["latest", "model_config.json", "7/mp_rank_00_model_states.pt", "7/mp_rank_01_model_states.pt"]


numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3), st.lists(st.integers()))


sat_configs = st.dictionaries(
    st.sampled_from(["num_layers", "hidden_size", "num_attention_heads", "layout", "window_size", "cogvideo_stage"]),
    st.one_of(st.integers(-3, 100), numbers, st.lists(st.integers(-5, 40), min_size=2, max_size=3)),
)


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_error_of_one_line(
    write_sat: WriteSat, tmp_path: Path, settings: SatSettings, data: st.DataObject
) -> None:
    """With changed bytes or any model_config.json, conversion works or fails with a line that names the folder."""
    source = tmp_path / "sat" if (tmp_path / "sat").exists() else write_sat("video", ranks=2)
    path = source / data.draw(st.sampled_from(SAT_FILES))
    whole = path.read_bytes()
    try:
        if path.suffix == ".json" and data.draw(st.booleans()):
            path.write_text(json.dumps(data.draw(sat_configs)))
            settings = SatSettings(vocab=settings.vocab, frame_position_start=8)
        else:
            place, inserted = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.binary(max_size=6))
            path.write_bytes(whole[:place] + inserted + whole[place + data.draw(st.integers(0, 6)) :])
        try:
            from_sat(source, tmp_path / "ours", settings).run(ignore_progress)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
            assert str(source) in str(error) or path.suffix == ".json"  # a contradicting setting is named itself
        else:
            load_checkpoint(tmp_path / "ours")
    finally:
        path.write_bytes(whole)
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
