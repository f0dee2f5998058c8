"""Damaged weights: every file cut short, with a flipped bit, or missing is refused in one line.

`cogvideo sample` has the same in test_sample.py, checkpoints to resume from in test_train.py.
"""

import shutil
from pathlib import Path

import pytest

from cogvideo.checkpoint.load import load_model, save_model
from cogvideo.cli.main import main
from cogvideo.config import dump_yaml
from cogvideo.training.launch import prepare_environment
from tests.helpers.bundles import write_bundle
from tests.helpers.training import prepare_data, settings

COMMANDS = {
    "inspect": "inspect --checkpoint {broken}",
    "score": "score --model {broken} --rows rows.bin --out scores.safetensors",
    "convert": "convert --from {broken} --to out --to-sat",
    "train": "train --config {folder}/train.yaml init.checkpoint={broken}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """whole/ and sharded/ checkpoints of one model, and what a training run needs."""
    prepare_environment()  # imports DeepSpeed, whose probe for libaio is silent only where nothing captures stderr
    folder = tmp_path_factory.mktemp("weights")
    stage = write_bundle(folder / "bundle", num_layers=1) / "sequential"
    shutil.copytree(stage, folder / "whole")
    save_model(folder / "sharded", load_model(stage), max_shard_bytes=1 << 14)
    prepare_data(folder / "data")
    (folder / "train.yaml").write_text(dump_yaml(settings(folder / "data", Path("run"))))
    return folder


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) * 2 // 3])
    else:
        data[len(data) * 2 // 3] ^= 4
        path.write_bytes(data)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_damage_is_refused_in_one_line(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = sorted(path.name for path in (folder / kind).iterdir())
    assert len(names) == (3 if kind == "whole" else len(list((folder / kind).glob("model-*"))) + 3)
    shards = [name for name in names if name.startswith("model-")]
    for name in [name for name in names if name not in shards[1:]]:
        for how in ("cut", "flipped", "gone"):
            broken = tmp_path / "broken"
            shutil.copytree(folder / kind, broken)
            damage(broken / name, how)
            words = COMMANDS[command].format(broken=broken, folder=folder).split()
            assert main(words) == 2, (name, how)
            error = capfd.readouterr().err.splitlines()
            assert len(error) == 1 and error[0].startswith("cogvideo: error: "), (name, how, error)
            assert str(broken) in error[0], (name, how, error)
            shutil.rmtree(broken)
            assert not list(tmp_path.iterdir()), (name, how)
