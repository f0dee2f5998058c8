"""Bad input: one clear line on stderr, exit code 2, and nothing half-written.

One table per command: arguments, and what the line must contain. Damaged checkpoints are in `test_cli_damage.py`.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cogvideo.cli.main import main
from cogvideo.config import dump_yaml
from cogvideo.media.video import write_video
from cogvideo.tokenizers.text import TextTokenizer
from tests.helpers.bundles import CAPTIONS, NUM_CODES, write_bundle
from tests.helpers.training import prepare_data, settings

VIDEO_LINE = '{{"video": "{name}", "caption": "a red digit"}}\n'


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of valid and invalid inputs, which tests only read."""
    folder = tmp_path_factory.mktemp("scene")
    frames = np.zeros((33, 40, 40, 3), np.uint8)
    write_video(folder / "good.mp4", frames, 8)
    (folder / "short.mp4").write_bytes((folder / "good.mp4").read_bytes()[:700])
    (folder / "text.mp4").write_text("this is no video")
    (folder / "zero.mp4").touch()
    (folder / "folder.mp4").mkdir()
    for name in ("good", "short", "text", "zero", "folder", "absent", "../outside"):
        (folder / f"{Path(name).name}.jsonl").write_text(VIDEO_LINE.format(name=f"{name}.mp4"))
    (folder / "passwd.jsonl").write_text('{"video": "/etc/passwd", "caption": "a"}\n')
    (folder / "silent.jsonl").write_text('{"video": "good.mp4", "caption": "  "}\n')
    (folder / "empty.jsonl").touch()
    (folder / "blank.txt").write_text("\n \n")
    (folder / "broken.jsonl").write_text('{"video": \n')
    (folder / "misspelt.yaml").write_text("clips:\n  num_frame: 5\n")
    (folder / "circle.yaml").write_text("base: circle.yaml\n")
    (folder / "broken.yaml").write_text("clips: [\n")
    (folder / "nan.yaml").write_text("key_frames: {text_bonus: .nan}\n")
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[1]")
    (folder / "unfit.json").write_text('{"zero_optimization": {"reduce_bucket_size": -1}}')
    (folder / "owned.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "file").write_text("a plain file, no folder")
    _bundles(folder)
    prepare_data(folder / "data")
    (folder / "train.yaml").write_text(dump_yaml(settings(folder / "data", Path("run"))))
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def _bundles(folder: Path) -> None:
    """A valid bundle, and others with one thing wrong each."""
    good, small = (write_bundle(folder / f"bundle{side}", side, num_layers=1) for side in (3, 2))
    good = good.rename(folder / "bundle")
    for name in ("mixed", "swapped", "foreign", "clusters", "settings", "wording", "textless"):
        shutil.copytree(good, folder / name)
    for name, part in (("mixed", small / "interpolation"), ("swapped", good / "interpolation")):
        place = folder / name / ("interpolation" if name == "mixed" else "sequential")
        shutil.rmtree(place)
        shutil.copytree(part, place)
    TextTokenizer.train(CAPTIONS, folder / "foreign" / "text.model", 400, 2 * NUM_CODES)
    np.save(folder / "clusters" / "clusters.npy", np.zeros(7, int))
    (folder / "settings" / "sampling.yaml").write_text("roundz: 1\n")
    (folder / "wording" / "bundle.json").write_text('{"promt": {}}')
    (folder / "textless" / "text.model").unlink()


def everything(folder: Path) -> list[tuple[str, int]]:
    return [(str(path), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]


def refused(scene: Path, here: Path, words: str, expected: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Run a command in the empty folder `here`: exit code 2, a last line that says why, and nothing written."""
    before = everything(scene)
    assert main(shlex.split(words.format(scene=scene))) == 2
    error = capfd.readouterr().err
    last = error.splitlines()[-1]
    assert last.startswith("cogvideo: error: ") and "Traceback" not in error
    for text in expected:
        assert text in last
    assert everything(scene) == before and everything(here) == [], "something was left behind"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("prepar", ["no command 'prepar'; did you mean 'prepare'?"]),
        ("prepare", ["--captions, --out"]),
        ("prepare --captions {scene}/good.jsonl --frames --out out --config {scene}/absent.yaml", ["absent.yaml"]),
        (
            "prepare --captions {scene}/good.jsonl --frames --out out --config {scene}/misspelt.yaml",
            ["misspelt.yaml: unknown key 'clips.num_frame'; did you mean 'clips.num_frames'?"],
        ),
        (
            "prepare --captions {scene}/good.jsonl --frames --out out clips.num_frame=5",
            ["command line: unknown key 'clips.num_frame'; did you mean 'clips.num_frames'?"],
        ),
        (
            "prepare --captions {scene}/good.jsonl --frames --out out clips.num_frames=five",
            ["clips.num_frames='five' is not valid; expected int"],
        ),
        ("prepare --captions {scene}/good.jsonl --frames --out out --config {scene}/circle.yaml", ["form a cycle"]),
        ("prepare --captions {scene}/good.jsonl --frames --out out --config {scene}/broken.yaml", ["broken.yaml:"]),
        ("prepare --captions {scene}/nowhere.jsonl --frames --out out", ["nowhere.jsonl: No such file"]),
        ("prepare --captions {scene}/empty.jsonl --frames --out out", ["empty.jsonl holds no captions"]),
        ("prepare --captions {scene}/broken.jsonl --frames --out out", ["broken.jsonl line 1"]),
        ("prepare --captions {scene}/silent.jsonl --frames --out out", ["line 1: the caption is empty"]),
        ("prepare --captions {scene}/outside.jsonl --frames --out out", ["outside.jsonl line 1"]),
        ("prepare --captions {scene}/passwd.jsonl --frames --out out", ["passwd.jsonl line 1", "lies outside"]),
        ("prepare --captions {scene}/absent.jsonl --frames --out out", ["absent.mp4"]),
        ("prepare --captions {scene}/short.jsonl --frames --out out", ["short.mp4"]),
        ("prepare --captions {scene}/text.jsonl --frames --out out", ["text.mp4"]),
        ("prepare --captions {scene}/zero.jsonl --frames --out out", ["zero.mp4"]),
        ("prepare --captions {scene}/folder.jsonl --frames --out out", ["folder.mp4"]),
        ("prepare --captions {scene}/good.jsonl --frames --out {scene}/file/out", ["file"]),
        ("prepare --captions {scene}/good.jsonl --frames --out {scene}/data", ["data holds other files"]),
        ("prepare --captions {scene}/good.jsonl --tokenizer {scene} --out out", ["config.json"]),
        (
            "prepare --captions {scene}/good.jsonl --tokenizer {scene}/bundle/image_tokenizer --out out --device pot",
            ["--device pot cannot be used"],
        ),
        ("digits --out {scene}/file --count 1", ["file"]),
        ("digits --out out --count 0", ["count=0"]),
        ("digits --out out --count 1 --seed -1", ["seed=-1 is negative"]),
        ("eval digits --tokenizer {scene} --real", ["config.json"]),
        ("eval digits --model {scene}", ["no bundle of weights at"]),
        ("convert --from {scene} --to out", ["scene"]),
        ("convert --from {scene}/absent --to out", ["absent"]),
        ("convert --from {scene} --to out vocab.pads=3", ["unknown key 'vocab.pads'"]),
        ("convert --from {scene} --to {scene}/file", ["file exists"]),
        ("convert --from {scene} --to out --to-sat", ["scene"]),
        ("inspect", ["nothing to inspect"]),
        ("inspect --checkpoint {scene}", ["is not a cogvideo checkpoint"]),
        ("inspect model.num_heads=7", ["model.num_heads=7 does not divide"]),
        ("vocabulary --captions {scene}/empty.jsonl --tokenizer {scene}/bundle/image_tokenizer --out out", ["empty"]),
        ("vocabulary --captions {scene}/good.jsonl --tokenizer {scene} --out out", ["config.json"]),
        (
            "vocabulary --captions {scene}/good.jsonl --tokenizer {scene}/bundle/image_tokenizer --out out --pieces 0",
            ["--pieces 0; expected at least 1"],
        ),
    ],
)
def test_refused_in_one_line(
    scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: str,
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(scene, tmp_path, words, expected, capfd)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", ["there is no prompt"]),
        ("''", ["the prompt is empty"]),
        ("'x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x x'", ["reads at most 32; shorten it"]),
        ("a sead=7", ["unknown key 'sead'; did you mean 'seed'?"]),
        ("a seed=-1", ["seed=-1; expected 0 to"]),
        ("a rounds=60", ["rounds=60"]),
        ("a seconds=inf", ["seconds=inf"]),
        ("a key_frames=3", ["key_frames=3 is not valid: this key is a group; set key_frames."]),
        ("a key_frames.guidance_scale=nan", ["key_frames.guidance_scale=nan; expected a finite number"]),
        ("a --config {scene}/nan.yaml", ["key_frames.text_bonus=nan; expected a finite number"]),
        ("a --config {scene}", ["scene"]),
        ("--prompts {scene}/blank.txt", ["blank.txt holds no prompt"]),
        ("--prompts {scene}", ["scene"]),
        ("--prompts {scene}/good.mp4", ["good.mp4 is not UTF-8 text"]),
        ("a --out {scene}/file", ["file is a file"]),
        ("a --out {scene}/file/out", ["file"]),
        ("a --out {scene}", ["is not empty"]),
        ("a --out /proc/out", ["/proc/out"]),
        ("a --model {scene}", ["no bundle of weights at"]),
        ("a --model {scene}/mixed", ["interpolation/ and sequential/ differ in vocabulary or frame side"]),
        ("a --model {scene}/swapped", ["sequential/ holds a model with task=interpolation"]),
        ("a --model {scene}/foreign", ["text.model has", "use the one they were trained with"]),
        ("a --model {scene}/clusters", ["clusters.npy holds"]),
        ("a --model {scene}/settings", ["sampling.yaml: unknown key 'roundz'"]),
        ("a --model {scene}/wording", ["bundle.json: unknown key 'promt'"]),
        ("a --model {scene}/textless", ["text.model: No such file"]),
    ],
)
def test_sample_refuses(
    scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: str,
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(scene, tmp_path, f"sample --model {{scene}}/bundle num_clusters=32 --out out {words}", expected, capfd)


PARTS = "--text {scene}/bundle/text.model --tokenizer {scene}/bundle/image_tokenizer --out out " + " ".join(
    f"--{name} {{scene}}/bundle/{name}" for name in ("trunk", "sequential", "interpolation")
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--interpolation {scene}/bundle2/interpolation", ["out: interpolation/ and sequential/ differ"]),
        ("--sequential {scene}/bundle/trunk", ["sequential/ holds a model with task=image"]),
        ("--text {scene}/foreign/text.model", ["text.model has"]),
        ("--text {scene}/file", ["file: not a complete sentencepiece model"]),
        ("--trunk {scene}", ["is not a cogvideo checkpoint"]),
        ("--sampling {scene}/misspelt.yaml", ["misspelt.yaml: unknown key"]),
        ("--clusters 0", ["--clusters 0; expected at least 1, or a .npy file"]),
        ("--clusters {scene}/none.npy", ["none.npy"]),
        ("--high-res-clusters 4", ["--high-res-clusters groups the codes of --high-res-tokenizer; give it too"]),
        ("--out {scene}/data", ["data exists"]),
    ],
)
def test_bundle_refuses(
    scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: str,
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(scene, tmp_path, f"bundle {PARTS} {words}", expected, capfd)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train.step=1", ["unknown key 'train.step'; did you mean 'train.steps'?"]),
        ("train.steps=ten", ["train.steps='ten' is not valid; expected int"]),
        ("optimiser.lr=nan", ["optimiser.lr=nan; expected a finite number"]),
        ("optimiser.betas=[2,3]", ["optimiser.betas=[2.0, 3.0]"]),
        ("train.seed=-1", ["train.seed=-1"]),
        ("train.num_threads=0", ["train.num_threads=0"]),
        ("train.micro_batch_size=3", ["cannot be divided among"]),
        ("model.frame_side=4 model.num_positions=64", ["set model.num_frames and model.frame_side"]),
        ("model.window_size=2", ["model.window_size=2 does not divide"]),
        ("task=sequentiel", ["expected one of tokenizer, image, sequential, interpolation"]),
        ("task=tokenizer", ["cogvideo-frames"]),
        ("data.path={scene}/absent", ["data.path: ", "absent is not prepared data"]),
        ("data.validation={scene}/absent", ["data.validation: ", "absent is not prepared data"]),
        ("data.path={scene}/bundle", ["bundle is not prepared data"]),
        ("data.text_tokenizer={scene}/file", ["data.text_tokenizer: ", "file: not a complete sentencepiece model"]),
        ("data.text_tokenizer={scene}/bundle/text.model", ["the clips use 64 image tokens"]),
        ("data.image_tokenizer={scene}/absent", ["data.image_tokenizer: ", "absent/config.json: No such file"]),
        ("data.guidance_dropout=2", ["guidance_dropout=2.0"]),
        ("init.checkpoint={scene}/bundle/trunk", ["init.checkpoint: ", "bundle/trunk does not fit the model"]),
        ("init.checkpoint={scene}/absent", ["init.checkpoint: no checkpoint folder at"]),
        ("deepspeed.file={scene}/absent.json", ["absent.json: No such file"]),
        ("deepspeed.file={scene}/broken.json", ["broken.json is damaged: not readable as JSON"]),
        ("deepspeed.file={scene}/list.json", ["list.json is damaged: its value: should be a valid dictionary"]),
        ("deepspeed.file={scene}/unfit.json", ["unfit.json"]),
        ("deepspeed.file={scene}/owned.json", ["owned.json: zero_optimization.stage follows from deepspeed.stage"]),
        ("data.embedded_clips=0", ["data.embedded_clips=0"]),
        ("tokenizer.revive_every=0", ["tokenizer.revive_every=0"]),
        ("tokenizer.ema_decay=2", ["tokenizer.ema_decay=2.0"]),
        ("run_dir={scene}/used", ["already holds a run; give --resume"]),
        ("run_dir={scene}/file", ["file"]),
        ("run_dir={scene}/file/run", ["file"]),
        ("run_dir=/proc/run", ["/proc/run"]),
    ],
)
def test_train_refuses(
    scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: str,
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(scene, tmp_path, f"train --config {{scene}}/train.yaml {words}", expected, capfd)


def test_the_process_itself_ends_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cogvideo", "--local_rank=0", "prepare"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
