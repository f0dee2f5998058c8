"""Layers for decoding on a GPU: equal to the model's own, of the same weights, whatever these are stored as."""

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.dtypes import WeightName
from cogvideo.inference.backends import KVCache
from cogvideo.model.decode import DecodeLayer, decode_layers
from cogvideo.model.inputs import DecodeInputs, TextBias
from cogvideo.model.masks import channel_masks
from cogvideo.model.plan import CachePositions, DecodeMasks, plan_forward, window_positions
from cogvideo.model.quantize import convert_weights
from cogvideo.model.transformer import CogVideoTransformer, compile_layer
from tests.helpers.models import tiny_config, tiny_model


def filled(model: CogVideoTransformer, slots: list[int]) -> DecodeInputs:
    """A step after the given frames, with keys stored as the engine stores them."""
    config, layout = model.config, model.config.layout
    every = np.arange(layout.num_slots)
    _, masks = channel_masks(layout, config.window_size)
    positions = CachePositions(every, tuple(window_positions(mask, every) for mask in masks))
    cache = KVCache.allocate(config, batch=2, text_len=5, dtype=model.final_layernorm.weight.dtype)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    bias = TextBias.from_mask(mask, 0.4, 0.2)
    rng = np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(0, 20, (2, layout.num_slots)))
    given = layout.slots_of(*layout.given_frames)
    plan = plan_forward(config, given, positions=positions)
    model(tokens[:, given], plan, bias, text=torch.from_numpy(rng.integers(23, 30, (2, 5))), cache=cache)
    return DecodeInputs(
        tokens[:, slots], torch.tensor(slots), DecodeMasks.from_config(config, positions=positions), bias, cache
    )


@pytest.mark.parametrize(("weights", "tolerance"), [("fp32", 1e-6), ("bf16", 0.02), ("int8", 1e-6), ("int4", 1e-6)])
@pytest.mark.parametrize("task", ["sequential", "interpolation"])
@torch.inference_mode()
def test_both_channels_in_one_product_are_equal(task: str, weights: WeightName, tolerance: float) -> None:
    model = tiny_model(tiny_config(task, window_size=2 if task == "interpolation" else None, hidden_size=64))  # type: ignore[arg-type]
    convert_weights(model, weights)
    layout = model.config.layout
    step = filled(model, layout.slots_of(layout.generation_order[0])[:3].tolist())
    expected = model.decode(step)
    layers = decode_layers(model)
    assert all(isinstance(layer, DecodeLayer) for layer in layers)
    scale = expected.abs().max()
    torch.testing.assert_close(model.decode(step, layers=layers) / scale, expected / scale, atol=tolerance, rtol=0)
    torch.testing.assert_close(model.decode(step), expected)  # its own projections are views now


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_weights_are_held_once(weights: WeightName) -> None:
    model = tiny_model(tiny_config())
    convert_weights(model, weights)
    (layer, *_) = decode_layers(model)
    assert isinstance(layer, DecodeLayer)
    joint = layer.query_key_value.weight
    own = [c.query_key_value.weight for c in (layer.layer.attention, layer.layer.temporal_attention)]
    assert {w.untyped_storage().data_ptr() for w in own} == {joint.untyped_storage().data_ptr()}
    assert (layer.dense is None) == (weights == "int8")


def test_a_model_of_one_channel_keeps_its_layers() -> None:
    model = tiny_model(tiny_config("image"))
    assert decode_layers(model) == list(model.layers)


@pytest.mark.parametrize("task", ["sequential", "interpolation"])
@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_attention_over_the_listed_blocks_is_equal(task: str, rows: int) -> None:
    """In compiled layers, which FlexAttention is for; here without generated code."""
    torch._dynamo.reset()
    config = tiny_config(task, frame_side=12, num_positions=256, hidden_size=64, window_size=None)  # type: ignore[arg-type]
    model = tiny_model(config)
    order = config.layout.generation_order
    slots = [int(config.layout.slots_of(frame)[0]) for frame in order[:rows]]
    step = filled(model, slots)
    expected = model.decode(step)
    layers = decode_layers(model)
    run: dict[str, object] = {"layers": layers, "run_layer": compile_layer(DecodeLayer, "eager")}
    got: Tensor = model.decode(step, key_blocks=True, **run)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    torch._dynamo.reset()
