"""The joint vocabulary's ids."""

import pytest

from cogvideo.sequence.vocabulary import Vocabulary


def test_defaults_are_the_published_ids() -> None:
    vocabulary = Vocabulary()
    assert (vocabulary.size, vocabulary.num_image_tokens) == (150010, 20000)
    assert (vocabulary.pad, vocabulary.newline, vocabulary.start_of_image) == (20003, 20004, 150000)


@pytest.mark.parametrize("name", ["pad", "newline", "start_of_image"])
@pytest.mark.parametrize("value", [0, 19, 30, -1])
def test_special_ids_are_text_ids(name: str, value: int) -> None:
    ids = {"pad": 20, "newline": 21, "start_of_image": 29} | {name: value}
    with pytest.raises(ValueError, match=rf"vocabulary.{name}={value} is not in the text ids \[20, 30\)"):
        Vocabulary(30, 20, **ids)
