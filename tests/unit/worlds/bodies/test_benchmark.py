"""The benchmark of the bodies world: its captions and real clips, targets, and what frozen clips score."""

from dataclasses import replace

import numpy as np
import pytest

from cogvideo.worlds.benchmark import WHOLE, format_table, run_benchmark, write_report
from cogvideo.worlds.bodies.benchmark import CONTINUED, BodiesBenchmark
from cogvideo.worlds.bodies.files import Settings, make_clip
from cogvideo.worlds.bodies.scene import FPS, ROLLING

pytest.importorskip("pybullet", reason="the bodies world needs the extra [worlds]")

SMALL = BodiesBenchmark(num_prompts=4, seed=17)


def test_sets_have_the_captions_of_the_data_set_and_clips_begin_where_these_do():
    made = [make_clip(Settings("test", 17, 64), index) for index in range(4)]
    wanted = [(frames, line) for frames, truth in made for line in truth.captions]
    for name, clips in SMALL.sets.items():
        chosen = [(frames, line) for frames, line in wanted if line.clip_seconds == clips.seconds]
        assert clips.captions == tuple(line.text for _, line in chosen)
        real = SMALL.real(clips)
        for shown, (frames, line) in zip(real, chosen, strict=True):
            first = round(line.start * FPS)
            np.testing.assert_array_equal(shown[0], frames[first])
            np.testing.assert_array_equal(shown[-1], frames[first + round(clips.seconds * FPS)])
        assert real.shape[1] == (33 if name == WHOLE else 5)
    assert SMALL.sets["4 s"].captions == SMALL.sets[WHOLE].captions and len(SMALL.sets[WHOLE].captions) == 4


def test_real_clips_meet_targets_and_frozen_ones_do_not(quick_shapes, tmp_path):
    perfect = run_benchmark(SMALL, None, SMALL.real)
    checks = {(t.measure, t.set_name): perfect.check(t) for t in SMALL.targets if t.measure != "shapes"}
    assert any(checks.values()) and all(check is None or check[1] for check in checks.values())
    two = replace(SMALL, num_prompts=2)
    frozen = run_benchmark(two, None, lambda clips: two.real(clips)[:, :1].repeat(len(clips.times), axis=1))
    text = format_table(frozen)
    assert "NOT met" in text and "nan" not in text and text.startswith(f"bodies, protocol {two.hash}\n")
    assert frozen.to_json()["generated"][WHOLE]["direction"]["right"] == 0
    assert frozen.to_json()["generated"][WHOLE]["colours"]["right"] == 2
    write_report(tmp_path / "page.html", frozen)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert two.hash in page and page.count("data:image/png") == 2 * len(two.sets)


def test_empty_rooms_fail_every_target():
    """Nothing is left out because there is nothing to measure."""
    results = run_benchmark(
        SMALL, None, lambda clips: np.full((len(clips.captions), len(clips.times), 64, 64, 3), 100, np.uint8)
    )
    real = [t for t in SMALL.targets if results.figure("original", t.set_name, t.measure) is not None]
    assert len(real) >= 8 and not any(results.check(target)[1] for target in real)
    figures = results.summaries["generated"][WHOLE].figures
    for measure in ("speed", "gravity", "still", "depth", "permanence", "toppled"):
        assert figures[measure].total and not figures[measure].right, measure


def test_continued_clips_are_of_scenes_that_stay_in_view(quick_shapes):
    longer = replace(SMALL, num_prompts=2, continued=True, seed=8)
    clips = longer.sets[CONTINUED]
    staying = [scene for scene in longer._made.scenes if scene.event not in ROLLING]
    assert len(clips.captions) == len(staying) == 1
    real = longer.real(clips)
    assert real.shape == (1, 97, 64, 64, 3) and clips.times[-1] == 12
    whole = longer.sets[WHOLE]
    np.testing.assert_array_equal(real[0, :33], longer.real(whole)[whole.captions.index(clips.captions[0])])
    figures = longer.summarise(clips, real).figures
    assert figures["late_colours"].right == 1


def test_unseen_combinations_have_their_own_hash_and_targets_ten_points_lower():
    unseen = replace(SMALL, split="unseen")
    assert len({SMALL.hash, unseen.hash, replace(SMALL, continued=True).hash, replace(SMALL, seed=6).hash}) == 4
    for here, there in zip(SMALL.targets, unseen.targets, strict=True):
        lower = here.limit - there.limit if here.at_least else there.limit - here.limit
        assert lower == pytest.approx(0.10)


@pytest.mark.parametrize("bad", [{"split": "train"}, {"num_prompts": 0}, {"seed": -1}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        BodiesBenchmark(**bad)
