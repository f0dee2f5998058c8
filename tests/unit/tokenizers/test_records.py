"""Records of tokenizers: what differs for certain, and what cannot be told."""

from pathlib import Path

import pytest

from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.tokenizers.records import TokenizerRecords, are_different, describe_tokenizer
from cogvideo.tokenizers.text import TextTokenizer

RECORD = {"num_tokens": 64, "compress_rate": 8, "sha256": {"config.json": "c", "model.safetensors": "w"}}


@pytest.mark.parametrize(
    ("other", "different"),
    [
        (RECORD, False),
        (RECORD | {"sha256": {"config.json": "c", "model.safetensors": "v"}}, True),
        (RECORD | {"sha256": {"config.json": "written later", "model.safetensors": "w"}}, False),
        (RECORD | {"sha256": {"ice_image.pt": "v"}}, False),
        (RECORD | {"num_tokens": 65}, True),
        (RECORD | {"compress_rate": 16}, True),
        ({"num_tokens": 64}, False),
        ({"sha256": "damaged"}, False),
        (None, False),
    ],
)
def test_records_differ_only_for_certain(other: dict[str, object] | None, different: bool) -> None:
    assert are_different(RECORD, other) == are_different(other, RECORD) == different


def test_a_copy_has_the_record_of_its_original(tmp_path: Path) -> None:
    original = BUNDLED_WEIGHTS / "image_tokenizer"
    tokenizer = ImageTokenizer.load(original)
    tokenizer.save(tmp_path / "copy")
    assert describe_tokenizer(tmp_path / "copy", tokenizer) == describe_tokenizer(original, tokenizer)


def test_exports_hold_records_and_old_ones_none() -> None:
    records = TokenizerRecords(RECORD, "t")
    assert TokenizerRecords.of_export({"step": 3} | records.to_extra()) == records
    assert TokenizerRecords.of_export({"step": 3}) == TokenizerRecords()
    assert TokenizerRecords.of_export({"tokenizers": {"image": 3, "text": []}}) == TokenizerRecords()
    assert records.differing(TokenizerRecords(RECORD | {"num_tokens": 1}, "t")) == "image tokenizer"
    assert records.differing(TokenizerRecords(RECORD, "u")) == "text tokenizer"
    assert records.differing(TokenizerRecords()) is None


def test_large_frames_count_between_models_of_both_sizes_only() -> None:
    other = RECORD | {"sha256": {"model.safetensors": "v"}}
    one, two = TokenizerRecords(RECORD, "t"), TokenizerRecords(RECORD, "t", other)
    assert TokenizerRecords.of_export(two.to_extra()) == two and "high_res" not in str(one.to_extra())
    assert one.differing(two) is None, "a model of clips fits both"
    assert (
        one.differing(two, both_sizes=True) == two.differing(one, both_sizes=True) == "image tokenizer of large frames"
    )
    assert two.differing(two, both_sizes=True) is None
    assert one.differing(TokenizerRecords(RECORD, "t", RECORD), both_sizes=True) is None
    assert TokenizerRecords().differing(two, both_sizes=True) is None


def test_the_hash_of_a_text_tokenizer_is_that_of_its_file(tmp_path: Path) -> None:
    text = TextTokenizer.load(BUNDLED_WEIGHTS / "text.model")
    text.save(tmp_path / "copy.model")
    assert TextTokenizer.load(tmp_path / "copy.model").sha256 == text.sha256
    assert TextTokenizer.train(["a dog"], tmp_path / "other.model", 300, 1024).sha256 != text.sha256
    assert text.has_pieces_for("the red digit 3 moves left") and not text.has_pieces_for("a dog runs")
