"""Batches, and the model inputs for their frames."""

import torch

from cogvideo.sequence.batch import Batch, frame_inputs


def test_inputs_start_with_boi_and_never_hold_the_last_token() -> None:
    frames = torch.arange(16).view(2, 2, 4)
    assert frame_inputs(frames, 99).tolist() == [
        [99, 0, 1, 2, 99, 4, 5, 6],
        [99, 8, 9, 10, 99, 12, 13, 14],
    ]


def test_trim_text_drops_columns_that_are_padding_everywhere() -> None:
    mask = torch.tensor([[False, False, True, True], [False, False, False, True]])
    text = torch.tensor([[0, 0, 5, 6], [0, 0, 0, 7]])
    trimmed = Batch(text, mask, torch.zeros(2, 1, 4, dtype=torch.int64), torch.ones(2)).trim_text()
    assert trimmed.text.tolist() == [[5, 6], [0, 7]]
    assert trimmed.text_mask.tolist() == [[True, True], [False, True]]


def test_trim_text_keeps_a_multiple_of_columns_and_at_most_all() -> None:
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[:, -3:] = True
    batch = Batch(mask.long(), mask, torch.zeros(2, 1, 4, dtype=torch.int64), torch.ones(2))
    assert [batch.trim_text(multiple).text.shape[1] for multiple in (1, 2, 3, 4, 16)] == [3, 4, 3, 4, 10]


def test_trim_text_of_a_full_row_changes_nothing() -> None:
    text = torch.tensor([[4, 5, 6]])
    batch = Batch(text, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 1, 4, dtype=torch.int64), torch.ones(1))
    assert batch.trim_text().text.tolist() == [[4, 5, 6]]
