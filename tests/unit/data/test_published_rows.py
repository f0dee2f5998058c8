"""Published training rows: padding, shapes, and files of another layout."""

import numpy as np
import pytest

from cogvideo.data.published_rows import PublishedRows
from cogvideo.sequence.layout import Vocabulary

VOCABULARY = Vocabulary(size=60, num_image_tokens=40, pad=40, newline=41, start_of_image=42)
SIZES = {"text_len": 6, "num_frames": 5, "frame_len": 4, "vocabulary": VOCABULARY}


@pytest.fixture
def file(tmp_path):
    rows = np.zeros((3, 26), np.int32)
    rows[0, :6] = [50, 41, 51, 40, 40, 40]
    rows[1, :6] = [40, 50, 41, 51, 52, 40]  # stage-2 rows begin with a pad
    rows[2, :6] = [50, 41, 51, 52, 53, 54]
    rows[:, 6:] = np.arange(60).reshape(3, 20) % 40
    rows.tofile(tmp_path / "rows.bin")
    return tmp_path / "rows.bin"


def test_rows_and_batches(file):
    rows = PublishedRows(file, **SIZES)
    assert len(rows) == 3
    text, frames = rows.row(1)
    assert text == [50, 41, 51, 52] and frames.tolist()[0] == [20, 21, 22, 23]
    batch = rows.batch([0, 2])
    assert batch.text.tolist() == [[40, 40, 40, 50, 41, 51], [50, 41, 51, 52, 53, 54]]
    assert batch.text_mask.sum(1).tolist() == [3, 6]
    assert batch.frames.shape == (2, 5, 4) and batch.seconds.isnan().all()


def test_a_file_of_another_layout_is_refused(file):
    with pytest.raises(ValueError, match="multiple of 8256"):
        PublishedRows(file)


def test_ids_of_another_vocabulary_are_refused(file):
    small = Vocabulary(size=50, num_image_tokens=30, pad=40, newline=41, start_of_image=42)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        PublishedRows(file, **{**SIZES, "vocabulary": small}).row(0)
