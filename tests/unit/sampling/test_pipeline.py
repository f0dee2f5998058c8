"""The pipeline with random weights: shapes, what a sample depends on, and rounds of interpolation."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cogvideo.dtypes import ACTIVATION_DTYPES
from cogvideo.inference.engine import Engine, build_program
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import sequential, wavefront
from cogvideo.kernels import cpu
from cogvideo.model.quantize import Linear, convert_weights, offload_layers
from cogvideo.rng import sample_keys, sample_uniforms
from cogvideo.sampling.config import DrawConfig, SampleConfig
from cogvideo.sampling.jobs import ClipJob
from cogvideo.sampling.pipeline import MAX_SAMPLERS, FrameSampler, Pipeline, interpolate_once
from cogvideo.sampling.prompts import ClipPrompts, EncodedPrompt
from tests.helpers import decoding as tiny
from tests.helpers import pipelines
from tests.helpers.batches import DictCache

PROMPTS = ["the red digit 3", "数字", "quickly"]
SHORT = SampleConfig(rounds=1, num_clusters=8)
KEYS = sample_keys(0, PROMPTS)
ELSEWHERE = torch.device("meta")
"""Any device but the CPU will do, and this one needs no driver."""
NUM_CLIPS = 5


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return pipelines.pipeline(SHORT)


@pytest.fixture(scope="module")
def tokens(pipeline: Pipeline) -> torch.Tensor:
    return pipeline.sample(PROMPTS)


def test_shapes_and_counts(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    assert tokens.shape == (3, 9, 4) and tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < tiny.NUM_CODES
    assert [pipeline.num_frames(replace(SHORT, rounds=r)) for r in range(4)] == [5, 9, 17, 33]
    assert pipeline.fps(SampleConfig()) == 8.0
    drawn: list[int] = []
    pipeline.sample(PROMPTS[:1], SHORT, drawn.append)
    assert sum(drawn) == pipeline.num_tokens(SHORT, 1) == 9 * 4


def test_samplers_of_past_settings_are_forgotten(pipeline: Pipeline) -> None:
    for number in range(40):
        config = replace(SHORT, key_frames=replace(SHORT.key_frames, temperature=1 + number / 100))
        sampler = pipeline.frame_sampler("key_frames", config).token_sampler
        assert isinstance(sampler, ClusterSampler) and sampler.temperature == 1 + number / 100
    assert len(pipeline._samplers) == MAX_SAMPLERS


def test_pictures(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    pictures = pipeline.decode(tokens[:2, :3])
    assert pictures.shape == (2, 3, 16, 16, 3) and pictures.dtype == np.uint8
    assert (pictures[1, 2] == pipeline.decode(tokens[1, 2])).all()


def test_a_seed_repeats_and_another_does_not(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    assert torch.equal(tokens, pipeline.sample(PROMPTS))
    other = pipeline.sample(PROMPTS, replace(SHORT, seed=1))
    assert all((a != b).any() for a, b in zip(tokens, other, strict=True))


@pytest.mark.parametrize("clips_at_once", [1, 2])
def test_a_sample_does_not_depend_on_its_batch(pipeline: Pipeline, tokens: torch.Tensor, clips_at_once: int) -> None:
    """Other prompts, their order and the size of batches."""
    again = pipeline.sample(PROMPTS[::-1], replace(SHORT, clips_at_once=clips_at_once))
    assert torch.equal(again.flip(0), tokens)


def test_without_a_compiler_the_same_tokens_are_drawn(
    pipeline: Pipeline, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch's own functions are used where the CPU kernels cannot be compiled."""
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.library.cache_clear()
    try:
        assert cpu.library() is None
        assert torch.equal(pipeline.sample(PROMPTS), tokens)
    finally:
        cpu.library.cache_clear()


def test_samples_of_a_prompt_differ(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    two = pipeline.sample(PROMPTS, replace(SHORT, samples_per_prompt=2))
    assert torch.equal(two[::2], tokens)
    assert all((a != b).any() for a, b in zip(two[::2], two[1::2], strict=True))
    assert torch.equal(pipeline.sample([PROMPTS[0]] * 2), two[:2]), "a repeated prompt is another sample of it"


def test_rounds_keep_existing_frames(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    key_frames = pipeline.sample(PROMPTS[:1], replace(SHORT, rounds=0))
    longer = pipeline.sample(PROMPTS[:1], replace(SHORT, rounds=2))
    assert torch.equal(tokens[:1, ::2], key_frames)
    assert torch.equal(longer[:, ::2], tokens[:1])


def encoded(pipeline: Pipeline, config: SampleConfig = SHORT) -> list[ClipPrompts]:
    return pipeline.encode_prompts(PROMPTS, config)


def test_stages_show_the_clip_grow(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    first, keys, whole = pipeline.stages(KEYS, encoded(pipeline), SHORT)
    assert torch.equal(whole.tokens, tokens) and whole.fps == 2.0
    assert torch.equal(keys.tokens, tokens[:, ::2]) and keys.fps == 1.0
    assert torch.equal(first.tokens, tokens[:, :1])


def test_stopped_after_any_batch_a_run_ends_with_the_same_clips(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    config, cache = replace(SHORT, clips_at_once=2), DictCache()
    *_, whole = pipeline.stages(KEYS, encoded(pipeline), config, cache=cache)
    names = [f"{stage}-00000{first}" for stage in ("first-frame", "key-frames") for first in (0, 2)]
    names += [f"round-1-00000{first}" for first in (0, 2, 4)]
    assert torch.equal(whole.tokens, tokens) and cache.stored == names
    for last in range(len(names)):
        for name in names[last:]:
            del cache.batches[name]
        cache.stored.clear()
        counted: list[int] = []
        *_, again = pipeline.stages(KEYS, encoded(pipeline), config, cache=cache, progress=counted.append)
        assert torch.equal(again.tokens, whole.tokens) and cache.stored == names[last:]
        assert sum(counted) == pipeline.num_tokens(config, 3)


def test_a_given_first_frame_stays(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    given = (tokens[:, :1] + 1) % tiny.NUM_CODES
    key_frames, whole = pipeline.stages(KEYS, encoded(pipeline), SHORT, previous_frames=given)
    assert torch.equal(whole.tokens[:, :1], given) and torch.equal(whole.tokens[:, ::2], key_frames.tokens)
    assert (whole.tokens[:, 1:] != tokens[:, 1:]).any(), "later frames depend on it"
    *_, same = pipeline.stages(KEYS, encoded(pipeline), SHORT, previous_frames=tokens[:, :1])
    assert torch.equal(same.tokens, tokens)


def test_a_continued_video_has_random_numbers_of_its_own(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    """The same first frame as at the start of the clip, but later in the video."""
    previous = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
    *_, later = pipeline.stages(KEYS, encoded(pipeline), SHORT, previous_frames=previous)
    assert torch.equal(later.tokens[:, :9], previous)
    assert all((a != b).any() for a, b in zip(later.tokens[:, 9:], tokens[:, 1:], strict=True))


@pytest.mark.parametrize("given", [2, 3, 4])
def test_several_given_frames_continue_as_the_clip_did(pipeline: Pipeline, tokens: torch.Tensor, given: int) -> None:
    """Key frames are every second frame; stage 1 sees the last `given` of those that are continued."""
    config, counted = replace(SHORT, given_frames=given), list[int]()
    previous = tokens[:, : 2 * given - 1]
    job = ClipJob(pipeline, config, KEYS, encoded(pipeline, config), previous)
    key_frames, whole = job.stages(range(len(KEYS)), progress=counted.append)
    assert torch.equal(key_frames.tokens, tokens[:, ::2])
    assert (whole.fps, key_frames.fps) == (2.0, 1.0)
    if given == 3:  # stage 2's clips begin at every second key frame, here at the same ones
        assert torch.equal(whole.tokens, tokens)
    assert (job.num_frames, job.seconds) == (9, 4.0) and pipeline.num_given(config, previous.shape[1]) == given
    other = previous.clone()
    other[:, 0] = (other[:, 0] + 1) % tiny.NUM_CODES
    *_, changed = pipeline.stages(KEYS, encoded(pipeline), config, previous_frames=other)
    assert (changed.tokens[:, 2 * given - 1 :] != tokens[:, 2 * given - 1 :]).any(), "it sees the first of them"


def test_as_many_given_frames_as_there_are(pipeline: Pipeline) -> None:
    assert [pipeline.num_given(replace(SHORT, given_frames=3), count) for count in (0, 1, 3, 5, 40)] == [1, 1, 2, 3, 3]
    with pytest.raises(ValueError, match="given_frames=5; these weights accept at most 4 given frames"):
        pipeline.num_frames(replace(SHORT, given_frames=5), 9)


def test_interpolation_alone_continues_a_clip(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    counted: list[int] = []
    prompts = pipeline.encode_interpolation_prompts(PROMPTS, SHORT, 5)
    (once,) = pipeline.interpolate(tokens[:, ::2], KEYS, prompts, SHORT, progress=counted.append)
    assert torch.equal(once.tokens, tokens) and sum(counted) == 3 * pipeline.num_interpolation_tokens(SHORT, 5)
    prompts = pipeline.encode_interpolation_prompts(PROMPTS, SHORT, 9)
    (twice,) = pipeline.interpolate(tokens, KEYS, prompts, SHORT, rounds_before=1)
    assert torch.equal(twice.tokens, pipeline.sample(PROMPTS, replace(SHORT, rounds=2)))


def test_stage_1_draws_first_frames_that_it_was_trained_on() -> None:
    """In two stages, with settings of their own if wanted, it draws what one pass over all five frames draws."""
    config = replace(SHORT, rounds=0, first_frame=SHORT.key_frames)
    pipeline = pipelines.pipeline(config, learn_first_frame=True)
    model, prompts = pipeline.sequential, pipeline.encode_prompts(PROMPTS, config)
    assert all(prompt.first_frame == prompt.key_frames for prompt in prompts)
    program = build_program(model.config, sequential(model.config.layout, (), range(5)))
    draw = ClusterSampler(pipeline.labels(8), config.key_frames.temperature, config.key_frames.top_k_clusters, 0.89)
    sampler = FrameSampler(Engine(model), program, draw, config.key_frames)
    numbers = sample_uniforms(sample_keys(config.seed, PROMPTS, 1), 0, range(5), model.config.frame_len)
    blank = torch.zeros(3, 5, model.config.frame_len, dtype=torch.int64)
    whole = sampler.sample(blank, [prompt.key_frames for prompt in prompts], numbers, clips_at_once=8)
    assert torch.equal(pipeline.sample(PROMPTS), whole)


class CountingSampler:
    """A token sampler that draws token 47 everywhere and records the random numbers it was given."""

    def __init__(self) -> None:
        self.uniforms: list[torch.Tensor] = []

    def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        self.uniforms.append(uniforms)
        return torch.full(logits.shape[:-1], 47)


def interpolated(frames: torch.Tensor, token_sampler: CountingSampler) -> torch.Tensor:
    model = tiny.model("interpolation", 2)
    layout = model.config.layout
    program = build_program(model.config, sequential(layout, layout.given_frames, layout.generation_order))
    sampler = FrameSampler(Engine(model), program, token_sampler, DrawConfig(text_bonus=0.0))
    captions = ["a", "b"][: len(frames)]
    prompts = [EncodedPrompt(tiny.encode(caption), None) for caption in captions]
    return interpolate_once(sampler, frames, sample_keys(0, captions), prompts, 2, clips_at_once=3)


def random_frames(samples: int, count: int) -> torch.Tensor:
    return torch.randint(40, (samples, count, 16), generator=torch.Generator().manual_seed(0))


def test_new_frames_lie_between_the_given_ones() -> None:
    frames, token_sampler = random_frames(2, 9), CountingSampler()
    out = interpolated(frames, token_sampler)
    assert out.shape == (2, 17, 16)
    assert torch.equal(out[:, ::2], frames)
    assert (out[:, 1::2] == 47).all()
    numbers = torch.cat([uniforms[..., 0].flatten() for uniforms in token_sampler.uniforms])
    assert len(numbers) == 2 * 8 * 16 == len(numbers.unique()), "every slot has random numbers of its own"


@pytest.mark.parametrize("count", [2, 4])
def test_a_last_clip_that_lacks_frames_repeats_the_last_frame(count: int) -> None:
    """Any number of frames can be interpolated; what is drawn beyond the last frame is dropped."""
    frames = random_frames(1, count)
    out = interpolated(frames, CountingSampler())
    assert out.shape == (1, 2 * count - 1, 16) and torch.equal(out[:, ::2], frames) and (out[:, 1::2] == 47).all()
    longer = torch.cat([frames, frames[:, -1:]], dim=1)
    assert torch.equal(out, interpolated(longer, CountingSampler())[:, :-2])


def test_one_frame_cannot_be_interpolated() -> None:
    with pytest.raises(ValueError, match="interpolation needs at least 2 frames, got 1"):
        interpolated(random_frames(1, 1), CountingSampler())


@pytest.mark.parametrize("schedule", ["wavefront", "speculative"])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_schedule_changes_no_token(pipeline: Pipeline, schedule: str, guidance: float | None) -> None:
    """With and without guides, which get no text bonus under any schedule."""
    draw = DrawConfig(guidance_scale=guidance, text_bonus=1.4)
    config = replace(SHORT, rounds=2, first_frame=draw, key_frames=draw, interpolation=draw)
    whole = pipeline.sample(PROMPTS, config)
    counted: list[int] = []
    again = pipeline.sample(PROMPTS, replace(config, schedule=schedule), counted.append)
    assert torch.equal(again, whole) and sum(counted) == pipeline.num_tokens(config, 3)


def test_the_text_changes_the_clip(pipeline: Pipeline) -> None:
    """Same random numbers, another text."""
    changed = pipelines.pipeline(SHORT)
    changed.prompt_format = replace(pipeline.prompt_format, image_suffix=" other")
    assert (changed.sample(PROMPTS[:1]) != pipeline.sample(PROMPTS[:1])).any()


def test_without_stage_2(pipeline: Pipeline) -> None:
    stage1 = Pipeline(
        encode=tiny.encode,
        prompt_format=pipeline.prompt_format,
        image_tokenizer=pipeline.image_tokenizer,
        sequential=pipeline.sequential,
        config=SHORT,
    )
    with pytest.raises(ValueError, match="set rounds=0"):
        stage1.sample(PROMPTS)
    assert stage1.sample(PROMPTS[:1], replace(SHORT, rounds=0)).shape == (1, 5, 4)


@pytest.fixture(scope="module")
def sampler() -> FrameSampler:
    return pipelines.pipeline().frame_sampler("key_frames", pipelines.pipeline().config)


def inputs(sampler: FrameSampler) -> tuple[torch.Tensor, list[EncodedPrompt], torch.Tensor]:
    layout = sampler.engine.model.config.layout
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(tiny.NUM_CODES, (NUM_CLIPS, layout.num_frames, layout.frame_len), generator=generator)
    prompts = [EncodedPrompt(tiny.encode("a" * (clip + 1)), tiny.encode("any")) for clip in range(NUM_CLIPS)]
    return known, prompts, torch.rand(*known.shape, 2, dtype=torch.float64, generator=generator)


def test_the_batch_size_changes_no_token(sampler: FrameSampler) -> None:
    whole = sampler.sample(*inputs(sampler), clips_at_once=NUM_CLIPS)
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
    assert sum(counted) == NUM_CLIPS * sampler.program.tokens_per_clip, "loaded tokens count as well"


def test_a_cached_batch_of_another_shape_is_refused(sampler: FrameSampler) -> None:
    cache = DictCache({"x-000000": torch.zeros(1, 5, 4, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"the cached batch x-000000 has shape \(1, 5, 4\), expected \(2, 5, 4\)"):
        sampler.sample(*inputs(sampler), clips_at_once=2, name="x", cache=cache)


@pytest.mark.parametrize("offloaded", [False, True])
# fake tensors cannot be moved as the view of bytes that float8 matrices are meanwhile
@pytest.mark.parametrize("weights", [name for name in ACTIVATION_DTYPES if name != "float8"])
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
