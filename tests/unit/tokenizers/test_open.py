"""Tokenizers by path: ours and the published files are told apart by what lies there."""

from pathlib import Path

import pytest

from cogvideo.tokenizers.icetk import DEFAULT_FOLDER
from cogvideo.tokenizers.open import image_tokenizer_files, open_image_tokenizer, open_text_tokenizer
from cogvideo.tokenizers.text import TextTokenizer

CAPTIONS = ["the red digit 3 moves left quickly", "红色的数字3向左快速移动"] * 40


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    TextTokenizer.train(CAPTIONS, tmp_path / "text.model", 330, num_image_tokens=64)
    return tmp_path / "text.model"


def test_our_model_is_opened_by_its_path(ours: Path) -> None:
    tokenizer = open_text_tokenizer(ours)
    assert tokenizer.vocabulary.num_image_tokens == 64
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[0])) == CAPTIONS[0]


@pytest.mark.parametrize("named", ["ice_text.model", "."])
def test_the_published_file_gets_its_special_pieces(ours: Path, named: str) -> None:
    ours.rename(ours.parent / "ice_text.model")
    tokenizer = open_text_tokenizer(ours.parent / named)
    assert tokenizer.vocabulary.num_image_tokens == 20000
    assert tokenizer.vocabulary.size == 150010


def test_a_published_tokenizer_saved_by_us_needs_nothing_said(ours: Path, tmp_path: Path) -> None:
    ours.rename(tmp_path / "ice_text.model")
    published = open_text_tokenizer(tmp_path)
    published.save(tmp_path / "copy.model")
    copy = open_text_tokenizer(tmp_path / "copy.model")
    assert copy.encode(CAPTIONS[1]) == published.encode(CAPTIONS[1])
    for name in ("num_image_tokens", "pad", "newline", "start_of_image"):
        assert getattr(copy.vocabulary, name) == getattr(published.vocabulary, name)


def test_the_word_icetk_means_the_package_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for opening, name in ((open_text_tokenizer, "ice_text.model"), (open_image_tokenizer, "ice_image.pt")):
        with pytest.raises(FileNotFoundError, match=name):
            opening("icetk")
    assert image_tokenizer_files("icetk") == [DEFAULT_FOLDER.expanduser() / "ice_image.pt"]


def test_files_of_ours_are_config_and_weights(tmp_path: Path) -> None:
    assert [path.name for path in image_tokenizer_files(tmp_path)] == ["config.json", "model.safetensors"]
