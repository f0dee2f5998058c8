"""The benchmark around the probes: captions, sources, targets and the table."""

import json

import numpy as np
import pytest
import torch

from cogvideo.evaluation.statistics import Proportion
from cogvideo.worlds.benchmark import WHOLE, format_figure, format_table, reconstruct, run_benchmark
from cogvideo.worlds.digits.benchmark import DigitsBenchmark, draw_captions, real_frames
from cogvideo.worlds.digits.render import BACKGROUND, split_images

CONFIG = DigitsBenchmark(num_prompts=8, seed=3)


class DimTokenizer:
    """A stand-in for a tokenizer, which darkens every pixel a little."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def decode(self, ids: torch.Tensor) -> torch.Tensor:
        return ids * 0.98


def real(clips):
    captions = draw_captions(CONFIG.num_prompts, CONFIG.seed)
    assert clips.captions == tuple(caption.text for caption in captions)
    return real_frames(captions, clips.times)


def test_captions_show_test_digits_in_both_languages_and_repeat_with_the_seed():
    captions = draw_captions(60, 0)
    assert captions == draw_captions(60, 0) and captions[:20] == draw_captions(20, 0) != draw_captions(20, 1)
    assert {caption.clip.image for caption in captions} <= set(split_images("test").tolist())
    english = [caption.text.startswith("the ") for caption in captions]
    assert 10 < sum(english) < 50


def test_reconstruct_keeps_order_and_shape():
    frames = real_frames(draw_captions(3, 0), np.linspace(0, 4, 5))
    out = reconstruct(DimTokenizer(), frames, batch=4)
    assert out.dtype == np.uint8 and out.shape == frames.shape
    assert np.abs(out.astype(int) - frames * 0.98).max() <= 1


def test_reconstructions_are_copied_from_the_gpu(monkeypatch):
    plain = torch.Tensor.numpy

    def of_a_gpu(self, *, force=False):
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return plain(self, force=True)

    monkeypatch.setattr(torch.Tensor, "numpy", of_a_gpu)
    frames = real_frames(draw_captions(1, 0), np.zeros(1))
    assert reconstruct(DimTokenizer(), frames).shape == frames.shape


def test_a_perfect_generator_meets_every_target():
    lines: list[str] = []
    results = run_benchmark(CONFIG, DimTokenizer(), real, lines.append)
    assert len(lines) == 4
    checks = [results.check(target) for target in CONFIG.targets]
    assert len(checks) == 7 and all(check is not None and check[1] for check in checks)
    text = format_table(results)
    assert text.count(": met") == 7 and "NOT" not in text and "nan" not in text
    assert json.loads(json.dumps(results.to_json()))["generated"][WHOLE]["direction"]["right"] == 8


def test_a_generator_of_nothing_fails_every_target():
    def nothing(clips):
        return np.broadcast_to(np.array(BACKGROUND, np.uint8), real(clips).shape)

    results = run_benchmark(CONFIG, DimTokenizer(), nothing)
    assert format_table(results).count("NOT met") == 7
    assert not any(check["met"] for check in results.to_json()["targets"])


def test_targets_of_sets_that_cannot_be_generated_are_not_checked():
    results = run_benchmark(CONFIG, DimTokenizer(), lambda clips: None if clips.name == WHOLE else real(clips))
    assert format_table(results).count(": met") == 3 and "NOT" not in format_table(results)


def test_real_clips_alone_have_no_targets():
    results = run_benchmark(DigitsBenchmark(num_prompts=1), None, None)
    assert "nan" not in format_table(results) and "NaN" not in json.dumps(results.to_json())
    assert "target" not in format_table(results) and results.to_json()["targets"] == []


@pytest.mark.parametrize("bad", [{"num_prompts": 0}, {"clip_seconds": (4.0, 5.0)}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        DigitsBenchmark(**bad)


def test_figures_say_when_clips_were_left_out():
    assert format_figure(Proportion(1, 2), 4) == f"{Proportion(1, 2)}, n = 2"
    assert format_figure(Proportion(1, 2), 2) == str(Proportion(1, 2)) and format_figure(Proportion(0, 0), 4) == "-"
