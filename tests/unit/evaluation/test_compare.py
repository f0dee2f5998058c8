"""Measuring and comparing sets of clips: FVD end to end with a stand-in network, its floor, ceiling and order."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo.evaluation import compare as compare_module
from cogvideo.evaluation import measure
from cogvideo.evaluation.compare import compare
from cogvideo.evaluation.comparison_report import format_comparison, write_report
from cogvideo.evaluation.frechet import Moments, frechet_distance
from cogvideo.evaluation.measure import Meter, choose_clips
from cogvideo.evaluation.networks import FeatureNetwork, open_network
from cogvideo.evaluation.preprocessing import network_input, resize_frames
from cogvideo.evaluation.protocols import LOCAL, Protocol
from cogvideo.evaluation.sources import Clip, ClipSource
from cogvideo.files import atomic_write
from cogvideo.locks import lock_output
from tests.helpers.networks import CaptionStandIn, Plain, StandIn, write_network

SIDE, LENGTH = 16, 8


class ArrayClip(Clip):
    """Frames in memory, 8 per second."""

    def __init__(self, name: str, frames) -> None:
        self.name, self.array = name, frames
        self.reads = 0

    @property
    def num_frames(self) -> int:
        return len(self.array)

    @property
    def seconds(self):
        return np.arange(len(self.array)) / 8

    @property
    def identity(self) -> str:
        return self.name

    def read(self, indices):
        self.reads += 1
        return self.array[indices]


def moving_square(rng: np.random.Generator):
    """A bright square on a dark ground that moves right by one pixel per frame."""
    frames = np.full((LENGTH, SIDE, SIDE, 3), rng.integers(0, 60), np.uint8)
    top, left = rng.integers(0, SIDE - 5, 2)
    for index in range(LENGTH):
        frames[index, top : top + 5, (left + index + np.arange(5)) % SIDE] = rng.integers(180, 255)
    return frames


def clips(count: int, seed: int, change=lambda frames, rng: frames) -> ClipSource:
    rng = np.random.default_rng(seed)
    made = tuple(ArrayClip(f"{seed}-{index:03d}", change(moving_square(rng), rng)) for index in range(count))
    return ClipSource(f"set {seed}", "frames", made)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> FeatureNetwork:
    file = tmp_path_factory.mktemp("network") / "net.pt"
    write_network(file, StandIn())
    return open_network("i3d", file, torch.device("cpu"), trust=True)


def protocol(network: FeatureNetwork | None = None, **changes) -> Protocol:
    small = replace(LOCAL, frames=LENGTH, side=SIDE, i3d_side=SIDE, **changes)
    return small.with_networks({} if network is None else {"i3d": network.sha256})


def test_fvd_is_that_of_the_features_by_hand(network: FeatureNetwork) -> None:
    for small in (protocol(network), protocol(network, divisor="n")):
        real, generated = clips(10, 0), clips(10, 1)
        result = compare(Meter(small, {"i3d": network}, batch=3), generated, real)
        moments = []
        for source in (real, generated):
            inputs = [
                network_input(small, resize_frames(clip.array, SIDE, "center", "bilinear"), "i3d")
                for clip in source.clips
            ]
            moments.append(Moments.of(network.features(torch.stack(inputs))))
        number = result.numbers["fvd"]
        assert number.value == pytest.approx(frechet_distance(*moments, small.divisor), rel=1e-6)
        assert (number.count, number.floor_count, number.ceiling) == (10, 5, None)
        assert number.limit is None


def test_corruptions_are_farther_away_than_the_floor(network: FeatureNetwork) -> None:
    def frozen(frames, rng):
        return frames[:1].repeat(LENGTH, axis=0)

    def shuffled(frames, rng):
        return rng.permutation(frames)

    def noisy(frames, rng):
        return np.clip(frames + rng.normal(0, 40, frames.shape), 0, 255).astype(np.uint8)

    meter = Meter(protocol(network, clips=40), {"i3d": network})
    results = {
        change.__name__: compare(meter, clips(40, 1, change), clips(80, 0)).numbers
        for change in (frozen, shuffled, noisy)
    }
    same = compare(meter, clips(40, 1), clips(80, 0)).numbers
    assert same["fvd"].floor_count == 40 and 0 <= same["fvd"].floor < 2 * same["fvd"].value
    for name, numbers in results.items():
        assert numbers["fvd"].value > 2 * numbers["fvd"].floor, name
        assert numbers["kvd"].value > numbers["kvd"].floor, name
        assert numbers["precision"].value < same["precision"].value, name
    # A frozen clip moves least; that is a fault, not a merit.
    assert results["frozen"]["frozen"].value == 1 and results["frozen"]["flicker"].value is None
    assert results["frozen"]["motion"].value == 0 < same["motion"].value
    assert results["shuffled"]["motion"].value > same["motion"].value


def test_the_distance_is_extrapolated(network: FeatureNetwork) -> None:
    number = compare(Meter(protocol(network), {"i3d": network}), clips(64, 1), clips(64, 0)).numbers["fvd"]
    assert number.points[0] == (64, pytest.approx(number.value)) and abs(number.limit) < number.value


def test_seeds_draw_other_clips_and_give_a_spread(network: FeatureNetwork) -> None:
    meter = Meter(protocol(network, clips=8), {"i3d": network})
    numbers = [compare(meter, clips(20, 1), clips(20, 0), seeds=seeds).numbers["fvd"] for seeds in (3, 3, 1)]
    assert numbers[0] == numbers[1] and numbers[0].spread > 0 and numbers[2].spread is None


def test_numbers_of_several_seeds_are_of_all_of_them() -> None:
    meter = Meter(protocol(clips=4), {})
    single = [compare(meter, clips(20, 1), clips(20, 0), seeds=1).numbers]
    joined = compare(meter, clips(20, 1), clips(20, 0), seeds=2).numbers
    ours = [choose_clips(clips(20, 1), meter.protocol, "first", 4, seed) for seed in range(2)]
    motions = [meter.measure(choice, "clips").pixels["motion"].mean() for choice in ours]
    assert single[0]["motion"].value == pytest.approx(motions[0]) and single[0]["motion"].spread is None
    assert joined["motion"].value == pytest.approx(np.mean(motions))
    assert joined["motion"].spread == pytest.approx(np.std(motions, ddof=1)) and joined["motion"].interval is None
    assert joined["motion"].floor != single[0]["motion"].floor


def test_what_a_killed_writer_left_in_the_cache_is_removed_and_a_locked_entry_left_alone(tmp_path: Path) -> None:
    meter = Meter(protocol(clips=4), {}, cache=tmp_path)
    choice = choose_clips(clips(4, 0), meter.protocol, "first", None, 0)
    meter.measure(choice, "clips")
    (entry,) = tmp_path.iterdir()
    with atomic_write(entry) as temporary:
        entry.rename(temporary)
    entry.rename(temporary)
    meter.measure(choice, "clips")
    assert list(tmp_path.iterdir()) == [entry]
    entry.unlink()
    with lock_output(entry):
        assert len(meter.measure(choice, "clips").names) == 4 and not entry.exists()


def test_features_are_kept_and_used_again(network: FeatureNetwork, tmp_path: Path) -> None:
    meter = Meter(protocol(network), {"i3d": network}, cache=tmp_path)
    first = compare(meter, clips(6, 1), clips(6, 0))
    again, real = clips(6, 1), clips(6, 0)
    assert compare(meter, again, real).numbers == first.numbers
    assert sum(clip.reads for clip in (*again.clips, *real.clips)) == 0
    changed = replace(meter, protocol=replace(meter.protocol, low=0.0))
    compare(changed, again, real)
    assert sum(clip.reads for clip in again.clips) == 6
    for file in tmp_path.glob("*.npz"):
        file.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        compare(meter, again, real)


@pytest.mark.parametrize(
    "arrays", [{}, {"pixels_motion": 1.0}, {"pixels_motion": [1.0]}, {"codes": [1, 2]}, {"a": [1, 2], "b": [1]}]
)
def test_kept_arrays_of_another_shape_are_measured_again(tmp_path: Path, arrays: dict[str, object]) -> None:
    meter = Meter(protocol(clips=2), {}, cache=tmp_path)
    source = clips(2, 0)
    choice = choose_clips(source, meter.protocol, "first", None, 0)
    whole = meter.measure(choice, "clips")
    (entry,) = tmp_path.iterdir()
    np.savez(entry, **arrays)
    measured = meter.measure(choice, "clips")
    assert [clip.reads for clip in source.clips] == [2, 2]
    assert np.array_equal(measured.pixels["motion"], whole.pixels["motion"])


def test_an_interrupted_measurement_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CHUNK", 4)
    meter = Meter(protocol(), {}, batch=3, cache=tmp_path)
    source = clips(10, 1)
    choice = choose_clips(source, meter.protocol, "first", None, 0)
    whole = Meter(protocol(), {}).measure(choice, "clips")
    read, source.clips[9].read = source.clips[9].read, None
    with pytest.raises(TypeError):
        meter.measure(choice, "clips")
    source.clips[9].read = read
    measured = meter.measure(choice, "clips")
    assert [clip.reads for clip in source.clips[:8]] == [2] * 8, "once for `whole`, and once before the interruption"
    assert all(np.array_equal(measured.pixels[name], values, equal_nan=True) for name, values in whole.pixels.items())
    assert all(file.name.startswith(f"{meter.protocol.hash}-") for file in tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_does_not_grow_with_the_number_of_clips() -> None:
    """128 clips of 3 MB each, held at once, would take 200 MB more than 64 do, and 800 MB as floats."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 80 << 10, f"{few} KiB with 64 clips, {many} KiB with 128"


MEMORY = """
import re
import numpy as np
import torch
from cogvideo.evaluation.measure import Meter, choose_clips
from cogvideo.evaluation.networks import FeatureNetwork
from cogvideo.evaluation.protocols import LOCAL
from cogvideo.evaluation.sources import Clip, ClipSource

class Still(Clip):
    num_frames = 16
    identity = ""
    def __init__(self, seed):
        self.name = str(seed)
    def read(self, indices):
        frame = np.random.default_rng(int(self.name)).integers(0, 256, (1, 256, 256, 3), np.uint8)
        return frame.repeat(len(indices), axis=0)  # still: no time goes into the estimate of its movement

class Means(torch.nn.Module):
    def forward(self, clips):
        return clips.mean(dim=(3, 4)).flatten(1)

meter = Meter(LOCAL, {"i3d": FeatureNetwork("i3d", "0" * 64, Means(), torch.device("cpu"), trusted=True)})
for count in (64, 128):
    source = ClipSource("stills", "frames", tuple(Still(seed) for seed in range(count)))
    assert len(meter.measure(choose_clips(source, LOCAL, "first", None, 0), "clips")) == count
    print(re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_one_clip_per_video_and_short_ones_are_left_out() -> None:
    source = clips(6, 0)
    short = ClipSource("set", "frames", (*source.clips, ArrayClip("short", source.clips[0].array[:3])))
    choice = choose_clips(short, protocol(), "random", None, 0)
    assert choice.too_short == 1 and [entry.clip.name for entry in choice.clips] == [f"0-{i:03d}" for i in range(6)]
    few = [entry.clip.name for entry in choose_clips(short, protocol(), "first", 3, 0).clips]
    assert len(few) == 3 and few == [entry.clip.name for entry in choose_clips(short, protocol(), "first", 3, 0).clips]
    with pytest.raises(ValueError, match=r"has 6 generated clips of 8 frames \(1 videos are shorter\), local needs 7"):
        compare(Meter(protocol(clips=7), {}), short, clips(20, 1))


def test_without_a_network_pixels_alone_are_measured(tmp_path: Path) -> None:
    def jump(frames, rng):
        frames[4:] = 255 - frames[4:]
        return frames

    meter = Meter(protocol(), {}, seam=4)
    result = compare(meter, clips(4, 1, jump), clips(6, 0))
    numbers = result.numbers
    assert "fvd" not in numbers and numbers["seam"].value > 3 > numbers["seam"].floor
    assert numbers["motion"].interval[0] <= numbers["motion"].value <= numbers["motion"].interval[1]
    assert numbers["motion_at_fps"].value > 0 and "drift_10" not in numbers and numbers["drift_5"].value > 0
    text = format_comparison(result)
    assert text.count(result.protocol.hash) == len(numbers) + 1
    write_report(tmp_path / "page.html", result, meter)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<img") == 1 + 4 and result.worst == []  # the drift curve, and all four clips as the best


def test_a_report_shows_the_clips_that_are_farthest_off(network: FeatureNetwork, tmp_path: Path) -> None:
    ours = clips(10, 1)
    ours.clips[3].array[:] = np.random.default_rng(0).integers(0, 256, ours.clips[3].array.shape)
    meter = Meter(protocol(network), {"i3d": network})
    result = compare(meter, ours, clips(10, 0))
    assert result.worst[0][0].clip.name == "1-003" and result.worst[0][1] > result.best[0][1]
    assert any("not a known one" in note for note in result.notes)
    write_report(tmp_path / "page.html", result, meter)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Worst clips" in page and "1-003" in page and page.count("<img") == 1 + 8


def test_a_measure_that_only_some_seeds_have_is_of_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of captions that are all equal there is no shuffled baseline."""
    write_network(tmp_path / "clip.pt", Plain())
    captioned = CaptionStandIn("clip", tmp_path / "clip.pt", torch.device("cpu"))
    source = clips(4, 0)
    for index, clip in enumerate(source.clips):
        clip.caption = "one" if index else "another"
    meter = Meter(replace(protocol(clips=2), metrics=("clipsim",)), {"clip": captioned})
    single = []
    measured = compare_module._measure
    for seed in range(6):
        monkeypatch.setattr(compare_module, "_measure", lambda *words, seed=seed: measured(*words[:-1], seed))
        single.append(compare(meter, source, None).numbers)
    monkeypatch.setattr(compare_module, "_measure", measured)
    values = [numbers["clipsim_shuffled"].value for numbers in single if "clipsim_shuffled" in numbers]
    assert 2 <= len(values) < 6
    assert compare(meter, source, None, seeds=6).numbers["clipsim_shuffled"].value == pytest.approx(np.mean(values))


def test_the_clip_that_has_no_caption_is_named(tmp_path: Path) -> None:
    """One whose caption is empty has one."""
    write_network(tmp_path / "clip.pt", Plain())
    captioned = CaptionStandIn("clip", tmp_path / "clip.pt", torch.device("cpu"))
    source = clips(3, 0)
    for clip, caption in zip(source.clips, ("a", "", None), strict=True):
        clip.caption = caption
    with pytest.raises(ValueError, match=f"CLIPSIM needs captions, and {source.clips[2].name} has none; give"):
        compare(Meter(replace(protocol(clips=3), metrics=("clipsim",)), {"clip": captioned}), source, None)
