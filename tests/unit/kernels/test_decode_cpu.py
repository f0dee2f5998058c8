"""A decoding step in one call, against the model that it stands for."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.inference.backends import CpuBackend, EagerBackend, KVCache
from cogvideo.kernels import cpu
from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import initialise
from cogvideo.model.inputs import DecodeInputs, TextBias
from cogvideo.model.plan import DecodeMasks, plan_forward
from cogvideo.model.quantize import convert_weights
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.layout import Vocabulary

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C++ compiler here")

CONFIG = ModelConfig(
    num_layers=3,
    hidden_size=60,  # neither this nor the heads' 20 fill the vectors of any processor
    num_heads=3,
    text_len=8,
    frame_side=4,
    num_positions=64,
    frame_position_start=32,
    vocabulary=Vocabulary(120, 100, pad=100, newline=101, start_of_image=102),
)
TASKS = {
    "image": replace(CONFIG, task="image", num_frames=1),
    "sequential": replace(CONFIG, task="sequential"),
    "windowed": replace(CONFIG, task="sequential", window_size=2),
    "interpolation": replace(CONFIG, task="interpolation", window_size=2),
    "small": replace(CONFIG, task="sequential", hidden_size=9, num_heads=3),
}


@cache
def model_of(task: str, dtype: str) -> CogVideoTransformer:
    model = CogVideoTransformer(TASKS[task]).eval()
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    convert_weights(model, dtype)  # type: ignore[arg-type]
    return model


@torch.inference_mode()
def last_logits(
    task: str,
    dtype: str,
    cache_dtype: torch.dtype,
    backend: type[EagerBackend] = CpuBackend,
    *,
    batch: int = 3,
    rows: int = 2,
) -> Tensor:
    """Logits of the last frame's first slots, decoded `rows` at a time after everything before them."""
    model, config = model_of(task, dtype), TASKS[task]
    decoder = backend(model)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(103, 120, (3, 8), generator=generator)[:batch]
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [5]]))[:batch]
    tokens = torch.randint(100, (3, config.layout.num_slots), generator=generator)[:batch]
    cache = KVCache.allocate(config, batch=batch, text_len=8, dtype=cache_dtype)
    order = np.concatenate(
        [config.layout.slots_of(f) for f in (*config.layout.given_frames, *config.layout.generation_order)]
    )
    begin = len(order) - config.frame_len
    bias = TextBias.from_mask(mask, 0.5, 0.25)
    before = np.sort(order[:begin]) if begin else order[:1]
    model(tokens[:, before], plan_forward(config, before), bias, text=text, cache=cache)
    masks, logits = DecodeMasks.from_config(config), []
    for start in range(len(before), len(order) - rows, rows):
        slots = torch.from_numpy(order[start : start + rows])
        logits += decoder.decode([DecodeInputs(tokens.index_select(1, slots), slots, masks, bias, cache)])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("token", "slot", "frames"), [(-1, 16, 4), (120, 16, 4), (0, -1, 4), (0, 64, 4), (0, 48, 3), (0, 16, 1)]
)
@torch.inference_mode()
def test_tokens_and_slots_out_of_range_are_refused(token: int, slot: int, frames: int) -> None:
    """Outside the vocabulary, the clip, or a cache that has no room for the slot or for what it attends to."""
    config = replace(TASKS["sequential"], num_frames=4)
    model = CogVideoTransformer(config).eval()
    cache = KVCache.allocate(config, batch=1, text_len=2, temporal_capacity=frames * config.frame_len)
    bias, masks = TextBias.from_mask(torch.ones(1, 2, dtype=torch.bool)), DecodeMasks.from_config(config)
    with pytest.raises(IndexError):
        CpuBackend(model).decode([DecodeInputs(torch.tensor([[token]]), torch.tensor([slot]), masks, bias, cache)])
    assert not any(channel.key.any() for channel in cache.spatial)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_logits_are_the_models(task: str, cache_dtype: torch.dtype) -> None:
    close = {"atol": 2e-5, "rtol": 2e-5} if cache_dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-3}
    expected = last_logits(task, "fp32", cache_dtype, EagerBackend)
    torch.testing.assert_close(last_logits(task, "fp32", cache_dtype), expected, **close)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_logits_are_the_models_with_weights_of_fewer_bits(dtype: str) -> None:
    expected = last_logits("windowed", dtype, torch.float32, EagerBackend)
    torch.testing.assert_close(last_logits("windowed", dtype, torch.float32), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_row_depends_neither_on_its_batch_nor_on_its_step(dtype: str) -> None:
    """To the last bit: schedules with other rows per step therefore give the same tokens."""
    alone = last_logits("sequential", dtype, torch.float32, rows=1)
    assert torch.equal(last_logits("sequential", dtype, torch.float32, rows=5), alone[:, :15])
    assert torch.equal(last_logits("sequential", dtype, torch.float32, batch=1, rows=1), alone[:1])
