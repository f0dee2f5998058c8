"""`cogvideo eval digits` and `bodies` end to end on random weights: the table, the JSON, and errors in one line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideo.cli.main import main
from cogvideo.evaluation.packaged_networks import PACKAGED
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.worlds.digits.benchmark import DigitsBenchmark
from tests.helpers.bundles import write_bundle

SMALL = ["--num-prompts", "2", "num_clusters=32", "key_frames.top_k_clusters=4"]


@pytest.fixture(autouse=True)
def without_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds per clip; tests that want them ask for them."""
    monkeypatch.setattr("cogvideo.evaluation.packaged_networks.are_installed", lambda: False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle", frame_side=5, num_layers=1)


def test_random_weights_miss_targets_and_real_clips_score_well(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "figures.json"
    assert main(["eval", "digits", "--model", str(bundle), "--json", str(file), *SMALL]) == 0
    text = capsys.readouterr().out
    assert text.count("NOT met") >= 6 and "33 frames over 4 s" in text
    figures = json.loads(file.read_text(encoding="utf-8"))
    small = DigitsBenchmark(**{**figures["config"], "clip_seconds": tuple(figures["config"]["clip_seconds"])})
    assert text.startswith(f"digits, protocol {small.hash}\n") and figures["protocol"]["hash"] == small.hash
    assert len({small.hash, replace(small, seed=9).hash, replace(small, clip_seconds=(2.0,)).hash}) == 3
    assert figures["original"]["whole"]["direction"]["right"] == 2
    assert figures["generated"]["whole"]["complete"]["right"] == 0
    assert figures["sampling"]["key_frames"]["top_k_clusters"] == 4


def test_without_stage_2_only_key_frames_are_scored(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(bundle, tmp_path / "stage1", ignore=shutil.ignore_patterns("interpolation"))
    assert main(["eval", "digits", "--model", str(tmp_path / "stage1"), *SMALL]) == 0
    assert capsys.readouterr().out.count("NOT met") == 3


def test_real_clips_need_only_the_tokenizer(bundle: Path, capsys: pytest.CaptureFixture[str]):
    tokenizer = str(bundle / "image_tokenizer")
    assert main(["eval", "digits", "--real", "--tokenizer", tokenizer, "--num-prompts", "2"]) == 0
    text = capsys.readouterr().out
    assert "reconstructed" in text and "generated" not in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seconds=2"], "the benchmark sets"),
        (["key_frames.top_k=3"], "top_k_clusters"),
        (["--num-prompts", "0"], "num_prompts=0"),
        (["--tokenizer", "x"], "--real"),
        (["--real", "seed=1"], "--real"),
        (["--json", "no/such/folder/x.json"], "a folder that exists"),
        (["--real", "--tokenizer", "x"], "--model has its own image tokenizer"),
        (["--seeds", "2"], "--seeds has no effect on digits"),
        (["given_frames=2"], "given_frames=2 has no effect on digits"),
        (["--frames", "5"], "--frames has no effect on digits"),
        (["--crop", "squash"], "--crop has no effect on digits"),
        (["--trust-network"], "--trust-network has no effect on digits"),
        (["--batch", "0"], "--batch 0: give 1 to 1000"),
        (["--batch", "2", "--no-distances"], "--batch is for the networks of --distances, and none are used"),
        (["--device", "nonsense"], "--device nonsense"),
    ],
)
def test_bad_input_is_one_line(bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert main(["eval", "digits", "--model", str(bundle), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.usefixtures("quick_shapes")
def test_bodies_are_scored_and_what_was_sampled_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("pybullet", reason="the bodies world needs the extra [worlds]")
    bundle = write_bundle(tmp_path / "bundle", frame_side=8, num_layers=1, text_len=64)
    words = ["eval", "bodies", "--model", str(bundle), "--num-prompts", "1", "--captions-seed", "2", "--continued"]
    words += ["num_clusters=32", "key_frames.top_k_clusters=4", "given_frames=2"]
    words += ["--cache", str(tmp_path / "cache"), "--report", str(tmp_path / "report.html")]
    assert main([*words, "--json", str(tmp_path / "first.json")]) == 0
    text = capsys.readouterr().out
    assert "NOT met" in text and "97 frames over 12 s" in text and "5 key frames over 0.5 s" in text
    found = json.loads((tmp_path / "first.json").read_text(encoding="utf-8"))
    assert found["generated"]["whole"]["colours"]["right"] == 0 and found["original"]["whole"]["colours"]["right"] == 1
    assert found["protocol"]["name"] == "bodies" and "data:image/png" in (tmp_path / "report.html").read_text("utf-8")

    def draw(*args: object, **kwargs: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(Pipeline, "stages", draw)
    assert main([*words, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bodies"], "no weights for the bodies world"),
        (["bodies", "--real"], "no weights for the bodies world"),
        (["bodies", "--palette", "new"], "--palette has no effect on bodies"),
        (["bodies", "--model", "x", "given_frames=2"], "given_frames=2 has no effect on bodies"),
        (["bodies", "--real", "--tokenizer", "x", "--cache", "y"], "samples nothing"),
        (["digits", "--split", "unseen"], "--split has no effect on digits"),
        (["digits", "--continued"], "--continued has no effect on digits"),
        (["local", "--real", "x", "--generated", "y", "--split", "test"], "--split has no effect on local"),
    ],
)
def test_options_of_another_benchmark_are_refused(capsys: pytest.CaptureFixture[str], words: list[str], message: str):
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_weights_for_another_frame_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = write_bundle(tmp_path / "bundle", frame_side=2, num_layers=1)
    assert main(["eval", "digits", "--model", str(bundle), *SMALL]) == 2
    assert "16x16" in capsys.readouterr().err


def test_weights_for_longer_clips_are_refused(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Their first five key frames would be scored as if these spanned the clip."""
    assert main(["extend", str(bundle), "--num-frames", "6", "--out", str(tmp_path / "longer")]) == 0
    assert main(["eval", "digits", "--model", str(tmp_path / "longer"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert "6 key frames per clip" in error and error.count("\n") == 1


def test_distances_of_whole_clips_from_the_real_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if any(network.path is None for network in PACKAGED.values()):
        pytest.skip("the packages of the extra [distances] are not installed")
    file = tmp_path / "figures.json"
    words = ["eval", "digits", "--real", "--num-prompts", "3", "--distances", "--batch", "2"]
    assert main([*words, "--json", str(file)]) == 0
    distances = json.loads(file.read_text(encoding="utf-8"))["distances"]
    assert set(distances) == {"appearance_distance", "motion_distance"}
    for by_source in distances.values():
        assert set(by_source) == {"reconstructed", "original"} and by_source["original"] > 0
    assert "appearance distance; original: other real clips" in capsys.readouterr().out
