"""The one predicate against the masks written out as tables, at published, small and odd sizes."""

import numpy as np
import pytest

from cogvideo.model.masks import Mask, channel_masks, render_mask
from cogvideo.sequence.layout import ClipLayout
from tests.reference.masks import spatial_mask, temporal_mask

SIZES = [(20, 10), (8, 4), (6, 3), (6, 2), (9, 3), (5, 5), (4, 1)]
TASKS = ["sequential", "interpolation"]


def build(task: str, side: int, num_frames: int = 5) -> ClipLayout:
    return getattr(ClipLayout, task)(4, side, num_frames)


def dense(mask: Mask) -> np.ndarray:
    slots = np.arange(mask.layout.num_slots)
    return mask.allowed(slots[:, None], slots[None, :])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("side", "window"), SIZES)
def test_windowed_masks(task: str, side: int, window: int) -> None:
    spatial, (even, odd) = channel_masks(build(task, side), window)
    assert np.array_equal(dense(spatial), spatial_mask(task, 5, side))
    assert np.array_equal(dense(even), temporal_mask(task, 5, side, window, 0))
    assert np.array_equal(dense(odd), temporal_mask(task, 5, side, window, window // 2))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("num_frames", [3, 5, 7])
def test_full_masks(task: str, num_frames: int) -> None:
    spatial, temporal = channel_masks(build(task, 4, num_frames), None)
    assert len(temporal) == 1
    assert np.array_equal(dense(spatial), spatial_mask(task, num_frames, 4))
    assert np.array_equal(dense(temporal[0]), temporal_mask(task, num_frames, 4))


def test_shifted_windows_cut_at_the_shift_and_do_not_wrap() -> None:
    """Groups of 20 by 10 in shifted layers: 0-4, 5-14, 15-19."""
    _, (_, shifted) = channel_masks(build("sequential", 20, 1), 10)
    windows_in_row = shifted.window_index(np.arange(20))
    starts = np.flatnonzero(np.diff(windows_in_row)) + 1
    assert starts.tolist() == [5, 15]
    assert windows_in_row[0] != windows_in_row[19]


@pytest.mark.parametrize("task", ["image", *TASKS])
@pytest.mark.parametrize(("side", "window"), [*SIZES, (4, None)])
def test_intervals_of_places_are_the_same_masks(task: str, side: int, window: int | None) -> None:
    layout = ClipLayout.image(4, side) if task == "image" else build(task, side)
    spatial, by_layer = channel_masks(layout, window)
    for mask in (spatial, *by_layer):
        first, last, place = mask.intervals(np.arange(layout.num_slots))
        assert np.array_equal((first[:, None] <= place) & (place <= last[:, None]), dense(mask))


@pytest.mark.parametrize("window", [2, 3])
def test_intervals_of_given_frames_wrap_as_their_masks_do(window: int) -> None:
    layout = build("interpolation", 6)
    slots = layout.slots_of(*layout.given_frames)
    for mask in channel_masks(layout, window, wrap_given=True)[1]:
        first, last, place = mask.intervals(slots)
        visible = (first[:, None] <= place) & (place <= last[:, None])
        assert np.array_equal(visible, mask.allowed(slots[:, None], slots))


@pytest.mark.parametrize("window", [2, 3])
def test_wrapped_windows_change_only_given_rows_of_shifted_layers(window: int) -> None:
    layout = build("interpolation", 6)
    spatial, (even, odd) = channel_masks(layout, window)
    spatial_w, (even_w, odd_w) = channel_masks(layout, window, wrap_given=True)
    assert np.array_equal(dense(spatial), dense(spatial_w))
    assert np.array_equal(dense(even), dense(even_w))
    given = np.isin(layout.locate(np.arange(layout.num_slots)).frame, layout.given_frames)
    assert np.array_equal(dense(odd)[~given], dense(odd_w)[~given])

    shift, n = window // 2, layout.frame_len
    for q in range(n):
        for k in range(n):
            meets = all(
                ((a - shift) % 6) // window == ((b - shift) % 6) // window
                for a, b in ((q // 6, k // 6), (q % 6, k % 6))
            )
            for q_frame, k_frame in ((0, 0), (0, 4), (2, 0)):
                assert dense_at(odd_w, q_frame * n + q, k_frame * n + k) == meets


def dense_at(mask: Mask, query: int, key: int) -> bool:
    return bool(mask.allowed(np.array(query), np.array(key)))


def test_mask_as_text() -> None:
    mask = Mask(ClipLayout.sequential(1, 2, 2), "clip", window_size=1)
    assert render_mask(mask) == "\n".join(
        [
            "#... ....",
            ".#.. ....",
            "..#. ....",
            "...# ....",
            "",
            "#... #...",
            ".#.. .#..",
            "..#. ..#.",
            "...# ...#",
        ]
    )
    assert render_mask(mask, np.array([0, 4])) == "# .\n\n# #"
