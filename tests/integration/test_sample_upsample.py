"""`cogvideo sample --upsample`: the files of `sample` and of `upsample` after it, in one command."""

import io
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import reduce
from safetensors.torch import load_file

from cogvideo.cli.main import main
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.media.video import read_video
from cogvideo.sampling.bundle import load_sample_config, load_upsample_config
from cogvideo.sampling.config import SampleConfig, UpsampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.runner import RunDirectory
from cogvideo.sampling.superres import Upsampler, load_both_configs
from tests.helpers.bundles import CAPTIONS, stop_at_batches, write_bundle
from tests.helpers.superres import HIGH, LOW, add_superres

SETTINGS = ["rounds=0", "num_clusters=32", "clips_at_once=1", "seed=5"]
WORDS = ["sample", *CAPTIONS[:2], *SETTINGS]
LARGE_SETTINGS = ["noise=shared", "frames_at_once=3"]
UPSAMPLE = ["--upsample", *(f"upsample.{word}" for word in LARGE_SETTINGS)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = write_bundle(tmp_path_factory.mktemp("weights") / "bundle", frame_side=LOW)
    add_superres(bundle)
    return bundle


def run(bundle: Path, out: Path, *words: str) -> int:
    return main([*words, "--model", str(bundle), "--out", str(out)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What two commands write."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(bundle, out, *WORDS) == 0
    assert run(bundle, out / "large", "upsample", str(out), "seed=5", *LARGE_SETTINGS) == 0
    return contents(out)


def test_one_command_writes_the_files_of_two(
    bundle: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(bundle, out, *WORDS, *UPSAMPLE, "--dry-run") == 0
    planned = (
        f"2 clips of 5 frames, 1 per second: {2 * 5 * LOW**2} tokens to draw, then {2 * 5 * HIGH**2} of large frames"
    )
    assert f"{planned}; nothing was written" in capsys.readouterr().out and not out.exists()
    assert run(bundle, out, *WORDS, *UPSAMPLE) == 0
    assert contents(out) == whole
    assert run(bundle, out, *WORDS, *UPSAMPLE, "--resume") == 0
    assert capsys.readouterr().out.count("is already finished") == 2
    assert run(bundle, out, *WORDS, *UPSAMPLE[:1], "--resume") == 2
    assert "out/large holds finished clips of another run" in capsys.readouterr().err and contents(out) == whole


def test_stopped_in_both_steps_and_resumed(
    bundle: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After every third batch; none is drawn twice."""
    drawn = stop_at_batches(monkeypatch, every=3)
    out = tmp_path / "out"
    codes = [run(bundle, out, *WORDS, *UPSAMPLE, "--resume") for _ in range(3)]
    assert codes == [130, 130, 0] and contents(out) == whole
    assert len(drawn) == len(set(drawn)) == 2 * (1 + 1) + 2 * 2, "stages of two clips, then two batches of each"


@pytest.mark.parametrize("name", ["begin", "end"])
def test_overwriting_removes_large_clips_of_others(
    bundle: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whenever the command is stopped while the small clips are overwritten."""
    out, original = tmp_path / "out", getattr(RunDirectory, name)
    assert run(bundle, out, "sample", "else", *SETTINGS, *UPSAMPLE) == 0

    def stopping(*arguments: object, **named: object) -> object:
        original(*arguments, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, name, stopping)
        assert run(bundle, out, *WORDS, *UPSAMPLE, "--overwrite") == 130
    assert run(bundle, out, *WORDS, *UPSAMPLE, "--resume") == 0
    others = {name for name in contents(out) if name.startswith("000-else")}
    assert {name: data for name, data in contents(out).items() if name not in others} == whole
    assert len(others) == 3, "small clips of other names stay"


def test_overwriting_without_upsampling_removes_large_clips_of_others(
    bundle: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "large/notes").touch()
    assert run(bundle, tmp_path, *WORDS, "--overwrite") == 2
    assert "would be removed from" in capsys.readouterr().err and contents(tmp_path) == whole | {"large/notes": b""}
    (tmp_path / "large/notes").unlink()
    assert run(bundle, tmp_path, *WORDS, "--overwrite") == 0
    assert contents(tmp_path) == {name: data for name, data in whole.items() if not name.startswith("large/")}
    (tmp_path / "large").mkdir()
    (tmp_path / "large/notes").touch()
    assert run(bundle, tmp_path, *WORDS, "--overwrite") == 0, "a folder without clips is the user's own"
    assert (tmp_path / "large/notes").exists()


def test_overwriting_keeps_a_run_of_its_own_that_is_called_large(
    bundle: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "large").mkdir()
    for name, data in whole.items():
        if name.startswith("large/"):
            (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    assert run(bundle, tmp_path, *WORDS, "--overwrite") == 0
    assert contents(tmp_path).items() >= before.items()


def test_settings_of_both_steps(bundle: Path, tmp_path: Path) -> None:
    """Those of super-resolution are a group; what both have is taken from the clips' unless it is given."""
    file = tmp_path / "settings.yaml"
    file.write_text("seed: 3\nweights: bf16\nupsample: {top_k_clusters: 2}\n")
    sample, upsample = load_both_configs(bundle, [file], ["upsample.seed=4", "rounds=1"])
    assert type(sample) is SampleConfig and (sample.seed, sample.rounds, sample.first_frame.text_bonus) == (3, 1, 0.0)
    assert upsample == UpsampleConfig(seed=4, weights="bf16", top_k_clusters=2)


def test_a_bundle_has_its_own_settings_of_super_resolution(bundle: Path, tmp_path: Path) -> None:
    """In its sampling.yaml, for every way to upsample; what is given counts more."""
    own = tmp_path / "bundle"
    shutil.copytree(bundle, own)
    with (own / "sampling.yaml").open("a", encoding="utf-8") as file:
        file.write("upsample: {noise: shared, top_k_clusters: 3}\n")
    assert load_sample_config(own, [], []) == load_sample_config(bundle, [], [])
    assert load_upsample_config(own, [], []) == UpsampleConfig(noise="shared", top_k_clusters=3)
    assert load_upsample_config(own, [], ["top_k_clusters=2"]) == UpsampleConfig(noise="shared", top_k_clusters=2)
    given = ["seed=4", "upsample.noise=independent"]
    assert load_both_configs(own, [], given)[1] == UpsampleConfig(seed=4, top_k_clusters=3)
    clips, upsample = load_both_configs(own, [], given, own_models=False)
    assert clips == load_sample_config(own, [], ["seed=4"]) and upsample == UpsampleConfig(seed=4)
    assert Upsampler.load(own).config == UpsampleConfig(noise="shared", top_k_clusters=3)

    assert run(own, tmp_path / "one", *WORDS, "--upsample") == 0
    assert run(own, tmp_path / "two", *WORDS) == 0
    assert run(own, tmp_path / "two/large", "upsample", str(tmp_path / "two"), "seed=5") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    given = [f"upsample.{word}" for word in ("noise=shared", "top_k_clusters=3")]
    assert run(bundle, tmp_path / "given", *WORDS, "--upsample", *given) == 0
    tokens = "large/tokens.safetensors"
    assert contents(tmp_path / "given")[tokens] == contents(tmp_path / "one")[tokens]


def test_an_iterative_model_without_rounds_is_not_opened(bundle: Path, tmp_path: Path) -> None:
    own = tmp_path / "bundle"
    shutil.copytree(bundle, own)
    (own / "iterative_superres/model.safetensors").unlink()
    assert run(own, tmp_path / "out", *WORDS, "--upsample", "upsample.round_top_k=[]") == 0
    assert run(own, tmp_path / "other", *WORDS, "--upsample") == 2


def test_settings_of_a_bundle_are_of_its_own_models(
    bundle: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "bundle"
    shutil.copytree(bundle, own)
    with (own / "sampling.yaml").open("a", encoding="utf-8") as file:
        file.write("upsample: {round_top_k: []}\n")
    clips = tmp_path / "clips"
    assert run(own, clips, *WORDS) == 0
    others = ["--direct", str(bundle / "direct_superres"), "--iterative", str(bundle / "iterative_superres")]
    words = ["upsample", str(clips), "seed=5", *LARGE_SETTINGS, *others]
    assert run(own, tmp_path / "large", *words) == 0
    assert (tmp_path / "large/tokens.safetensors").read_bytes() == whole["large/tokens.safetensors"]
    assert run(own, tmp_path / "none", *words, "round_top_k=[]") == 2
    assert "round_top_k=[] disables --iterative" in capsys.readouterr().err


def test_wrong_settings_of_super_resolution_in_a_bundle_are_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "bundle"
    shutil.copytree(bundle, own)
    for text, message in (
        ("upsample: shared", "sampling.yaml: upsample is a group of settings, got 'shared'"),
        ("upsample: {noize: shared}", "sampling.yaml: unknown key 'noize'; did you mean 'noise'?"),
        ("upsample: {temperature: 0}", "sampling.yaml: temperature=0.0 must be above 0"),
    ):
        (own / "sampling.yaml").write_text(f"rounds: 0\n{text}\n", encoding="utf-8")
        assert run(own, tmp_path / "out", "upsample", str(tmp_path)) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sample", "a", "upsample.seed=1"],
            "upsample.seed=1 is a setting of super-resolution, used by `cogvideo sample --upsample` only",
        ),
        (["sample", "a", "--upsample", "upsample.sed=1"], "unknown key 'upsample.sed'; did you mean 'upsample.seed'?"),
        (["sample", "a", "--upsample", "upsample.temperature=0"], "temperature=0.0 must be above 0"),
        (["sample", "a", "--upsample", "seed=x"], "error: command line: seed='x' is not valid; expected int"),
    ],
)
def test_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert run(bundle, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_weights_without_super_resolution_or_of_another_size_are_refused(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = write_bundle(tmp_path / "without", frame_side=LOW)
    assert run(without, tmp_path / "out", *WORDS, "--upsample") == 2
    message = "without has no direct super-resolution model of its own; add one with `cogvideo bundle"
    assert message in capsys.readouterr().err
    other = write_bundle(tmp_path / "other", frame_side=3)
    add_superres(other)
    assert run(other, tmp_path / "out", *WORDS, "--upsample") == 2
    assert "frames of 3x3 tokens, super-resolution reads 2x2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_other_files_is_refused(
    bundle: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out/large").mkdir(parents=True)
    (tmp_path / "out/large/notes").touch()
    assert run(bundle, tmp_path / "out", *WORDS, "--upsample", "--overwrite") == 2
    assert "out/large, which holds other files (notes); choose another --out" in capsys.readouterr().err
    assert list(contents(tmp_path / "out")) == ["large/notes"]
    for name, data in whole.items():
        (tmp_path / "out" / name).write_bytes(data)
    assert run(bundle, tmp_path / "out", *WORDS, "--upsample", "--overwrite") == 2, "beside results too"
    assert run(bundle, tmp_path / "out", *WORDS, *UPSAMPLE, "--resume") == 0, "nothing is removed"
    assert contents(tmp_path / "out") == whole | {"large/notes": b""}


def test_interactive(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        CAPTIONS[0],
        "upsample.num_clusters=3",
        "upsample.round_top_k=[]",
        "seed=6 upsample.noise=shared",
        CAPTIONS[1],
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    assert run(bundle, tmp_path / "talk", "sample", "--interactive", "--upsample", *SETTINGS) == 0
    error = capsys.readouterr().err
    for key in ("num_clusters", "round_top_k"):
        assert f"upsample.{key}= cannot change: the models are already loaded" in error
    first, second = sorted((tmp_path / "talk").iterdir())
    assert (first / "large/samples.json").is_file()
    words = ["sample", CAPTIONS[1], "--upsample", *SETTINGS, "seed=6", "upsample.noise=shared"]
    assert run(bundle, tmp_path / "alone", *words) == 0
    assert contents(second) == contents(tmp_path / "alone")


def test_python(bundle: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "tokens.safetensors").write_bytes(whole["large/tokens.safetensors"])
    pipeline, upsampler = Pipeline.load(bundle), Upsampler.load(bundle, UpsampleConfig(seed=5, noise="shared"))
    config = replace(pipeline.config, seed=5, rounds=0, num_clusters=32, clips_at_once=1)
    clips = pipeline.sample(CAPTIONS[:2], config)
    large = upsampler.upsample(clips, CAPTIONS[:2])
    assert torch.equal(large, load_file(tmp_path / "tokens.safetensors")["tokens"])
    assert upsampler.decode(large).shape == (2, 5, 8 * HIGH, 8 * HIGH, 3)
    for tokens, prompts, message in (
        (clips, CAPTIONS[:3], "2 clips cannot be divided among 3 prompts"),
        (clips[:0], CAPTIONS[:1], "0 clips cannot be divided among 1 prompts"),
        (large, CAPTIONS[:2], r"tokens have shape \[2, 5, 36\]; expected \(clips, frames, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            upsampler.upsample(tokens, prompts)


def test_the_bundled_weights_draw_large_clips(tmp_path: Path) -> None:
    """Of 120 pixels, that show what the small ones show; all weights together take less than 40 MB."""
    prompts = ["the red digit 3 moves left slowly", "绿色的数字0向上快速移动"]
    assert main(["sample", *prompts, "--upsample", "rounds=0", "seed=7", "--out", str(tmp_path)]) == 0
    assert load_file(tmp_path / "large/tokens.safetensors")["tokens"].shape == (2, 5, (120 // 8) ** 2)
    files = sorted(tmp_path.glob("*.mp4"))
    assert len(files) == len(prompts)
    for file in files:
        both = [read_video(each)[0].astype(float) for each in (file, tmp_path / "large" / file.name)]
        small, large = (reduce(frames, "t (h a) (w b) c -> t h w c", "mean", h=40, w=40) for frames in both)
        moved = np.abs(small - small[::-1]).mean()
        assert np.abs(large - small).mean() < moved / 3
    assert sum(file.stat().st_size for file in BUNDLED_WEIGHTS.rglob("*") if file.is_file()) < 40e6
