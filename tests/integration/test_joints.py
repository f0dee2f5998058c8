"""Parts that do not belong together are refused where they meet, and what trains badly is said: by the commands."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from cogvideo.checkpoint.load import load_model, save_model
from cogvideo.cli.main import main
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.tokenizers.text import TextTokenizer

SMALL = [
    *("model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "model.frame_side=5", "model.text_len=32"),
    *("model.frame_position_start=32", "model.num_positions=64", "train.steps=2", "train.batch_size=4"),
    *("optimiser.warmup_steps=1", "log.preview_every=0", "log.peak_tflops=1"),
]
TASKS = {"image": "trunk", "sequential": "sequential", "interpolation": "interpolation"}


class Scene:
    """Videos of digits with clips by the bundled tokenizer, another tokenizer, and models trained on the clips."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.captions, self.clips = folder / "videos/captions.jsonl", folder / "clips"
        self.tokenizer, self.other = BUNDLED_WEIGHTS / "image_tokenizer", folder / "other_tokenizer"
        self.text = BUNDLED_WEIGHTS / "text.model"
        assert main(["digits", "--out", str(folder / "videos"), "--count", "6"]) == 0
        other = ImageTokenizer.load(self.tokenizer)
        with torch.no_grad():
            other.model.quantize.embed.weight += 1e-3
        other.save(self.other)
        self.text_of_same_size = folder / "text_of_same_size.model"
        text = TextTokenizer.load(self.text)
        captions = [f"{word} one two three" for word in ("alpha", "beta", "gamma")] * 200
        made = TextTokenizer.train(captions, self.text_of_same_size, text.vocabulary.size - 1024, 1024)
        assert made.sha256 != text.sha256

    def prepare(self, out: Path, tokenizer: Path, *words: str) -> int:
        captions = ("--captions", str(self.captions))
        return main(["prepare", *captions, "--tokenizer", str(tokenizer), "--out", str(out), "frame_pixels=40", *words])

    def train(self, run_dir: Path, *words: str, task: str = "image") -> int:
        settings = [f"task={task}", f"run_dir={run_dir}", f"data.path={self.clips}", *SMALL, *words]
        return main(["train", *settings])

    def bundle(self, out: Path, *words: str, **parts: Path) -> int:
        paths = {name: self.folder / f"runs/{task}/export/{name}" for task, name in TASKS.items()}
        paths = {"text": self.text, "tokenizer": self.tokenizer} | paths | parts
        flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
        return main(["bundle", *flags, "--clusters", "8", "--out", str(out), *words])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    scene = Scene(tmp_path_factory.mktemp("scene"))
    assert scene.prepare(scene.clips, scene.tokenizer) == 0
    for task in TASKS:
        assert scene.train(scene.folder / "runs" / task, task=task) == 0
    assert scene.bundle(scene.folder / "bundle") == 0
    return scene


def error(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("cogvideo: error: ")
    return line


def test_training_refuses_another_image_tokenizer(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.train(tmp_path / "run", f"data.image_tokenizer={scene.other}") == 2
    assert re.search(r"data\.image_tokenizer=\S+other_tokenizer did not make the tokens of data\.path=", error(capsys))
    assert scene.prepare(tmp_path / "clips", scene.other) == 0
    assert scene.train(tmp_path / "run", f"data.validation={tmp_path / 'clips'}") == 2
    assert "data.validation=" in error(capsys)
    start = f"init.checkpoint={scene.folder}/runs/image/export/trunk"
    assert scene.train(tmp_path / "run", f"data.path={tmp_path / 'clips'}", start) == 2
    assert re.search(r"init\.checkpoint=\S+ was trained with another image tokenizer than data\.path=", error(capsys))
    assert scene.train(tmp_path / "run", start, f"data.text_tokenizer={scene.text_of_same_size}") == 2
    assert "another text tokenizer than data.text_tokenizer" in error(capsys)
    assert not (tmp_path / "run").exists()


def test_sample_sheets_are_not_drawn_by_another_tokenizer(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scene.prepare(tmp_path / "clips", scene.other) == 0
    capsys.readouterr()
    assert scene.train(tmp_path / "run", f"data.path={tmp_path / 'clips'}", "log.preview_every=2") == 0
    assert "warning: data.image_tokenizer is null" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/previews/*"))
    words = (f"data.path={tmp_path / 'clips'}", f"data.image_tokenizer={scene.other}", "log.preview_every=2")
    assert scene.train(tmp_path / "right", *words) == 0
    assert list(tmp_path.glob("right/previews/*"))


def test_bundles_refuse_other_tokenizers(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scene.bundle(tmp_path / "bundle", tokenizer=scene.other) == 2
    assert re.search(r"--trunk \S+ was trained with another image tokenizer than that of --tokenizer", error(capsys))
    assert scene.bundle(tmp_path / "bundle", text=scene.text_of_same_size) == 2
    assert "another text tokenizer than that of" in error(capsys)
    assert not (tmp_path / "bundle").exists()


def test_sampling_refuses_other_tokenizers(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(scene.folder / "bundle", tmp_path / "bundle")
    sample = [
        "sample",
        "the red digit 3 moves left",
        "--model",
        str(tmp_path / "bundle"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*sample, "--dry-run"]) == 0
    shutil.rmtree(tmp_path / "bundle/image_tokenizer")
    shutil.copytree(scene.other, tmp_path / "bundle/image_tokenizer")
    assert main(sample) == 2
    assert "bundle.json" in error(capsys)
    (tmp_path / "bundle/bundle.json").unlink()
    assert main(sample) == 2
    assert "was trained with another image tokenizer" in error(capsys)


def test_scoring_refuses_other_clips(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scene.prepare(tmp_path / "clips", scene.other) == 0
    model = str(scene.folder / "runs/sequential/export/sequential")
    score = ["score", "--model", model, "--text-tokenizer", str(scene.text), "--out", str(tmp_path / "a.safetensors")]
    assert main([*score, "--rows", str(scene.clips), "--dry-run"]) == 0
    assert main([*score, "--rows", str(tmp_path / "clips"), "--dry-run"]) == 2
    assert "another image tokenizer" in error(capsys)


def test_files_have_ordinary_modes(scene: Scene) -> None:
    """All files of data, runs and bundles: what the user's umask allows, as other programs' files."""
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in scene.folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert {path.name for path in files if path.stat().st_mode & 0o777 != 0o666 & ~umask} == set()


def test_bundles_say_which_settings_hold(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scene.bundle(tmp_path / "without") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(
        "sampling settings: the published ones, since there is no --sampling FILE (seconds=4 rounds=3 "
    )
    file = tmp_path / "own.yaml"
    file.write_text("seconds: 2\n", encoding="utf-8")
    assert scene.bundle(tmp_path / "with", "--sampling", str(file)) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"sampling settings: those of {file} (seconds=2 rounds=3 ")
    )


def test_prepare_says_what_the_next_step_needs(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The size of frames in tokens, and codes in use; of pixels, whether they will be a whole number of tokens."""
    assert scene.prepare(tmp_path / "clips", scene.tokenizer) == 0
    assert re.search(
        r"frames of 5x5 tokens \(model.frame_side=5\); \d+ of 1,024 image codes in use", capsys.readouterr().out
    )
    frames = ["prepare", "--captions", str(scene.captions), "--frames"]
    assert main([*frames, "--out", str(tmp_path / "a"), "frame_pixels=36"]) == 0
    assert "frames of 36 pixels are not a multiple of 8" in capsys.readouterr().err
    assert main([*frames, "--out", str(tmp_path / "b"), "frame_pixels=40"]) == 0
    assert "multiple" not in capsys.readouterr().err


def test_few_codes_in_use_are_said(scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By prepare and at the start of training: here all codes but six are far from all pictures."""
    tokenizer = ImageTokenizer.load(scene.tokenizer)
    with torch.no_grad():
        tokenizer.model.quantize.embed.weight[6:] = 1e6
    tokenizer.save(tmp_path / "tokenizer")
    assert scene.prepare(tmp_path / "clips", tmp_path / "tokenizer") == 0
    said = re.search(
        r"warning: ([1-6]) of 1,024 image codes in use: frames that differ may look", capsys.readouterr().err
    )
    assert said
    assert scene.train(tmp_path / "run", f"data.path={tmp_path / 'clips'}") == 0
    assert f"warning: {said[1]} of 1,024 image codes in use: " in capsys.readouterr().err


def test_old_exports_are_bundled_with_a_warning(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, name in TASKS.items():
        save_model(tmp_path / name, load_model(scene.folder / f"runs/{task}/export/{name}"))
    parts = {name: tmp_path / name for name in TASKS.values()}
    assert scene.bundle(tmp_path / "bundle", **parts) == 0
    assert "warning: --trunk, --sequential, --interpolation: exported by an older version" in capsys.readouterr().err


def test_captions_that_training_cuts_are_counted(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By prepare, by vocabulary and by train, which refuses to cut most of them."""
    lines = [json.loads(line) for line in scene.captions.read_text(encoding="utf-8").splitlines()]
    records = [
        line | {"caption": " ".join(["the red digit 3 moves left"] * (12 if i else 1))} for i, line in enumerate(lines)
    ]
    captions = scene.captions.parent / "long.jsonl"
    captions.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tokenizer = ("--tokenizer", str(scene.tokenizer))
    words = ["--captions", str(captions), *tokenizer, "--out", str(tmp_path / "clips"), "frame_pixels=40"]
    counting = ["--text-tokenizer", str(scene.text), "--text-len"]
    assert main(["prepare", *words, *counting, "0"]) == main(["prepare", *words, "--text-len", "32"]) == 2
    assert capsys.readouterr().err.count("goes with --text-tokenizer, and must be at least 1") == 2
    assert main(["prepare", *words, *counting, "32"]) == 0
    counted = re.search(r"at most (\d+) text tokens.*; 5 of 6 \(83%\) take more than 32", capsys.readouterr().out)
    assert counted
    longest = int(counted[1])
    assert main(["vocabulary", "--captions", str(captions), *tokenizer, "--out", str(tmp_path / "t.model")]) == 0
    assert "text tokens with clip length and suffix (99 %:" in capsys.readouterr().out
    assert scene.train(tmp_path / "run", f"data.path={tmp_path / 'clips'}", task="sequential") == 2
    message = error(capsys)
    assert re.search(
        rf"the captions of \d+ of \d+ clips \(83%\) take more than 32 text tokens, up to {longest}", message
    )
    assert f"model.text_len={longest}" in message
    room = (f"model.text_len={longest}", f"model.frame_position_start={longest}", "model.num_positions=200")
    assert scene.train(tmp_path / "run", f"data.path={tmp_path / 'clips'}", *room, task="sequential") == 0


def test_the_digits_vocabulary_is_refused_for_other_captions(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.loads(line) for line in scene.captions.read_text(encoding="utf-8").splitlines()]
    captions = scene.captions.parent / "dogs.jsonl"
    captions.write_text(
        "".join(json.dumps(line | {"caption": "a dog runs"}) + "\n" for line in lines), encoding="utf-8"
    )
    tokenizer = ("--tokenizer", str(scene.tokenizer))
    words = ["--captions", str(captions), *tokenizer, "--out", str(tmp_path / "clips"), "frame_pixels=40"]
    assert main(["prepare", *words]) == 0
    data = f"data.path={tmp_path / 'clips'}"
    assert scene.train(tmp_path / "run", data) == 2
    message = error(capsys)
    assert "data.text_tokenizer is null" in message and "`cogvideo vocabulary`" in message and "100%" in message
    assert scene.train(tmp_path / "kept", data, f"data.text_tokenizer={scene.text}") == 0
    assert "warning: data.text_tokenizer=" in capsys.readouterr().err
    assert main(["vocabulary", "--captions", str(captions), *tokenizer, "--out", str(tmp_path / "own.model")]) == 0
    assert scene.train(tmp_path / "own", data, f"data.text_tokenizer={tmp_path / 'own.model'}") == 0
    assert "text_tokenizer" not in capsys.readouterr().err
