"""Two of the same command at once: the second is refused in one line and changes nothing, the first goes on."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from cogvideo.cli.main import main
from cogvideo.tokenizers.text import TextTokenizer
from tests.helpers.bundles import write_bundle
from tests.helpers.ranks import finish, run, start, train_words
from tests.helpers.superres import TINY_DIRECT, write_superres
from tests.helpers.training import prepare_data, read_metrics, settings


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs: data/ and digits/, tokens/ to score, bundle/ to sample from, clips/ and direct/ to upsample."""
    folder = tmp_path_factory.mktemp("scene")
    prepare_data(folder / "data")
    bundle = write_bundle(folder / "bundle", frame_side=5, num_layers=1)
    vocabulary = TextTokenizer.load(bundle / "text.model").vocabulary
    sides = {"low_res_side": 5, "high_res_side": 15, "low_res_position_start": 65, "num_positions": 128}
    write_superres(folder / "direct", replace(TINY_DIRECT, text_len=16, vocabulary=vocabulary, **sides))
    run(["digits", "--out", str(folder / "digits"), "--count", "6"], 1, folder)
    run(["sample", "one", "--model", str(bundle), "--out", str(folder / "clips"), "rounds=0"], 1, folder)
    words = ["prepare", "--captions", str(folder / "digits/captions.jsonl"), "--out", str(folder / "tokens")]
    run([*words, "--tokenizer", str(bundle / "image_tokenizer"), "frame_pixels=40"], 1, folder)
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


FILLED_IN_PLACE = {
    "prepare": "prepare --captions {scene}/digits/captions.jsonl --frames --out {out}",
    "worlds": "worlds bodies --count 1 --pixels 64 --out {out}",
    "sample": "sample one --model {scene}/bundle --out {out} rounds=0",
    "interpolate": "interpolate {scene}/clips --model {scene}/bundle --out {out} rounds=1",
    "upsample": "upsample {scene}/clips --model {scene}/bundle --direct {scene}/direct --out {out}",
}
MADE_AS_A_WHOLE = {
    "digits": "digits --count 40 --out {out}",
    "vocabulary": "vocabulary --captions {scene}/digits/captions.jsonl --tokenizer {scene}/bundle/image_tokenizer "
    "--pieces 400 --out {out}",
    "bundle": "bundle --text {scene}/bundle/text.model --tokenizer {scene}/bundle/image_tokenizer "
    "--trunk {scene}/bundle/trunk --sequential {scene}/bundle/sequential "
    "--interpolation {scene}/bundle/interpolation --clusters 16 --out {out} --overwrite",
    "convert": "convert --from {scene}/bundle/sequential --to {out} --to-sat",
    "eval": "eval digits --real --tokenizer {scene}/bundle/image_tokenizer --num-prompts 2 --json {out}",
    "score": "score --model {scene}/bundle/sequential --rows {scene}/tokens --limit 2 "
    "--text-tokenizer {scene}/bundle/text.model --out {out}",
}


@pytest.mark.parametrize("command", FILLED_IN_PLACE | MADE_AS_A_WHOLE)
def test_the_second_of_two_commands_is_refused(command: str, scene: Path, tmp_path: Path) -> None:
    if command == "worlds":
        pytest.importorskip("pybullet", reason="simulates with PyBullet")
    out = tmp_path / ("out.safetensors" if command == "score" else "out")
    lock = out / ".lock" if command in FILLED_IN_PLACE else out.with_name(f".{out.name}.lock")
    words = (FILLED_IN_PLACE | MADE_AS_A_WHOLE)[command].format(scene=scene, out=out).split()
    check_second_is_refused(words, out, lock, tmp_path)
    assert out.exists()


def test_two_interactive_samplings_and_two_pages_are_refused(scene: Path, tmp_path: Path) -> None:
    """Both wait for work as long as they run."""
    pytest.importorskip("gradio", reason="the page is made with gradio")
    for name, words in (("talk", ["sample", "--interactive"]), ("page", ["demo", "--port", "0"])):
        out = tmp_path / name
        words = [*words, "--model", str(scene / "bundle"), "--out", str(out)]
        first = subprocess.Popen([sys.executable, "-m", "cogvideo", *words], stdin=subprocess.PIPE)
        try:
            while not ((out / ".lock").is_file() and (out / ".lock").stat().st_size):
                assert first.poll() is None, "ended before its lock was seen"
                time.sleep(0.01)
            assert finish(start(words, 1, tmp_path / f"{name}_second")) == [2]
            said = (tmp_path / f"{name}_second/stderr_0.txt").read_text()
            assert f"{out} is in use by process {first.pid}" in said and "Traceback" not in said
        finally:
            first.terminate()
            first.wait(60)
        assert first.returncode == 143 and not list(out.rglob("*lock"))


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


REFUSES_TO_REPLACE = {
    **{name: MADE_AS_A_WHOLE[name].removesuffix(" --overwrite") for name in ("digits", "bundle", "convert")},
    "merge": "merge {scene}/bundle/sequential --adapter {scene}/bundle/trunk --out {out}",
    "study": "study make a={scene}/clips b={scene}/clips --prompts {scene}/prompts.txt --out {out}",
}


@pytest.mark.parametrize("command", REFUSES_TO_REPLACE)
def test_a_finished_result_is_refused_without_the_lock_of_its_killed_writer(
    command: str, scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was killed after its result appeared; nothing else would ever remove the lock."""
    (scene / "prompts.txt").write_text("one\n", encoding="utf-8")
    out, lock = tmp_path / "out", tmp_path / ".out.lock"
    out.mkdir()
    (out / "result").touch()
    lock.touch()
    before = tree(out)
    assert main(REFUSES_TO_REPLACE[command].format(scene=scene, out=out).split()) == 2
    assert f"{out} exists; choose another name" in capsys.readouterr().err
    assert tree(out) == before and not lock.exists()
