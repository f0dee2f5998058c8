"""A step in one call, against the modules that it stands for."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.inference.cache import KVCache
from cogvideo.kernels import cpu as few_rows
from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import initialise
from cogvideo.model.plan import plan_forward
from cogvideo.model.quantize import convert_weights
from cogvideo.model.sight import Sights
from cogvideo.model.transformer import CogVideoTransformer, Step, TextBias
from cogvideo.sequence.vocabulary import Vocabulary

pytestmark = pytest.mark.skipif(few_rows.library() is None, reason="no C++ compiler here: the modules serve")

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
    "narrow": replace(CONFIG, task="sequential", hidden_size=9, num_heads=3),
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
def last_scores(task: str, dtype: str, cache_dtype: torch.dtype, *, batch: int = 3, rows: int = 2) -> Tensor:
    """Scores of the last frame's first slots, decoded `rows` at a time on what came before."""
    model, config = model_of(task, dtype), TASKS[task]
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(103, 120, (3, 8), generator=generator)[:batch]
    mask = (torch.arange(8) >= torch.tensor([[0], [3], [5]]))[:batch]
    tokens = torch.randint(100, (3, config.layout.num_slots), generator=generator)[:batch]
    memory = KVCache.allocate(config, batch=batch, text_len=8, dtype=cache_dtype)
    order = np.concatenate(
        [config.layout.slots_of(f) for f in (*config.layout.given_frames, *config.layout.generation_order)]
    )
    begin = len(order) - config.frame_len
    bias = TextBias.of(mask, 0.5, 0.25)
    before = np.sort(order[:begin]) if begin else order[:1]
    model(tokens[:, before], plan_forward(config, before), bias, text=text, cache=memory)
    sights, scores = Sights.of(config), []
    for start in range(len(before), len(order) - rows, rows):
        slots = torch.from_numpy(order[start : start + rows])
        scores += model.decode([Step(tokens.index_select(1, slots), slots, sights, bias, memory)])
    return torch.cat(scores, dim=1)


@pytest.mark.parametrize(
    ("token", "slot", "frames"), [(-1, 16, 4), (120, 16, 4), (0, -1, 4), (0, 64, 4), (0, 48, 3), (0, 16, 1)]
)
@torch.inference_mode()
def test_nothing_outside_is_read(token: int, slot: int, frames: int) -> None:
    """Neither of the table, nor of the clip, nor of a cache that holds fewer frames than the slot is of or sees."""
    config = replace(TASKS["sequential"], num_frames=4)
    model = CogVideoTransformer(config).eval()
    cache = KVCache.allocate(config, batch=1, text_len=2, temporal_places=frames * config.frame_len)
    bias, sights = TextBias.of(torch.ones(1, 2, dtype=torch.bool)), Sights.of(config)
    with pytest.raises(IndexError):
        model.decode([Step(torch.tensor([[token]]), torch.tensor([slot]), sights, bias, cache)])
    assert not any(layer.spatial.key.any() for layer in cache.layers)


def by_modules(monkeypatch: pytest.MonkeyPatch, *args: object, **kwargs: int) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(few_rows, "library", lambda: None)
        return last_scores(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float16])
def test_as_the_modules(task: str, cache_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    close = {"atol": 2e-5, "rtol": 2e-5} if cache_dtype == torch.float32 else {"atol": 2e-3, "rtol": 2e-3}
    torch.testing.assert_close(
        last_scores(task, "fp32", cache_dtype), by_modules(monkeypatch, task, "fp32", cache_dtype), **close
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "int8"])
def test_narrow_weights_as_the_modules(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.testing.assert_close(
        last_scores("windowed", dtype, torch.float32),
        by_modules(monkeypatch, "windowed", dtype, torch.float32),
        atol=2e-5,
        rtol=2e-5,
    )


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_row_depends_neither_on_its_batch_nor_on_its_step(dtype: str) -> None:
    """What schedules that feed other rows at once owe their equal tokens to, to the last bit."""
    alone = last_scores("sequential", dtype, torch.float32, rows=1)
    assert torch.equal(last_scores("sequential", dtype, torch.float32, rows=5), alone[:, :15])
    assert torch.equal(last_scores("sequential", dtype, torch.float32, batch=1, rows=1), alone[:1])
