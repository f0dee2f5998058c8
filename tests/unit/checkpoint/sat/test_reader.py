"""Published folders: found, told apart, merged over ranks; what is wrong with one is named in a line."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from cogvideo.checkpoint import load_checkpoint
from cogvideo.checkpoint.parameters import PARAMETERS, ModelKind, model_parameters
from cogvideo.checkpoint.sat.config import SatSettings, VocabularyIds
from cogvideo.checkpoint.sat.convert import from_sat, to_sat
from cogvideo.checkpoint.sat.reader import SatCheckpoint
from tests.unit.checkpoint.conftest import WriteSat, sat_tensors

KINDS: list[ModelKind] = list(PARAMETERS)


def no_tick() -> None: ...


def convert(source: Path, out: Path, settings: SatSettings, **options: Any) -> None:
    from_sat(source, out, settings, **options).run(no_tick)


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
def test_there_and_back(
    write_sat: WriteSat, tmp_path: Path, settings: SatSettings, kind: ModelKind, ranks: int
) -> None:
    source = write_sat(kind, ranks=ranks)
    conversion = from_sat(source, tmp_path / "ours", settings)
    assert conversion.kind == kind
    assert {line.source for line in conversion.mappings} == set(module_of(source))
    conversion.run(no_tick)

    ours, whole = load_checkpoint(tmp_path / "ours"), sat_tensors(kind)
    assert set(ours.names) == {p.name for p in model_parameters(kind, 2)}
    for p in model_parameters(kind, 2):
        assert torch.equal(ours.tensor(p.name), whole[p.sat_name]), p.name

    to_sat(tmp_path / "ours", tmp_path / "back", ranks=ranks).run(no_tick)
    for rank in range(ranks):
        assert_same(module_of(tmp_path / "back", rank), module_of(source, rank))
    assert (tmp_path / "back" / "latest").read_text().strip() == "7"
    said = json.loads((tmp_path / "back" / "model_config.json").read_text())
    assert said == {"cogvideo_stage": 1, "model_parallel_size": ranks}


def test_one_rank_can_come_back_as_two(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    convert(write_sat("video"), tmp_path / "ours", settings)
    to_sat(tmp_path / "ours", tmp_path / "two", ranks=2).run(no_tick)
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


def test_the_card_names_the_source(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    from cogvideo.files import sha256_file

    source = write_sat("video")
    convert(source, tmp_path / "ours", settings)
    card = (tmp_path / "ours" / "README.md").read_text()
    assert sha256_file(source / "7" / "mp_rank_00_model_states.pt") in card
    assert "stage 1" in card
    (tmp_path / "ours" / "README.md").write_text("edited")
    load_checkpoint(tmp_path / "ours")  # the card is the user's to edit


def test_found_however_nested(write_sat: WriteSat, tmp_path: Path) -> None:
    source = write_sat("video", "deep/er/cogvideo-stage1")
    for start in (tmp_path / "deep", source, source / "7"):
        assert SatCheckpoint(start).directory == source
    shutil.copytree(source, tmp_path / "deep" / "other")
    with pytest.raises(ValueError, match="2 checkpoints"):
        SatCheckpoint(tmp_path / "deep")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no `latest`"):
        SatCheckpoint(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder"):
        SatCheckpoint(tmp_path / "absent")


def test_the_stages_are_told_by_what_stands_beside(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    stage2 = write_sat("video", "two", config={"cogvideo_stage": 2, "window_size": 2})
    model = from_sat(stage2, tmp_path / "x", settings).config["model"]
    assert (model["task"], model["window_size"], model["num_frames"], model["frame_side"]) == ("interpolation", 2, 5, 2)
    unknown = write_sat("video", "unknown", config={})
    with pytest.raises(ValueError, match="task=sequential"):
        from_sat(unknown, tmp_path / "x", settings)
    given = dataclasses.replace(settings, task="sequential")
    assert from_sat(unknown, tmp_path / "x", given).config["model"]["task"] == "sequential"


def test_layout_and_sizes_come_from_the_config_beside(write_sat: WriteSat, tmp_path: Path) -> None:
    said = {"cogvideo_stage": 1, "layout": [6, 10, 26], "num_attention_heads": 4, "window_size": -1, "num_layers": 2}
    settings = SatSettings(vocab=VocabularyIds(16, 16, 17, 18), frame_position_start=6)
    source = write_sat("video", config=said)
    model = from_sat(source, tmp_path / "x", settings).config["model"]
    assert (model["text_len"], model["frame_side"], model["num_heads"], model["window_size"]) == (6, 2, 4, None)
    unsound = write_sat("video", "unsound", config=said | {"layout": [6, 11, -4]})
    with pytest.raises(ValueError, match=r"give frame_side="):
        from_sat(unsound, tmp_path / "x", settings)
    wrong = write_sat("video", "wrong", config=said | {"num_layers": 3})
    with pytest.raises(ValueError, match="num_layers=3"):
        from_sat(wrong, tmp_path / "x", settings)


def test_a_vocabulary_that_does_not_fit(write_sat: WriteSat, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"24 embedding rows.*vocab\.num_image_tokens"):
        from_sat(write_sat("video"), tmp_path / "x", SatSettings())


def add(name: str) -> Any:
    return lambda tensors, rank: tensors.update({name: torch.zeros(2).half()})


def cut(name: str) -> Any:
    return lambda tensors, rank: tensors.pop(name)


QKV = "transformer.layers.1.attention.query_key_value.weight"


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (add("transformer.layers.0.gate.weight"), r"no video model has: transformer\.layers\.0\.gate\.weight"),
        (cut(QKV), r"lacks tensors of a video model: " + QKV),
        (cut("mixins.attention_plus.attn_distribution.1"), "attn_distribution.1"),
        (cut("transformer.word_embeddings.weight"), "has no transformer.word_embeddings.weight"),
        (add("word_embeddings.weight"), "twice"),
        (lambda t, rank: t.update({QKV: t[QKV][:, :4].clone()}), QKV),
        (lambda t, rank: t.update({QKV: t[QKV].T}), "not contiguous"),
        (lambda t, rank: t.update({QKV: t[QKV].long()}), QKV),
        (lambda t, rank: t.update({QKV: "text"}), "is a str"),
        (lambda t, rank: t.update({QKV: torch.zeros(1).half().expand(24, 8)}), QKV),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_wrong_tensors_are_named(
    write_sat: WriteSat, tmp_path: Path, settings: SatSettings, change: Any, wrong: str, ranks: int
) -> None:
    source = write_sat("video", ranks=ranks, change=change)
    with pytest.raises(ValueError, match=wrong):
        convert(source, tmp_path / "ours", settings)
    assert not (tmp_path / "ours").exists()


def test_ranks_that_differ(write_sat: WriteSat) -> None:
    other_type = write_sat(
        "video", "a", ranks=2, change=lambda t, rank: t.update({QKV: t[QKV].float()} if rank else {})
    )
    with pytest.raises(ValueError, match=QKV):
        SatCheckpoint(other_type)
    one_less = write_sat("video", "b", ranks=2, change=lambda t, rank: t.pop(QKV) if rank else None)
    with pytest.raises(ValueError, match="rank 0: " + QKV):
        SatCheckpoint(one_less)


def test_copies_that_differ_between_ranks_are_told(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    name = "transformer.layers.1.third_layernorm.bias"
    drifted = write_sat("video", ranks=2, change=lambda t, rank: t.update({name: t[name] + rank}))
    convert(drifted, tmp_path / "ours", settings)
    assert f"rank 0's kept: {name}" in (tmp_path / "ours" / "README.md").read_text()
    kept = load_checkpoint(tmp_path / "ours").tensor("layers.1.third_layernorm.bias")
    assert torch.equal(kept, sat_tensors("video")[name])

    alike = write_sat("video", "alike", ranks=2, change=lambda t, rank: t[name].fill_(float("nan")))
    convert(alike, tmp_path / "other", settings)
    assert "rank 0's kept" not in (tmp_path / "other" / "README.md").read_text()


def test_an_unknown_tensor_can_be_dropped_by_name(write_sat: WriteSat, tmp_path: Path, settings: SatSettings) -> None:
    source = write_sat("video", change=add("transformer.extra"))
    conversion = from_sat(source, tmp_path / "ours", settings, drop=("transformer.extra",))
    assert [str(line) for line in conversion.mappings if line.target is None] == [
        "transformer.extra dropped: asked for by --drop"
    ]
    conversion.run(no_tick)
    assert "`transformer.extra`" in (tmp_path / "ours" / "README.md").read_text()
    with pytest.raises(ValueError, match="no such tensor"):
        from_sat(source, tmp_path / "x", settings, drop=("transformer.absent",))


def test_a_rank_that_is_missing(write_sat: WriteSat) -> None:
    source = write_sat("video", ranks=2)
    os.remove(source / "7" / "mp_rank_00_model_states.pt")
    with pytest.raises(FileNotFoundError, match=r"mp_rank_00_model_states.pt is missing"):
        SatCheckpoint(source)
    lost = write_sat("video", "lost", ranks=4)
    os.remove(lost / "7" / "mp_rank_03_model_states.pt")  # the last one: shapes tell
    with pytest.raises(FileNotFoundError, match=r"mp_rank_03_model_states.pt is missing.*4 ranks"):
        SatCheckpoint(lost)


def test_shapes_count_more_than_what_is_said_of_ranks(
    write_sat: WriteSat, tmp_path: Path, settings: SatSettings
) -> None:
    """A merged checkpoint keeps the model_config.json of the ranks that it was merged from."""
    source = write_sat("video", config={"cogvideo_stage": 1, "model_parallel_size": 4})
    convert(source, tmp_path / "ours", settings)
    to_sat(tmp_path / "ours", tmp_path / "back").run(no_tick)
    assert json.loads((tmp_path / "back" / "model_config.json").read_text())["model_parallel_size"] == 1


@pytest.mark.parametrize("text", ["../../etc", "7/../8", "", "latest", "9" * 40])
def test_latest_cannot_lead_elsewhere(write_sat: WriteSat, text: str) -> None:
    source = write_sat("video")
    (source / "latest").write_text(text)
    with pytest.raises(ValueError, match="iteration number"):
        SatCheckpoint(source)


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
said = st.dictionaries(
    st.sampled_from(["num_layers", "hidden_size", "num_attention_heads", "layout", "window_size", "cogvideo_stage"]),
    st.one_of(st.integers(-3, 100), numbers, st.lists(st.integers(-5, 40), min_size=2, max_size=3)),
)


@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_line(
    write_sat: WriteSat, tmp_path: Path, settings: SatSettings, data: st.DataObject
) -> None:
    """Bytes of any file changed, or any settings beside the tensors: a line that names the folder, or a conversion."""
    source = tmp_path / "sat" if (tmp_path / "sat").exists() else write_sat("video", ranks=2)
    path = source / data.draw(st.sampled_from(SAT_FILES))
    whole = path.read_bytes()
    try:
        if path.suffix == ".json" and data.draw(st.booleans()):
            path.write_text(json.dumps(data.draw(said)))
            settings = SatSettings(vocab=settings.vocab, frame_position_start=8)
        else:
            place, some = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.binary(max_size=6))
            path.write_bytes(whole[:place] + some + whole[place + data.draw(st.integers(0, 6)) :])
        try:
            from_sat(source, tmp_path / "ours", settings).run(no_tick)
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error)
            assert str(source) in str(error) or path.suffix == ".json"  # settings that contradict name themselves
        else:
            load_checkpoint(tmp_path / "ours")
    finally:
        path.write_bytes(whole)
        shutil.rmtree(tmp_path / "ours", ignore_errors=True)
