"""Bundles with more text pieces, longer clips or larger frames: what was learned stands, and the parts agree."""

import shutil
from dataclasses import replace

import pytest
import torch

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model, save_model
from cogvideo.cli.main import main
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.sampling.bundle import MODELS, open_bundle
from cogvideo.sampling.extend import EMBEDDINGS, EXTRA, POSITIONS, extend_embeddings, interpolate_positions
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.tokenizers.text import TextTokenizer
from tests.helpers.bundles import write_bundle

CAPTIONS = ["a purple zebra gallops", "紫色斑马在湖边奔跑", "the red digit 3 moves left slowly"]


@pytest.fixture(scope="module")
def old():
    return TextTokenizer.load(BUNDLED_WEIGHTS / "text.model")


def test_new_pieces_follow_old_ones(old):
    new = old.extended(CAPTIONS, 100)
    assert new.vocabulary.size > old.vocabulary.size
    for id in range(old.num_image_tokens, old.vocabulary.size):
        assert new.piece(id) == old.piece(id)
    for caption in CAPTIONS:
        assert new.decode(new.encode(caption)) == caption
        assert new.has_pieces_for(caption) and len(new.encode(caption)) <= 10
    assert new.encode(CAPTIONS[2]) == old.encode(CAPTIONS[2])


def test_no_more_pieces_than_asked_for_and_none_that_are_known(old):
    assert old.extended(CAPTIONS, 3).vocabulary.size == old.vocabulary.size + 3
    assert old.extended(CAPTIONS[2:], 50).vocabulary.size == old.vocabulary.size


def test_a_new_embedding_is_the_mean_of_what_its_text_took_before(old):
    new = old.extended(CAPTIONS, 100)
    table = torch.randn(old.vocabulary.size + 3, 4)  # the published table has unused rows
    grown = extend_embeddings(table, old, new)
    assert grown.shape == (new.vocabulary.size, 4)
    assert torch.equal(grown[: old.vocabulary.size], table[: old.vocabulary.size])
    zebra = next(id for id in range(old.vocabulary.size, new.vocabulary.size) if new.piece(id) == "▁zebra")
    assert torch.allclose(grown[zebra], table[old.encode(" zebra")].mean(0))


def test_the_bundle_opens_and_draws_old_prompts_alike(tmp_path, capsys):
    captions, out = tmp_path / "captions.csv", tmp_path / "bundle"
    captions.write_text("video,caption\n" + "".join(f"a.mp4,{text}\n" for text in CAPTIONS), encoding="utf-8")
    words = ["vocabulary", "--captions", str(captions), "--extend", str(BUNDLED_WEIGHTS), "--out", str(out)]
    assert main(words) == 0 and "more pieces: " in capsys.readouterr().out
    bundle = open_bundle(out)
    assert bundle.text_tokenizer.has_pieces_for(CAPTIONS[0])
    for name in ("trunk", "sequential", "interpolation"):
        before, after = load_checkpoint(BUNDLED_WEIGHTS / name), load_checkpoint(out / name)
        assert (before.trunk is None) == (after.trunk is None)
        assert all(torch.equal(before.tensor(x), after.tensor(x)) for x in before.names if x != EMBEDDINGS)
    tokens = []
    for model in (BUNDLED_WEIGHTS, out):
        settings = ["rounds=0", "seed=3"]
        assert (
            main(
                ["sample", CAPTIONS[2], "--model", str(model), "--out", str(tmp_path / "clips" / model.name), *settings]
            )
            == 0
        )
        tokens.append((tmp_path / "clips" / model.name / "tokens.safetensors").read_bytes())
    assert tokens[0] == tokens[1]
    assert main(words) == 2 and "exists" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Stages that are stored without their trunk."""
    return write_bundle(tmp_path_factory.mktemp("small") / "bundle", shared_trunk=True)


def test_longer_clips_begin_as_before(small, tmp_path):
    """The same seed gives the same first five frames, and stage 2 is what it was."""
    out = tmp_path / "longer"
    assert main(["extend", str(small), "--num-frames", "9", "--out", str(out)]) == 0
    clips = []
    for folder in (small, out):
        pipeline = Pipeline.load(folder)
        config = replace(pipeline.config, seed=3, rounds=0, num_clusters=8)
        clips.append(pipeline.sample([CAPTIONS[2]], config))
    assert clips[1].shape[1] == 9 and torch.equal(clips[0], clips[1][:, :5])
    before, after = load_checkpoint(small / "sequential"), load_checkpoint(out / "sequential")
    assert {name for name in before.names if not torch.equal(before.tensor(name), after.tensor(name))} == {EXTRA}
    old, new = before.tensor(EXTRA).split(4), after.tensor(EXTRA).split(4)  # frames 1 to 4, then one that is not read
    assert all(torch.equal(new[i], old[min(i, 3)]) for i in range(8))
    files = [folder / "interpolation/model.safetensors" for folder in (small, out)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_larger_frames_keep_old_positions_at_their_places(small, tmp_path, capsys):
    out = tmp_path / "larger"
    assert main(["extend", str(small), "--frame-side", "4", "--out", str(out)]) == 0
    assert open_bundle(out).sequential.config.frame_side == 4
    for name in ("trunk", "sequential", "interpolation"):
        before, after = load_checkpoint(small / name), load_checkpoint(out / name)
        assert (before.trunk is None) == (after.trunk is None)
        for table in before.names:
            if table not in (POSITIONS, EXTRA):
                assert torch.equal(before.tensor(table), after.tensor(table))
        old, new = before.tensor(POSITIONS), after.tensor(POSITIONS)
        assert torch.equal(new[:32], old[:32])  # the text's
        assert torch.equal(new[32:48].view(4, 4, -1)[::2, ::2], old[32:36].view(2, 2, -1))
        if name != "trunk":
            grids = after.tensor(EXTRA).view(5, 4, 4, -1)
            assert torch.equal(grids[:, ::2, ::2], before.tensor(EXTRA).view(5, 2, 2, -1))
    assert main(["extend", str(out), "--frame-side", "2", "--out", str(tmp_path / "smaller")]) == 2
    assert "5 frames of 4x4 tokens, and neither can be reduced" in capsys.readouterr().err
    assert not (tmp_path / "smaller").exists()


def test_positions_between_old_ones_are_their_mean():
    table = torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    assert interpolate_positions(table, 4).view(4, 4)[:3, :3].tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 6]]
    assert interpolate_positions(table, 2) is table


def test_one_model_is_extended_whole(small, tmp_path):
    """A model that is stored without its trunk, to a folder where there is none."""
    words = ["extend", str(small / "sequential"), "--num-frames", "7", "--frame-side", "3"]
    assert main([*words, "--out", str(tmp_path / "alone/model")]) == 0
    model = load_model(tmp_path / "alone/model")
    assert (model.config.num_frames, model.config.frame_side, model.config.task) == (7, 3, "sequential")


def test_an_extended_model_is_no_longer_the_sat_checkpoint_that_it_was(small, tmp_path):
    extra = {"sat": {"iteration": "7", "model_config": {"layout": [16, 20, 36]}}, "fingerprint": "0" * 64, "other": 1}
    save_model(tmp_path / "model", load_model(small / "sequential"), extra=extra)
    assert main(["extend", str(tmp_path / "model"), "--frame-side", "3", "--out", str(tmp_path / "large")]) == 0
    assert load_checkpoint(tmp_path / "large").extra == {"other": 1}


def test_wrong_wishes_for_an_extension(small, tmp_path, capsys):
    words = ["extend", str(small), "--out", str(tmp_path / "out")]
    for more, message in (
        ([], "give --num-frames, --frame-side or both"),
        (["--frame-side", "0"], "neither can be reduced; got 5 of 0x0"),
        (["--num-frames", "3"], "5 frames of 2x2 tokens, and neither can be reduced; got 3"),
        (["--num-frames", "1000000000"], "1000000000 frames of 2x2 tokens are more than 1,048,576 in all"),
        (["--frame-side", "100000"], "5 frames of 100000x100000 tokens are more than 1,048,576 in all"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["trunk", "interpolation"])
def test_only_stage_1_alone_can_have_more_frames(small, tmp_path, capsys, name):
    assert main(["extend", str(small / name), "--num-frames", "9", "--out", str(tmp_path / "out")]) == 2
    assert "only stage 1 can have more frames" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_that_contains_the_original_is_not_replaced(small, tmp_path, capsys):
    inner = tmp_path / "runs/bundle"
    shutil.copytree(small, inner)
    captions = tmp_path / "captions.csv"
    captions.write_text("video,caption\na.mp4,zebra\n")
    for words in (
        ["extend", str(inner), "--num-frames", "9"],
        ["vocabulary", "--captions", str(captions), "--extend", str(inner)],
    ):
        assert main([*words, "--out", str(tmp_path / "runs"), "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert "which would be removed with it; choose another folder" in error or "would replace" in error
    assert (inner / "sequential").is_dir()


def test_only_a_bundle_is_replaced_by_a_bundle(small, tmp_path, capsys):
    notes = tmp_path / "work/notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    (notes.parent / "text.model").touch()
    words = ["extend", str(small), "--num-frames", "9", "--overwrite", "--out"]
    assert main([*words, str(notes.parent)]) == 2
    assert "work is not a bundle; choose another folder" in capsys.readouterr().err
    parts = {"text": "text.model", "tokenizer": "image_tokenizer"} | {name: name for name in MODELS}
    given = [word for option, name in parts.items() for word in (f"--{option}", str(small / name))]
    assert main(["bundle", *given, "--overwrite", "--out", str(notes.parent)]) == 2
    assert "work is not a bundle; choose another folder" in capsys.readouterr().err
    assert notes.read_text() == "mine"
    assert main([*words, str(tmp_path / "out")]) == 0 and main([*words, str(tmp_path / "out")]) == 0
