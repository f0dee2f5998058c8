"""Plans: whatever is fed, each allowed pair of slots is attended once and no other is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.model import plan as plan_module
from cogvideo.model.masks import Mask, channel_masks
from cogvideo.model.plan import ChannelPlan, Rows, plan_channel, plan_forward, plan_training
from cogvideo.sequence.layout import ClipLayout, FrameSpec
from tests.helpers.models import tiny_config


def pairs(plan: ChannelPlan, num_rows: int, num_slots: int) -> np.ndarray:
    """(rows, slots): how often each pair is attended."""
    count = np.zeros((num_rows, num_slots), int)
    for block in plan.blocks:
        for queries, keys in zip(block.queries.index.tolist(), block.keys.index.tolist(), strict=True):
            seen = np.ones((len(queries), len(keys)), int) if block.allowed is None else block.allowed.int().numpy()
            np.add.at(count, np.ix_(queries, keys), seen)
    return count


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    side = draw(st.integers(1, 6))
    frames = draw(
        st.lists(st.builds(FrameSpec, st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=4)
    )
    layout = ClipLayout(1, side, tuple(frames))
    if draw(st.booleans()):
        return Mask(layout, "frame")
    window = draw(st.sampled_from([None, *(w for w in range(1, side + 1) if side % w == 0)]))
    shift = draw(st.sampled_from([0, window // 2])) if window else 0
    return Mask(layout, "clip", window, shift, wrap_given=draw(st.booleans()))


@given(masks(), st.data())
def test_blocks_tile_the_mask(mask: Mask, data: st.DataObject) -> None:
    slots = np.array(
        data.draw(st.lists(st.integers(0, mask.layout.num_slots - 1), min_size=1, max_size=40, unique=True)), dtype=int
    )
    large = data.draw(st.sampled_from([1, 8, 512]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_ROWS_WORTH_SPLITTING", large)
        answered = np.array(sorted(data.draw(st.sets(st.integers(0, len(slots) - 1), min_size=1))))
        plan = plan_channel(mask, slots, answered, places=np.arange(mask.layout.num_slots))
    wanted = mask.allowed(slots[:, None], np.arange(mask.layout.num_slots)[None, :])
    wanted &= np.isin(np.arange(len(slots)), answered)[:, None]
    assert np.array_equal(pairs(plan, len(slots), mask.layout.num_slots), wanted.astype(int))

    order = torch.cat([block.queries.index.flatten() for block in plan.blocks])
    assert torch.equal(order if plan.restore is None else order[plan.restore], torch.from_numpy(answered))


@pytest.mark.parametrize("task", ["sequential", "interpolation"])
@pytest.mark.parametrize("window", [None, 10])
def test_published_size_wastes_little(task: str, window: int | None) -> None:
    """Scores computed stay within a few times those used: no dense 2000 x 2000 matrix."""
    config = tiny_config(task, frame_side=20, num_positions=512, window_size=window)  # type: ignore[arg-type]
    plan = plan_forward(config)
    for channel in (plan.spatial, *plan.temporal):
        computed = sum(b.queries.index.numel() * b.keys.index.shape[1] for b in channel.blocks)
        used = int(pairs(channel, 2000, 2000).sum())
        assert computed <= 2.2 * used


def test_rows_take_consecutive_ones_as_a_view() -> None:
    x = torch.randn(2, 3, 8, 4)
    view, copy = Rows.of(np.array([[2, 3], [4, 5]])), Rows.of(np.array([[2, 3], [5, 4]]))
    assert view.start == 2
    assert copy.start is None
    assert view.take(x).data_ptr() == x[:, :, 2].data_ptr()
    assert torch.equal(view.take(x), x[:, :, [[2, 3], [4, 5]]])
    assert torch.equal(copy.take(x), x[:, :, [[2, 3], [5, 4]]])


def test_temporal_plans_alternate_by_layer() -> None:
    plan = plan_forward(tiny_config(window_size=2))
    assert plan.temporal_of(0) is plan.temporal_of(2) is not plan.temporal_of(1)
    assert plan_forward(tiny_config(window_size=2), temporal=False).temporal_of(0) is None
    assert plan_forward(tiny_config("image")).temporal_of(0) is None


def test_training_answers_supervised_slots_only() -> None:
    config = tiny_config("interpolation", window_size=2)
    last = plan_training(config).last
    assert last is not None
    assert last.answered.tolist() == [*range(16, 32), *range(48, 64)]
    assert last.temporal is not None
    shifted = channel_masks(config.layout, 2)[1][(config.num_layers - 1) % 2]
    wanted = shifted.allowed(np.arange(80)[:, None], np.arange(80)[None])
    assert np.array_equal(pairs(last.temporal, 80, 80)[last.answered], wanted[last.answered].astype(int))
    assert plan_training(tiny_config("image")).last is None


def test_what_is_kept_nowhere_must_be_fed_along() -> None:
    config = tiny_config("interpolation", window_size=2)
    assert not plan_forward(config).needs_cache
    assert plan_forward(config, np.arange(16)).needs_cache

    whole, nowhere = config.layout.slots_of(0, 2, 4), np.full(80, -1)
    plan = plan_forward(config, whole, spatial_places=nowhere)
    assert plan.spatial.places is None and plan.temporal[0].places is not None
    rows = {tuple(keys.tolist()) for block in plan.spatial.blocks for keys in block.keys.index}
    assert rows == {tuple(range(start, start + 16)) for start in (0, 16, 32)}
    with pytest.raises(AssertionError, match="nor kept in the cache"):
        plan_forward(config, whole[8:], spatial_places=nowhere)
