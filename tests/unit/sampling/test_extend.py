"""A bundle with more text pieces: old prompts give the same clips, and every part agrees on the new vocabulary."""

import pytest
import torch

from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.cli.main import main
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.sampling.bundle import open_bundle
from cogvideo.sampling.extend import EMBEDDINGS, extend_embeddings
from cogvideo.tokenizers.text import TextTokenizer

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
