"""`cogvideo upsample` with small random weights: the files of `sample`, repeatability, refusals in one line."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cogvideo.checkpoint.adapter import Base, fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import build_superres
from cogvideo.cli.main import main
from cogvideo.media.contact_sheet import GAP, LINE_HEIGHT
from cogvideo.sampling.outputs import MIN_VIDEO_SIDE
from cogvideo.sampling.superres import Upsampler
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import redraw_mask
from cogvideo.tokenizers.text import TextTokenizer
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.superres import write_superres

COARSE, FINE = 2, 6


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scene")
    bundle = write_bundle(folder / "bundle", frame_side=COARSE)
    vocabulary = TextTokenizer.load(bundle / "text.model").vocabulary
    base = SuperresConfig(
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        text_len=16,
        low_res_side=COARSE,
        high_res_side=FINE,
        num_positions=64,
        low_res_position_start=33,
        vocabulary=vocabulary,
    )
    for name, config in {
        "direct": base,
        "iterative": replace(base, method="iterative"),
        "finer": replace(base, method="iterative", high_res_side=12),
        "stranger": replace(base, vocabulary=replace(vocabulary, pad=vocabulary.pad + 1)),
    }.items():
        write_superres(folder / name, config)  # type: ignore[arg-type]
    assert main(["sample", *CAPTIONS[:2], "--model", str(bundle), "--out", str(folder / "clips"), "rounds=0"]) == 0
    Image.fromarray(np.full((20, 20, 3), 90, np.uint8)).save(folder / "picture.png")
    return folder


def upsample(scene: Path, out: Path, words: str) -> int:
    words = words.format(scene=scene)
    return main(["upsample", "--model", str(scene / "bundle"), "--out", str(out), *shlex.split(words)])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


BOTH = "{scene}/clips --direct {scene}/direct --iterative {scene}/iterative"


def test_sampled_clips(scene: Path, tmp_path: Path) -> None:
    assert upsample(scene, tmp_path / "both", BOTH) == 0
    assert upsample(scene, tmp_path / "again", f"{BOTH} frames_at_once=3") == 0
    assert upsample(scene, tmp_path / "drawn", "{scene}/clips --direct {scene}/direct") == 0
    coarse, both, again, drawn = (
        load_file(place / "tokens.safetensors")
        for place in (scene / "clips", tmp_path / "both", tmp_path / "again", tmp_path / "drawn")
    )
    assert both["tokens"].shape == (2, 5, FINE**2) and float(both["seconds"]) == float(coarse["seconds"])
    assert torch.equal(both["tokens"], again["tokens"]), "frames do not depend on those beside them"
    changed = (both["tokens"] != drawn["tokens"]).flatten(0, 1).any(0)
    assert changed.any() and not changed[~redraw_mask(FINE, 1)].any()
    about = json.loads((tmp_path / "both/samples.json").read_text(encoding="utf-8"))
    assert [sample["prompt"] for sample in about["samples"]] == CAPTIONS[:2]
    pixels = 8 * FINE * max(1, MIN_VIDEO_SIDE // (8 * FINE) // 2)  # a token covers 8 x 8 pixels, enlarged
    sheet = Image.open(next((tmp_path / "both").glob("000-*.png")))
    assert sheet.size == (5 * (pixels + GAP) + GAP, GAP + LINE_HEIGHT + GAP + pixels + GAP)


def test_interrupted_and_resumed(scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert upsample(scene, tmp_path / "whole", BOTH) == 0
    real, calls = Upsampler.upsample_frames, 0

    def stopping(*arguments):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Upsampler, "upsample_frames", stopping)
        assert upsample(scene, tmp_path / "parts", BOTH) == 130
    assert upsample(scene, tmp_path / "parts", f"{BOTH} --resume") == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert upsample(scene, tmp_path / "parts", f"{BOTH} --resume seed=1") == 2


def test_a_picture(scene: Path, tmp_path: Path) -> None:
    words = "{scene}/picture.png --caption grey --direct {scene}/direct weights=int8"
    assert upsample(scene, tmp_path / "out", words) == 0
    assert load_file(tmp_path / "out/tokens.safetensors")["tokens"].shape == (1, 1, FINE**2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--direct {scene}/direct", "there is nothing to upsample"),
        ("{scene}/clips", "--direct"),
        ("{scene}/clips --direct {scene}/iterative", "holds the iterative model; give the other one"),
        ("{scene}/clips --direct {scene}/bundle/trunk", "expected a super-resolution model"),
        ("{scene}/clips --direct {scene}/none", "no checkpoint folder at"),
        ("{scene}/clips --direct {scene}/stranger", "do not belong together"),
        ("{scene}/clips --direct {scene}/direct --iterative {scene}/finer", "grids of different sizes"),
        ("{scene}/picture.png --direct {scene}/direct", "the input has no caption; pass --caption"),
        ("{scene}/picture.png --caption ' ' --direct {scene}/direct", "the caption is empty"),
        ("{scene}/clips --direct {scene}/direct frames_at_once=0", "frames_at_once=0 must be at least 1"),
        ("{scene}/clips --direct {scene}/direct temperature=0", "temperature=0.0 must be above 0"),
        ("{scene}/clips --direct {scene}/direct round_top_k=[4]", "round_top_k=[4] is for the iterative model"),
    ],
)
def test_refused(scene: Path, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert upsample(scene, tmp_path / "out", words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def adapters(scene: Path) -> dict[str, Path]:
    """An adapter of each model."""
    found = {}
    for method in ("direct", "iterative"):
        checkpoint = load_checkpoint(scene / method)
        record = Base(model=f"{method}_superres", sha256=fingerprint(checkpoint), step=1)
        found[method] = write_adapter(scene / f"{method}_adapter", build_superres(checkpoint), record)
    return found


@pytest.mark.parametrize("method", ["direct", "iterative"])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_an_adapter_is_merged(
    method: str, weights: str, scene: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter, words = f"{adapters[method]}:0.5", f"{BOTH} weights={weights}"
    assert upsample(scene, tmp_path / "plain", words) == 0
    assert upsample(scene, tmp_path / "adapted", f"{words} --adapter {adapter}") == 0
    merged = tmp_path / "merged"
    assert main(["merge", str(scene / method), "--adapter", adapter, "--out", str(merged)]) == 0
    assert upsample(scene, tmp_path / "expected", words.replace(f"{{scene}}/{method}", str(merged))) == 0
    plain, adapted, expected = (
        load_file(tmp_path / name / "tokens.safetensors")["tokens"] for name in ("plain", "adapted", "expected")
    )
    assert torch.equal(adapted, expected) and not torch.equal(adapted, plain)


def test_adapters_that_do_not_fit_and_other_adapters_on_resuming_are_refused(
    scene: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only_direct = "{scene}/clips --direct {scene}/direct"
    assert upsample(scene, tmp_path / "x", f"{only_direct} --adapter {adapters['iterative']}") == 2
    assert "is for the model iterative_superres; this pipeline has only direct_superres" in capsys.readouterr().err
    assert upsample(scene, tmp_path / "x", f"{only_direct} --adapter {scene}/nowhere") == 2
    assert not (tmp_path / "x").exists()
    assert upsample(scene, tmp_path / "x", f"{only_direct} --adapter {adapters['direct']}") == 0
    assert upsample(scene, tmp_path / "x", f"{only_direct} --resume") == 2
    assert "another run" in capsys.readouterr().err
