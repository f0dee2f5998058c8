"""Random numbers of super-resolution: of each frame, or shared by a clip's frames, so that what stands still stays."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cogvideo.rng import SampleKey, sample_uniforms
from cogvideo.sampling import superres as module
from cogvideo.sampling.config import UpsampleConfig
from cogvideo.sampling.superres import FIRST_ROUND, Upsampler, draw_fine, redraw
from cogvideo.superres.batch import pad_captions
from cogvideo.superres.grid import redraw_mask
from cogvideo.tokenizers.image import ImageTokenizer
from tests.helpers.bundles import write_image_tokenizer
from tests.helpers.superres import TINY_CONFIGS, TINY_DIRECT, tiny_superres

CODES = TINY_DIRECT.vocabulary.num_image_tokens
KEYS = [SampleKey(3, "a", 0), SampleKey(3, "a", 1)]
PROMPT = [50, 51]


@pytest.fixture(scope="module")
def upsampler(tmp_path_factory: pytest.TempPathFactory) -> Upsampler:
    models = {method: tiny_superres(config).eval() for method, config in TINY_CONFIGS.items()}
    folder = tmp_path_factory.mktemp("tokenizer") / "image_tokenizer"
    tokenizer = ImageTokenizer.load(write_image_tokenizer(folder, num_codes=CODES))
    config = UpsampleConfig(top_k_clusters=20, token_temperature=1.0)
    return Upsampler(
        models["direct"], models["iterative"], tokenizer, tokenizer, lambda text: PROMPT, np.arange(CODES), config
    )


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """Of two clips: A B A A B."""
    two = torch.randint(CODES, (2, 2, TINY_DIRECT.low_res_len), generator=torch.Generator().manual_seed(0))
    return two[:, [0, 1, 0, 0, 1]]


def upsample(upsampler: Upsampler, frames: Tensor, clips: list[int], **settings: object) -> Tensor:
    changed = replace(upsampler, config=replace(upsampler.config, **settings))
    return changed.upsample_clips(frames, KEYS, [PROMPT, PROMPT], clips)


def test_independent_frames_have_their_own_numbers(upsampler: Upsampler, frames: Tensor) -> None:
    """Drawn again from the definition: those of the clip, the round and the frame."""
    assert UpsampleConfig().noise == "independent"
    tokens = upsample(upsampler, frames, [1])[0]
    samplers = upsampler._token_samplers
    for number in range(frames.shape[1]):
        text, mask = pad_captions([PROMPT], TINY_DIRECT)

        def uniforms(step: int, number: int = number) -> Tensor:
            return sample_uniforms(KEYS[1:], FIRST_ROUND + step, [number], upsampler.tokens_per_frame)[0]

        fine = draw_fine(upsampler.direct, text, mask, frames[1, number : number + 1], samplers[0], uniforms(0))
        for step, sampler in enumerate(samplers[1:], 1):
            fine = redraw(upsampler.iterative, text, mask, fine, step, sampler, uniforms(step))  # type: ignore[arg-type]
        assert torch.equal(tokens[number], fine[0])
    assert not torch.equal(tokens[0], tokens[2]), "one coarse frame, but other numbers"


def test_rounds_of_the_iterative_model(upsampler: Upsampler, frames: Tensor) -> None:
    """None, fewer than published, or without chance."""
    direct = replace(upsampler, iterative=None)
    assert torch.equal(upsample(upsampler, frames, [0], round_top_k=()), upsample(direct, frames, [0]))
    two = upsample(upsampler, frames, [0], round_top_k=(1, 1))
    again = upsample(upsampler, frames, [0], round_top_k=(1, 1, CODES), noise="shared")
    assert not torch.equal(two, again)
    kept = ~redraw_mask(TINY_DIRECT.high_res_side, 1)
    assert torch.equal(two[..., kept], upsample(direct, frames, [0])[..., kept])

    def redrawn(places: Tensor) -> bool:
        return not torch.equal(two[..., places], upsample(upsampler, frames, [0], round_top_k=(1,))[..., places])

    assert redrawn(redraw_mask(TINY_DIRECT.high_res_side, 2))
    for wrong in ((0,), (1,) * 7):
        with pytest.raises(ValueError, match=r"round_top_k=\[.*\]; expected at most 6 numbers of 1 to 16777216"):
            UpsampleConfig(round_top_k=wrong)


@pytest.mark.parametrize("frames_at_once", [1, 2, 5])
def test_with_shared_noise_a_coarse_frame_always_gives_one_fine_frame(
    upsampler: Upsampler, frames: Tensor, frames_at_once: int
) -> None:
    tokens = upsample(upsampler, frames, [0, 1], noise="shared", frames_at_once=frames_at_once)
    a, b = tokens[:, 0], tokens[:, 1]
    assert torch.equal(tokens, torch.stack([a, b, a, a, b], 1)) and not torch.equal(a, b)
    independent = upsample(upsampler, frames, [0, 1])
    assert torch.equal(a, independent[:, 0]), "the numbers are those of the first frame"


def test_with_shared_noise_clips_do_not_depend_on_those_beside_them(upsampler: Upsampler, frames: Tensor) -> None:
    """So several processes draw what one does. Samples of one caption have numbers of their own."""
    both = upsample(upsampler, frames, [0, 1], noise="shared")
    alone = [upsample(upsampler, frames, [clip], noise="shared") for clip in (0, 1)]
    assert torch.equal(both, torch.cat(alone))
    same = upsample(upsampler, frames[:1].expand(2, -1, -1), [0, 1], noise="shared")
    assert torch.equal(same[0], both[0]) and not torch.equal(same[1], same[0])


def test_who_asks_again_comes_after_who_waits() -> None:
    turns, order = module.Turns(), []

    def wait() -> None:
        with turns:
            order.append("waits")

    thread = threading.Thread(target=wait)
    with turns:
        thread.start()
        while not turns._next.locked():
            time.sleep(0.001)
    with turns:
        order.append("asks again")
    thread.join()
    assert order == ["waits", "asks again"]


def test_threads_take_turns(upsampler: Upsampler, frames: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch at a time, whatever the settings; who is stopped while it waits draws nothing more."""
    busy, overlaps, drawn = threading.Lock(), [], []

    def alone(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            overlaps.append(not busy.acquire(blocking=False))
            time.sleep(0.01)  # others want to
            try:
                return real(*arguments, **named)
            finally:
                busy.release()

        return call

    monkeypatch.setattr(Upsampler, "upsample_frames", alone(Upsampler.upsample_frames))
    monkeypatch.setattr(module, "decode_frames", alone(module.decode_frames))

    def work(seed: int) -> None:
        own = replace(upsampler, config=replace(upsampler.config, seed=seed))
        drawn.append(own.decode(own.upsample_clips(frames, KEYS, [PROMPT, PROMPT], [seed % 2])))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 4 and overlaps == [False] * 4 * (5 + 1)

    def stop(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upsampler.upsample_clips(frames, KEYS, [PROMPT, PROMPT], [0], progress=stop)
    assert len(overlaps) == 24, "before its first batch"
    work(0)
