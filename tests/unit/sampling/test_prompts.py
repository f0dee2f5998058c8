"""Captions as each model reads them, as published, and what is refused."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from cogvideo.sampling.config import DrawConfig, SampleConfig
from cogvideo.sampling.prompts import ClipPrompts, model_clip_seconds
from cogvideo.sequence.layout import ClipLayout
from tests.helpers import decoding as tiny
from tests.helpers import pipelines

PIPELINE = pipelines.pipeline()
NEWLINE = tiny.VOCABULARY.newline


def encoded(caption: str, config: SampleConfig) -> ClipPrompts:
    (prompts,) = PIPELINE.encode_prompts([caption], config)
    return prompts


def clip_text(seconds: str, caption: str) -> list[int]:
    return [*tiny.encode(seconds + "秒"), NEWLINE, *tiny.encode(caption)]


def test_texts_of_every_stage() -> None:
    prompts = encoded("a  cat\n", SampleConfig())
    assert prompts.first_frame.text == tiny.encode("a cat 高清摄影") and prompts.first_frame.guide is None
    assert prompts.key_frames.text == clip_text("4.0", "a cat 视频")
    assert prompts.key_frames.guide == clip_text("4.0", "视频")
    assert [prompt.text for prompt in prompts.rounds] == [clip_text(s, "a cat") for s in ("2.0", "1.0", "0.5")]
    assert all(prompt.guide is None for prompt in prompts.rounds)


def test_guides_where_there_is_guidance() -> None:
    guided = DrawConfig(guidance_scale=2.0)
    prompts = encoded("a", SampleConfig(first_frame=guided, interpolation=guided))
    assert prompts.first_frame.guide == tiny.encode("视频 高清摄影")
    assert prompts.rounds[2].guide == clip_text("0.5", "视频")
    assert prompts.rounds[2].text == clip_text("0.5", "a 视频")


def test_the_text_gives_the_length_of_each_models_clip() -> None:
    prompts = encoded("a", SampleConfig(seconds=1.0))
    lengths = [prompt.text[:3] for prompt in (prompts.key_frames, *prompts.rounds)]
    assert lengths[:3] == [tiny.encode("1.0"), tiny.encode("0.5"), tiny.encode("0.2")]
    layout = ClipLayout.interpolation(6, 4, 5)
    assert [model_clip_seconds(layout, frames, 4.0) for frames in (5, 9, 17)] == [2.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("seconds", "lengths"),
    [
        (0.64, ("0.64", "0.32", "0.16", "0.08")),
        (1.2, ("1.2", "0.6", "0.3", "0.15")),
        (1.25, ("1.25", "0.625", "0.3125", "0.15625")),
        (4 / 3, ("1.3333333333333333", "0.667", "0.333", "0.167")),
    ],
)
def test_lengths_are_rounded_only_if_they_are_measured(seconds: float, lengths: tuple[str, ...]) -> None:
    prompts = encoded("a", SampleConfig(seconds=seconds))
    texts = [prompt.text for prompt in (prompts.key_frames, *prompts.rounds)]
    assert texts == [clip_text(lengths[0], "a 视频"), *(clip_text(length, "a") for length in lengths[1:])]


def test_styles_change_the_text_of_the_first_frame_only() -> None:
    config = SampleConfig(rounds=1)
    photo, oil, none = (encoded("a", replace(config, style=style)) for style in ("photo", "oil", "none"))  # type: ignore[arg-type]
    assert photo == encoded("a", config)
    assert oil.first_frame.text == tiny.encode("a 油画风格") and none.first_frame.text == tiny.encode("a")
    assert oil.key_frames == photo.key_frames and oil.rounds == photo.rounds
    own = pipelines.pipeline(learn_first_frame=True)
    with pytest.raises(ValueError, match="style=oil needs a text-to-image trunk, but stage 1 of these weights"):
        own.encode_prompts(["a"], replace(config, style="oil"))


def test_each_caption_is_encoded_once_per_text(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def encode(text: str) -> list[int]:
        texts.append(text)
        return tiny.encode(text)

    pipeline = pipelines.pipeline()
    monkeypatch.setattr(pipeline, "encode", encode)
    pipeline.sample(["a", "b"], SampleConfig(rounds=1, num_clusters=8, samples_per_prompt=3))
    captions = [text for text in texts if not text.endswith("秒")]
    # first frame, guided key frames, one round
    assert sorted(captions) == sorted(["a 高清摄影", "b 高清摄影", "a 视频", "b 视频", "视频", "a", "b"])


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "there is no prompt"),
        (["a", " \n"], "the prompt is empty"),
        (["x" * 99], "shorten it"),
    ],
)
def test_refused(captions: Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PIPELINE.encode_prompts(captions, SampleConfig())
    with pytest.raises(ValueError, match=message):
        PIPELINE.sample(captions)
