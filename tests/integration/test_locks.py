"""Two of the same command at once: the second is refused in one line and changes nothing, the first goes on."""

import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.ranks import finish, start, train_words
from tests.helpers.training import prepare_data, read_metrics, settings


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ to train on, bundle/ to sample from, and videos with captions.jsonl to prepare."""
    folder = tmp_path_factory.mktemp("scene")
    prepare_data(folder / "data")
    write_bundle(folder / "bundle", frame_side=5, num_layers=1)
    digits = start(["digits", "--out", str(folder / "digits"), "--count", "6"], 1, folder)
    assert finish(digits) == [0]
    return folder


def stop_with_lock(processes: list[BaseProcess], lock: Path) -> None:
    """Wait until a command holds its lock, then stop its processes (SIGSTOP)."""
    while not (lock.is_file() and lock.stat().st_size):
        assert processes[0].is_alive(), "ended before its lock was seen"
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)


def go_on(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGCONT)
    return finish(processes)


def tree(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def check_second_is_refused(words: list[str], out: Path, lock: Path, scratch: Path, world: int = 1) -> None:
    first = start(words, world, scratch / "first")
    stop_with_lock(first, lock)
    before = tree(out)
    try:
        second = start(words, world, scratch / "second")
        assert finish(second) == [2] * world
        said = "".join((scratch / f"second/stderr_{rank}.txt").read_text() for rank in range(world))
        errors = [line for line in said.splitlines() if "error" in line]
        assert len(errors) == 1 and "Traceback" not in said, said
        assert f"{out} is in use by process {first[0].pid} on {os.uname().nodename} (" in errors[0]
        assert errors[0].endswith("wait until it ends, or choose another folder")
        assert tree(out) == before
    finally:
        codes = go_on(first)
    assert codes == [0] * world, (scratch / "first/stderr_0.txt").read_text()
    assert not lock.exists() and not list(out.rglob("*.tmp*"))


COMMANDS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "prepare": ("prepare --captions {scene}/digits/captions.jsonl --frames --out {out}", lambda out: out / ".lock"),
    "sample": ("sample {prompt} --model {scene}/bundle --out {out} rounds=0", lambda out: out / ".lock"),
    "convert": (
        "convert --from {scene}/bundle/sequential --to {out} --to-sat",
        lambda out: out.with_name(f".{out.name}.lock"),
    ),
    "digits": ("digits --count 40 --out {out}", lambda out: out.with_name(f".{out.name}.lock")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_of_two_commands_is_refused(command: str, scene: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text, lock = COMMANDS[command]
    words = [w.format(scene=scene, out=out, prompt=CAPTIONS[0]) for w in text.split()]
    check_second_is_refused(words, out, lock(out), tmp_path)
    assert any(out.iterdir())


@pytest.mark.parametrize("world", [1, 2])
def test_the_second_of_two_trainings_is_refused(world: int, scene: Path, tmp_path: Path) -> None:
    config = settings(scene / "data", tmp_path / "run", log={"save_every": 2})
    words = train_words(config, "--resume")
    check_second_is_refused(words, config.run_dir, config.run_dir / ".lock", tmp_path, world)
    assert [line["step"] for line in read_metrics(config.run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_killed_run_is_resumed_although_its_lock_is_there(scene: Path, tmp_path: Path) -> None:
    config = settings(scene / "data", tmp_path / "run")
    first = start(train_words(config), 1, tmp_path / "first")
    stop_with_lock(first, config.run_dir / ".lock")
    first[0].kill()
    first[0].join()
    assert (config.run_dir / ".lock").is_file()
    assert finish(start(train_words(config, "--resume"), 1, tmp_path / "second")) == [0]
    assert "waiting" not in (tmp_path / "second/stderr_0.txt").read_text()
    assert not (config.run_dir / ".lock").exists()


def test_a_command_that_is_refused_leaves_no_folder_for_its_lock(scene: Path, tmp_path: Path) -> None:
    words = ["train", "--config", str(scene / "none.yaml"), f"run_dir={tmp_path / 'a/run'}"]
    assert finish(start(words, 1, tmp_path / "stderr")) == [2]
    config = settings(scene / "none", tmp_path / "b/run")
    assert finish(start(train_words(config), 1, tmp_path / "stderr")) == [2]
    assert not list(tmp_path.rglob("run"))
