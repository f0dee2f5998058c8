"""Batches of clips: how they are cut, cached and moved to the model's device."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cogvideo.dtypes import ACTIVATION_DTYPES
from cogvideo.inference.engine import Engine, build_program
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import wavefront
from cogvideo.model.quantize import Linear, convert_weights, offload_layers
from cogvideo.sampling.batches import FrameSampler
from cogvideo.sampling.config import DrawConfig
from cogvideo.sampling.prompts import EncodedPrompt
from tests.helpers import decoding as tiny
from tests.helpers.batches import DictCache

ELSEWHERE = torch.device("meta")
"""Any device but the CPU will do, and this one needs no driver."""
CLIPS = 5


@pytest.fixture(scope="module")
def sampler() -> FrameSampler:
    return tiny.pipeline().frame_sampler("key_frames", tiny.pipeline().config)


def inputs(sampler: FrameSampler) -> tuple[torch.Tensor, list[EncodedPrompt], torch.Tensor]:
    layout = sampler.engine.model.config.layout
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(tiny.NUM_CODES, (CLIPS, layout.num_frames, layout.frame_len), generator=generator)
    prompts = [EncodedPrompt(tiny.encode("a" * (clip + 1)), tiny.encode("any")) for clip in range(CLIPS)]
    return known, prompts, torch.rand(*known.shape, 2, dtype=torch.float64, generator=generator)


def test_the_batch_size_changes_no_token(sampler: FrameSampler) -> None:
    whole = sampler.sample(*inputs(sampler), clips_at_once=CLIPS)
    assert torch.equal(sampler.sample(*inputs(sampler), clips_at_once=2), whole)
    assert torch.equal(whole[:, 0], inputs(sampler)[0][:, 0]), "given frames stay"


def test_a_batch_is_one_file_and_is_drawn_once(sampler: FrameSampler) -> None:
    cache, counted = DictCache(), list[int]()
    whole = sampler.sample(*inputs(sampler), clips_at_once=2, name="x", cache=cache)
    assert cache.stored == ["x-000000", "x-000002", "x-000004"]
    assert torch.equal(torch.cat(list(cache.batches.values())), whole)
    del cache.batches["x-000002"]
    cache.stored.clear()
    again = sampler.sample(*inputs(sampler), clips_at_once=2, name="x", cache=cache, progress=counted.append)
    assert torch.equal(again, whole) and cache.stored == ["x-000002"]
    assert sum(counted) == CLIPS * sampler.program.tokens_per_clip, "loaded tokens count as well"


def test_a_cached_batch_of_another_shape_is_refused(sampler: FrameSampler) -> None:
    cache = DictCache({"x-000000": torch.zeros(1, 5, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"the cached batch x-000000 has shape \(1, 5, 4\), expected \(2, 5, 4\)"):
        sampler.sample(*inputs(sampler), clips_at_once=2, name="x", cache=cache)


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("weights", ACTIVATION_DTYPES)
@pytest.mark.parametrize(("task", "guidance"), [("sequential", 3.0), ("interpolation", None)])
def test_steps_stay_on_the_device_without_host_syncs(
    task: str, guidance: float | None, weights: str, offloaded: bool
) -> None:
    """Fake tensors have a device but no values: mixing devices raises, and so does every step that reads a value."""
    model = tiny.model(task, window_size=1, frame_side=2)  # type: ignore[arg-type]
    convert_weights(model, weights, ACTIVATION_DTYPES[weights])  # type: ignore[arg-type]
    if offloaded:
        offload_layers(model)
    layout = model.config.layout
    program = build_program(model.config, wavefront(layout, layout.given_frames, layout.generation_order, 1))
    for keys in (program.masks.spatial, *program.masks.temporal):
        assert keys.visible.any()  # computed here: it needs values
    config = DrawConfig(guidance_scale=guidance)
    draw = ClusterSampler(np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)
    known = torch.zeros(2, layout.num_frames, layout.frame_len, dtype=torch.int64)
    uniforms = torch.zeros(*known.shape, 2, dtype=torch.float64)
    prompts = [EncodedPrompt(tiny.encode(text), tiny.encode("any")) for text in ("left", "quickly right")]
    with FakeTensorMode(allow_non_fake_inputs=True):
        elsewhere = model.to(ELSEWHERE), program.to(ELSEWHERE), draw.to(ELSEWHERE)
        sampler = FrameSampler(Engine(elsewhere[0]), *elsewhere[1:], config)
        tokens = sampler.sample(known, prompts, uniforms, clips_at_once=2)
    assert tokens.shape == known.shape
    assert tokens.device.type == "cpu"
    moved = {name for name, parameter in model.named_parameters() if parameter.device != torch.device("cpu")}
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    assert moved == {name for name, _ in model.named_parameters()} - (matrices if offloaded else set())
