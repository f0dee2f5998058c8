"""Decoding on a device that is not the CPU, as far as that can be seen without one.

Fake tensors have a device and no numbers: mixing devices raises, and so does any step that would wait for a number.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cogvideo.inference import schedules
from cogvideo.inference.clip_sampler import ClipSampler
from cogvideo.inference.engine import compile_program
from cogvideo.inference.sampler import ClusterDraw
from cogvideo.inference.wavefront import wavefront
from cogvideo.model.quantize import Linear, convert_weights, stream_layers
from cogvideo.sampling.bundle import ACTIVATIONS
from cogvideo.sampling.config import DrawConfig
from tests.helpers import decoding as tiny

ELSEWHERE = torch.device("meta")
"""Any device but the CPU will do, and this one asks for no driver."""


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("weights", ACTIVATIONS)
@pytest.mark.parametrize(("task", "guidance"), [("sequential", 3.0), ("interpolation", None)])
def test_steps_stay_on_the_device_and_wait_for_nothing(
    task: str, guidance: float | None, weights: str, streamed: bool
) -> None:
    model = tiny.model(task, window_size=1, frame_side=2)  # type: ignore[arg-type]
    convert_weights(model, weights, ACTIVATIONS[weights])  # type: ignore[arg-type]
    if streamed:
        stream_layers(model)
    layout = model.config.layout
    order = schedules.sequential(layout, layout.given_frames, layout.generation_order)
    program = compile_program(model.config, wavefront(order, layout, 1))
    for sight in (program.sights.spatial, *program.sights.temporal):
        assert sight.seen.any()  # made from numbers, so before there are none
    config = DrawConfig(guidance_scale=guidance)
    draw = ClusterDraw(np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)
    known = torch.zeros(2, layout.num_frames, layout.frame_len, dtype=torch.int64)
    uniforms = torch.zeros(*known.shape, 2, dtype=torch.float64)
    texts = [tiny.encode("left"), tiny.encode("quickly right")]
    with FakeTensorMode(allow_non_fake_inputs=True):
        sampler = ClipSampler(model.to(ELSEWHERE), program.to(ELSEWHERE), draw.to(ELSEWHERE), config, clips_at_once=2)
        made = sampler(known, texts, tiny.encode("any"), uniforms)
    assert made.shape == known.shape
    assert made.device.type == "cpu"
    elsewhere = {name for name, parameter in model.named_parameters() if parameter.device != torch.device("cpu")}
    matrices = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Linear)}
    assert elsewhere == {name for name, _ in model.named_parameters()} - (matrices if streamed else set())
