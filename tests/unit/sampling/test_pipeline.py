"""The pipeline with random weights: shapes, and what a sample depends on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo.inference.clip_sampler import ClipSampler
from cogvideo.inference.engine import compile_program
from cogvideo.inference.sampler import ClusterDraw
from cogvideo.inference.schedules import sequential
from cogvideo.kernels import cpu as few_rows
from cogvideo.rng import sample_keys, sample_uniforms
from cogvideo.sampling.config import DrawConfig, SampleConfig
from cogvideo.sampling.pipeline import Pipeline
from tests.helpers import decoding as tiny

PROMPTS = ["the red digit 3", "数字", "quickly"]
SHORT = SampleConfig(rounds=1, num_clusters=8)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return tiny.pipeline(SHORT)


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


def test_pictures(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    pictures = pipeline.decode(tokens[:2, :3])
    assert pictures.shape == (2, 3, 16, 16, 3) and pictures.dtype == np.uint8
    assert (pictures[1, 2] == pipeline.decode(tokens[1, 2])).all()


def test_a_seed_repeats_and_another_does_not(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    assert torch.equal(tokens, pipeline.sample(PROMPTS))
    other = pipeline.sample(PROMPTS, replace(SHORT, seed=1))
    assert all((a != b).any() for a, b in zip(tokens, other, strict=True))


@pytest.mark.parametrize("clips_at_once", [1, 2])
def test_a_sample_does_not_see_its_batch(pipeline: Pipeline, tokens: torch.Tensor, clips_at_once: int) -> None:
    """Other prompts, their order and the size of batches."""
    again = pipeline.sample(PROMPTS[::-1], replace(SHORT, clips_at_once=clips_at_once))
    assert torch.equal(again.flip(0), tokens)


def test_without_a_compiler(
    pipeline: Pipeline, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch's own functions serve where the decoding kernels cannot be compiled."""
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few_rows.library.cache_clear()
    try:
        assert few_rows.library() is None
        assert torch.equal(pipeline.sample(PROMPTS), tokens)
    finally:
        few_rows.library.cache_clear()


def test_samples_of_a_prompt(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    two = pipeline.sample(PROMPTS, replace(SHORT, samples_per_prompt=2))
    assert torch.equal(two[::2], tokens)
    assert all((a != b).any() for a, b in zip(two[::2], two[1::2], strict=True))
    assert torch.equal(pipeline.sample([PROMPTS[0]] * 2), two[:2]), "a repeated prompt is another sample of it"


def test_rounds_keep_the_frames_there_are(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    key_frames = pipeline.sample(PROMPTS[:1], replace(SHORT, rounds=0))
    longer = pipeline.sample(PROMPTS[:1], replace(SHORT, rounds=2))
    assert torch.equal(tokens[:1, ::2], key_frames)
    assert torch.equal(longer[:, ::2], tokens[:1])


def test_stages_show_the_clip_grow(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    first, keys, whole = pipeline.stages(sample_keys(0, PROMPTS), SHORT)
    assert torch.equal(whole, tokens) and torch.equal(keys, tokens[:, ::2]) and torch.equal(first, tokens[:, :1])


def test_kept_batches_are_not_drawn_again(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    """Stopped after any batch, it goes on from what was kept and ends with the same clips, all of them counted."""
    config, kept, made = replace(SHORT, clips_at_once=2), {}, []

    def keep(name: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if name not in kept:
            kept[name] = make()
            made.append(name)
        return kept[name]

    keys = sample_keys(0, PROMPTS)
    *_, whole = pipeline.stages(keys, config, keep=keep)
    names = [f"{part}-00000{i}" for part in ("first-frame", "key-frames") for i in (0, 2)]
    names += [f"round-1-00000{i}" for i in (0, 2, 4)]
    assert torch.equal(whole, tokens) and made == names
    for last in range(len(names)):
        for name in names[last:]:
            del kept[name]
        made.clear()
        counted: list[int] = []
        *_, again = pipeline.stages(keys, config, keep=keep, progress=counted.append)
        assert torch.equal(again, whole) and made == names[last:]
        assert sum(counted) == pipeline.num_tokens(config, 3)
    kept[names[0]] = kept[names[0]][:1]
    with pytest.raises(ValueError, match="first-frame-000000 is of shape"):
        list(pipeline.stages(keys, config, keep=keep))


def test_a_given_first_frame_stays(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    keys = sample_keys(0, PROMPTS)
    given = (tokens[:, 0] + 1) % tiny.NUM_CODES
    key_frames, whole = pipeline.stages(keys, SHORT, first_frames=given)
    assert torch.equal(whole[:, 0], given) and torch.equal(whole[:, ::2], key_frames)
    assert (whole[:, 1:] != tokens[:, 1:]).any(), "what follows depends on it"
    assert torch.equal([*pipeline.stages(keys, SHORT, first_frames=tokens[:, 0])][-1], tokens)


def test_a_later_part_of_a_video_has_numbers_of_its_own(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    keys = sample_keys(0, PROMPTS)
    *_, later = pipeline.stages(keys, SHORT, first_frames=tokens[:, 0], start=4)
    assert all((a != b).any() for a, b in zip(later[:, 1:], tokens[:, 1:], strict=True))


def test_rounds_alone_do_what_they_do_within_a_clip(pipeline: Pipeline, tokens: torch.Tensor) -> None:
    keys = sample_keys(0, PROMPTS)
    counted: list[int] = []
    (once,) = pipeline.between(tokens[:, ::2], keys, SHORT, progress=counted.append)
    assert torch.equal(once, tokens) and sum(counted) == 3 * pipeline.num_tokens_between(SHORT, 5)
    (twice,) = pipeline.between(tokens, keys, SHORT, rounds_before=1)
    assert torch.equal(twice, pipeline.sample(PROMPTS, replace(SHORT, rounds=2)))


def test_styles_word_the_first_frame_alone(pipeline: Pipeline) -> None:
    photo, oil, none = (pipeline.texts(["a"], replace(SHORT, style=style)) for style in ("photo", "oil", "none"))
    assert photo == pipeline.texts(["a"], SHORT)
    assert oil.first_frame.texts == [tiny.encode("a 油画风格")] and none.first_frame.texts == [tiny.encode("a")]
    assert oil.key_frames == photo.key_frames and oil.rounds == photo.rounds
    own = tiny.pipeline(SHORT, learn_first_frame=True)
    with pytest.raises(ValueError, match="style=oil: stage 1 of these weights draws the first frame too"):
        own.texts(["a"], replace(SHORT, style="oil"))


def test_a_stage_1_that_learned_first_frames_draws_them_itself() -> None:
    """Drawn in two parts, with settings of their own where wanted, as in one run over all five frames."""
    config = replace(SHORT, rounds=0, first_frame=SHORT.key_frames)
    pipeline = tiny.pipeline(config, learn_first_frame=True)
    model, texts = pipeline.sequential, pipeline.texts(PROMPTS, config)
    assert texts.first_frame == texts.key_frames
    program = compile_program(model.config, sequential(model.config.layout, (), range(5)))
    draw = ClusterDraw(pipeline.labels(8), config.key_frames.temperature, config.key_frames.top_k_clusters, 0.89)
    sampler = ClipSampler(model, program, draw, config.key_frames, 8)
    numbers = sample_uniforms(sample_keys(config.seed, PROMPTS, 1), 0, range(5), model.config.frame_len)
    unknown = torch.zeros(3, 5, model.config.frame_len, dtype=torch.int64)
    whole = sampler(unknown, texts.key_frames.texts, texts.key_frames.guide, numbers)
    assert torch.equal(pipeline.sample(PROMPTS), whole)


@pytest.mark.parametrize("schedule", ["wavefront", "speculative"])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_a_schedule_changes_no_token(pipeline: Pipeline, schedule: str, guidance: float | None) -> None:
    """With and without guides, which get no text bonus whatever the schedule."""
    draw = DrawConfig(guidance_scale=guidance, text_bonus=1.4)
    config = replace(SHORT, rounds=2, first_frame=draw, key_frames=draw, interpolation=draw)
    whole = pipeline.sample(PROMPTS, config)
    counted: list[int] = []
    again = pipeline.sample(PROMPTS, replace(config, schedule=schedule), counted.append)
    assert torch.equal(again, whole) and sum(counted) == pipeline.num_tokens(config, 3)


def test_texts(pipeline: Pipeline) -> None:
    """What is said to the models, round by round, as published."""
    texts = pipeline.texts(["a  cat\n"], SampleConfig())

    def clip(seconds: str, caption: str) -> list[int]:
        return [*tiny.encode(seconds + "秒"), tiny.VOCABULARY.newline, *tiny.encode(caption)]

    assert texts.first_frame.texts == [tiny.encode("a cat 高清摄影")] and texts.first_frame.guide is None
    assert texts.key_frames.texts == [clip("4.0", "a cat 视频")]
    assert texts.key_frames.guide == clip("4.0", "视频")
    assert [round.texts for round in texts.rounds] == [[clip(s, "a cat")] for s in ("2.0", "1.0", "0.5")]
    assert all(round.guide is None for round in texts.rounds)


def test_guides_where_asked(pipeline: Pipeline) -> None:
    guided = DrawConfig(guidance_scale=2.0)
    texts = pipeline.texts(["a"], SampleConfig(first_frame=guided, interpolation=guided))
    assert texts.first_frame.guide == tiny.encode("视频 高清摄影")
    newline = [tiny.VOCABULARY.newline]
    assert texts.rounds[2].guide == [*tiny.encode("0.5秒"), *newline, *tiny.encode("视频")]
    assert texts.rounds[2].texts == [[*tiny.encode("0.5秒"), *newline, *tiny.encode("a 视频")]]


def test_shorter_clips_are_said_so(pipeline: Pipeline) -> None:
    texts = pipeline.texts(["a"], SampleConfig(seconds=1.0))
    said = [of_round.texts[0][:3] for of_round in (texts.key_frames, *texts.rounds)]
    assert said[:3] == [tiny.encode("1.0"), tiny.encode("0.5"), tiny.encode("0.2")]


def test_the_text_steers(pipeline: Pipeline) -> None:
    """Same random numbers, other words: the model reads them."""
    spoken = replace(pipeline.prompt, image_suffix=" other")
    changed = tiny.pipeline(SHORT)
    changed.prompt = spoken
    assert (changed.sample(PROMPTS[:1]) != pipeline.sample(PROMPTS[:1])).any()


def test_bad_prompts_are_refused_first(pipeline: Pipeline) -> None:
    for prompts, said in (
        ([], "there is no prompt"),
        (["a", " \n"], "the prompt is empty"),
        (["x" * 99], "shorten it"),
    ):
        with pytest.raises(ValueError, match=said):
            pipeline.sample(prompts)


def test_without_stage_2(pipeline: Pipeline) -> None:
    stage1 = Pipeline(
        encode=tiny.encode,
        prompt=pipeline.prompt,
        image_tokenizer=pipeline.image_tokenizer,
        sequential=pipeline.sequential,
        config=SHORT,
    )
    with pytest.raises(ValueError, match="set rounds=0"):
        stage1.sample(PROMPTS)
    assert stage1.sample(PROMPTS[:1], replace(SHORT, rounds=0)).shape == (1, 5, 4)
