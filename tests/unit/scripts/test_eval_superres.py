"""scripts/eval_superres.py: flicker counts where the truth stands still, and better frames score better."""

import numpy as np
import pytest

from cogvideo.worlds.digits.files import draw_clips
from cogvideo.worlds.digits.render import CANVAS, FPS, render
from tests.helpers.scripts import load_script

eval_superres = load_script("eval_superres")


def test_flicker_is_change_where_the_truth_stands_still() -> None:
    truth = np.zeros((1, 3, 4, 4, 3), np.uint8)
    truth[0, 1, 0] = 200  # one row of four moves in both steps
    frames = truth.copy()
    frames[0, 2, 1, 0] = 12  # a still pixel changes once, by 12
    assert eval_superres.still_flicker(frames, truth) == pytest.approx(12 / (2 * 12))
    brighter = truth + np.arange(3, dtype=np.uint8)[None, :, None, None, None]
    assert np.isnan(eval_superres.still_flicker(frames, brighter))


def test_scores_of_enlarged_and_true_frames() -> None:
    clips = [clip for clip, _ in draw_clips("test", 3, 0)]
    small, truth = (np.stack([render(clip, np.arange(2) / FPS, side) for clip in clips]) for side in (CANVAS, 120))
    nearest, bicubic, true = (
        eval_superres.score(frames, truth, clips)
        for frames in (eval_superres.enlarge(small, "nearest"), eval_superres.enlarge(small, "bicubic"), truth)
    )
    assert 20 < nearest.psnr < bicubic.psnr < true.psnr == 100.0
    assert nearest.ssim < bicubic.ssim < true.ssim == pytest.approx(1.0)
    assert true.flicker == 0 < bicubic.flicker < 5 and true.colour == 1.0
