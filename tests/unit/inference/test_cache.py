"""Decoding with a cache gives what one forward over the whole clip gives, however the slots are fed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cogvideo.inference.backends import KVCache
from cogvideo.model.config import ModelConfig
from cogvideo.model.inputs import TextBias
from cogvideo.model.plan import CachePositions, plan_forward
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import Batch, frame_inputs
from tests.helpers.models import VARIANTS, tiny_batch, tiny_config, tiny_model


def whole(model: CogVideoTransformer, batch: Batch) -> Tensor:
    inputs = frame_inputs(batch.frames, model.config.vocabulary.start_of_image)
    return model(inputs, plan_forward(model.config), TextBias.from_mask(batch.text_mask), text=batch.text)


def fed(model: CogVideoTransformer, batch: Batch, portions: list[np.ndarray]) -> Tensor:
    """Hidden states of all slots, fed a portion at a time."""
    inputs = frame_inputs(batch.frames, model.config.vocabulary.start_of_image)
    cache = KVCache.allocate(model.config, len(inputs), batch.text.shape[1])
    bias = TextBias.from_mask(batch.text_mask)
    out = torch.full((*inputs.shape, model.config.hidden_size), torch.nan)
    for i, slots in enumerate(portions):
        plan = plan_forward(model.config, slots)
        at = torch.from_numpy(slots)
        out[:, at] = model(inputs[:, at], plan, bias, text=batch.text if i == 0 else None, cache=cache)
    return out


def feeding_order(config: ModelConfig) -> np.ndarray:
    """Slots as sampling meets them: given frames, then generated ones in order."""
    layout = config.layout
    given_first = [f for f in layout.given_frames if layout.frames[f].order == 0]
    return layout.slots_of(*given_first, *(f for f in layout.generation_order))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_slot_by_slot_equals_the_whole_clip(variant: str) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    batch = tiny_batch(model.config)
    order = feeding_order(model.config)
    given = len(model.config.layout.given_frames) * model.config.frame_len
    portions = ([order[:given]] if given else []) + list(order[given:, None])
    torch.testing.assert_close(fed(model, batch, portions), whole(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["sequential", "sequential_odd_window", "interpolation"])
@given(data=st.data())
@settings(max_examples=4)
@torch.no_grad()
def test_feeding_order_is_free(variant: str, data: st.DataObject) -> None:
    """Any order in which a slot never comes before one that it attends to, in portions of any size and mixed frames."""
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    layout = model.config.layout
    batch = tiny_batch(model.config, batch=1)
    slots = np.arange(layout.num_slots)
    at = layout.locate(slots)
    # frames lag `lag` slots per generation order; those of one order that see each other whole go in one portion
    lag = data.draw(st.integers(layout.frame_len, 2 * layout.frame_len))
    time = at.order * lag + np.where(at.causal, at.raster, 0)
    width = data.draw(st.integers(2, 20))
    portions = [slots[time // width == step] for step in np.unique(time // width)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    portions = [rng.permutation(portion) for portion in portions]
    torch.testing.assert_close(fed(model, batch, portions), whole(model, batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_windows_let_frames_overlap_in_time() -> None:
    """With windows of 2 on a side of 4, frame t may trail frame t-1 by (2 - 1) * (4 + 1) slots, all in one portion."""
    model = tiny_model(tiny_config("sequential", window_size=2))
    layout = model.config.layout
    batch = tiny_batch(model.config, batch=1)
    slots = np.arange(layout.num_slots)
    at = layout.locate(slots)
    time = at.frame * 5 + at.raster
    portions = [slots[time == step] for step in range(time.max() + 1)]
    assert len(portions) == 16 + 4 * 5
    torch.testing.assert_close(fed(model, batch, portions), whole(model, batch), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_trunk_alone_is_an_image_model() -> None:
    """A video model with its temporal channel off gives for frame 0 what the image model of its trunk gives."""
    video = tiny_model(tiny_config("sequential"))
    image = CogVideoTransformer(tiny_config("image")).eval()
    image.load_state_dict(dict(video.trunk_parameters()))
    batch = tiny_batch(video.config)
    inputs = frame_inputs(batch.frames[:, :1], video.config.vocabulary.start_of_image)
    bias = TextBias.from_mask(batch.text_mask)
    plan = plan_forward(video.config, np.arange(16), temporal=False, positions=CachePositions(np.full(80, -1), ()))
    assert torch.equal(
        video(inputs, plan, bias, text=batch.text), image(inputs, plan_forward(image.config), bias, text=batch.text)
    )


@torch.no_grad()
def test_wrapped_windows_change_the_given_frames_only_where_asked() -> None:
    model = tiny_model(tiny_config("interpolation", window_size=2))
    batch = tiny_batch(model.config)
    given = model.config.layout.slots_of(0, 2, 4)
    inputs = frame_inputs(batch.frames, model.config.vocabulary.start_of_image)[:, torch.from_numpy(given)]

    def prefill(windows: str) -> Tensor:
        cache = KVCache.allocate(model.config, 2, batch.text.shape[1])
        plan = plan_forward(model.config, given, given_windows=windows)  # type: ignore[arg-type]
        return model(inputs, plan, TextBias.from_mask(batch.text_mask), text=batch.text, cache=cache)

    cut = whole(model, batch)[:, torch.from_numpy(given)]
    torch.testing.assert_close(prefill("cut"), cut, atol=1e-5, rtol=1e-5)
    # slots of the grid's inner windows meet the same slots either way; corners meet those of other edges
    assert (prefill("wrapped") - cut).abs().max() > 1e-2


def test_rows_out_of_order_need_a_cache() -> None:
    model = tiny_model(tiny_config("interpolation"))
    batch = tiny_batch(model.config)
    plan = plan_forward(model.config, model.config.layout.slots_of(0, 2, 4))
    with pytest.raises(AssertionError, match="cache"):
        model(torch.zeros(2, 48, dtype=torch.int64), plan, TextBias.from_mask(batch.text_mask), text=batch.text)


def test_room_of_a_cache() -> None:
    config = tiny_config("sequential")
    rows = 6 + 80
    floats = config.num_layers * 2 * 2 * rows * config.hidden_size * 3
    assert KVCache.allocate(config, 3, 6).num_bytes == 4 * floats
    assert KVCache.allocate(config, 3, 6, dtype=torch.bfloat16).num_bytes == 2 * floats
    trunk_only = KVCache.allocate(config, 3, 6, temporal=False, spatial_capacity=16)
    assert trunk_only.num_bytes == 4 * config.num_layers * 2 * (6 + 16) * config.hidden_size * 3
    one_frame = KVCache.allocate(config, 3, 6, spatial_capacity=16)
    assert one_frame.num_bytes == 4 * config.num_layers * 2 * (6 + 16 + 6 + 80) * config.hidden_size * 3
