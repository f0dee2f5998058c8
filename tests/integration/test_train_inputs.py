"""What a run's weights depend on besides its settings: resumed with other inputs of the same name, a run is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from cogvideo.data.shards import read_manifest, read_shard, shard_folder, write_manifest, write_shard
from cogvideo.files import read_json, sha256_file, write_json
from cogvideo.training.launch import train
from tests.helpers.training import prepare_data, settings


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return prepare_data(tmp_path / "prepared")


def forget_inputs(run_dir: Path) -> None:
    """Let a run's checkpoint be as an older version wrote it."""
    for place in (run_dir / "checkpoints").glob("step_*"):
        numbers = read_json(place / "state.json", allow_nan=True)
        del numbers["inputs"]
        write_json(place / "state.json", numbers)
        manifest = read_json(place / "manifest.json")
        size = (place / "state.json").stat().st_size
        manifest["files"]["state.json"] = {"sha256": sha256_file(place / "state.json"), "size": size}
        write_json(place / "manifest.json", manifest)


def other_vocabulary(data: Path) -> None:
    with open(data / "text.model", "ab") as file:
        file.write(b"\xc0\x3e\x01")  # a field more: another file of equal sizes


def other_codes(data: Path) -> None:
    manifest = json.loads((data / "clips/manifest.json").read_text(encoding="utf-8"))
    manifest["tokenizer"]["sha256"] = {"image_tokenizer.safetensors": "1" * 64}
    write_json(data / "clips/manifest.json", manifest)


def brighter_frames(data: Path) -> None:
    folder = shard_folder(data / "frames", 0)
    shard = read_shard(folder)
    arrays = {name: np.array(shard.load(name)) for name in ("rows.npy", "frames.npy")}
    write_shard(folder, arrays | {"frames.npy": arrays["frames.npy"] + np.uint8(100)}, [])
    manifest = read_manifest(data / "frames", "frames")
    plan = {key: manifest[key] for key in ("format", "version", "tokenizer")}
    write_manifest(data / "frames", plan, [read_shard(folder)])


OTHERS = {
    "another text tokenizer than data.text_tokenizer=": ("sequential", other_vocabulary),
    "another image tokenizer than data.path=": ("sequential", other_codes),
    r"pixel normalization tokenizer\.pixel_mean=\[0\.15": ("tokenizer", brighter_frames),
}


@pytest.mark.parametrize("message", OTHERS)
def test_other_inputs_under_the_same_name_are_refused(message: str, data: Path, tmp_path: Path) -> None:
    task, change = OTHERS[message]
    other_codes(data)
    manifest = (data / "clips/manifest.json").read_text(encoding="utf-8")
    (data / "clips/manifest.json").write_text(manifest.replace("1" * 64, "0" * 64), encoding="utf-8")
    run_dir = tmp_path / "run"
    train(settings(data, run_dir, task, train={"stop_at": 1}))
    change(data)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(ValueError, match=message) as caught:
        train(settings(data, run_dir, task), resume=True)
    assert "\n" not in str(caught.value) and {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    forget_inputs(run_dir)
    train(settings(data, run_dir, task, train={"stop_at": 2}), resume=True)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"norm_scope": "pixel"}, r"tokenizer\.norm_scope=pixel \(it was image\)"),
        ({"norm_groups": 2}, r"tokenizer\.norm_groups=2 \(it was 4\)"),
        ({"continuous_steps": 2}, r"no codebook yet at step 3, and tokenizer\.continuous_steps=2 .* give more than 3"),
    ],
)
def test_the_image_tokenizer_is_not_resumed_as_another_function(
    own: dict[str, object], message: str, data: Path, tmp_path: Path
) -> None:
    train(settings(data, tmp_path / "run", "tokenizer", tokenizer={"continuous_steps": 4}, train={"stop_at": 3}))
    with pytest.raises(ValueError, match=message):
        train(settings(data, tmp_path / "run", "tokenizer", tokenizer={"continuous_steps": 4} | own), resume=True)
    train(settings(data, tmp_path / "run", "tokenizer", tokenizer={"continuous_steps": 5}), resume=True)
