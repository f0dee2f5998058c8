"""Clips for visitors: those of `cogvideo sample`, shown while they grow, stopped alone, refused in a line."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cogvideo.cli.main import main
from cogvideo.demo import service as module
from cogvideo.demo.service import Ask, Studio
from cogvideo.media.video import write_video
from cogvideo.sampling.bundle import bundle_sample_config, open_tokenizers
from cogvideo.sampling.config import UpsampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.runner import Written, produce
from cogvideo.sampling.superres import Upsampler
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.transformer import SuperresTransformer
from tests.helpers.bundles import CAPTIONS, write_bundle

SMALL = ["num_clusters=32", "key_frames.top_k_clusters=4"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle")


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle)


@pytest.fixture
def studio(bundle: Path, pipeline: Pipeline, tmp_path: Path) -> Iterator[Studio]:
    made = Studio(pipeline, bundle_sample_config(bundle, [], SMALL), tmp_path / "out", directory=bundle)
    yield made
    made.close()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 frames, 2 a second."""
    path = tmp_path_factory.mktemp("given") / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, size=(9, 16, 16, 3), dtype=np.uint8)
    write_video(path, frames, 2, crf=0, pixel_format="yuv444p")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_command(bundle: Path, out: Path, *words: str | Path) -> dict[str, bytes]:
    assert main([*map(str, words), "--model", str(bundle), "--out", str(out), *SMALL]) == 0
    return contents(out)


def test_what_the_command_makes(studio: Studio, bundle: Path, tmp_path: Path) -> None:
    """To the last byte, also when asked again: a seed repeats its clip."""
    ask = Ask(
        f"{CAPTIONS[0]}\n\n {CAPTIONS[1]} ",
        {"seed": 7, "rounds": 1, "samples_per_prompt": 2, "key_frames.temperature": 0.7},
    )
    expected = by_command(
        *(bundle, tmp_path / "sampled", "sample", *CAPTIONS[:2]),
        *("seed=7", "rounds=1", "samples_per_prompt=2", "key_frames.temperature=0.7"),
    )
    for number in range(2):
        *_, last = studio.make(ask)
        assert last.folder.name == f"{number:03d}-the-red-digit-3-moves-left-slowly"
        assert last.finished and last.drawn == last.total
        assert contents(last.folder) == expected
        assert set(last.files) == {last.folder / name for name in expected if name != "samples.json"}
        assert last.captions == (CAPTIONS[0], CAPTIONS[0], CAPTIONS[1], CAPTIONS[1])


@pytest.mark.parametrize(
    ("use", "settings", "words"),
    [
        ("first frame", {"rounds": 0}, ["sample", CAPTIONS[0], "--first-frame", "{video}", "rounds=0"]),
        ("continue", {"rounds": 1}, ["sample", CAPTIONS[0], "--continue", "{video}", "rounds=1"]),
        ("interpolate", {"rounds": 1}, ["interpolate", "{video}", "--caption", CAPTIONS[0], "rounds=1"]),
    ],
)
def test_frames_that_a_visitor_brings(
    studio: Studio, bundle: Path, video: Path, tmp_path: Path, use: Any, settings: dict[str, Any], words: list[str]
) -> None:
    *_, last = studio.make(Ask(CAPTIONS[0], settings, video, use))
    assert contents(last.folder) == by_command(bundle, tmp_path / "by", *(word.format(video=video) for word in words))
    if use == "continue":  # what was downloaded can go on in turn, and knows its caption
        *_, longer = studio.make(Ask("", settings, last.folder / "tokens.safetensors", use))
        tokens = [load_file(each.folder / "tokens.safetensors")["tokens"] for each in (last, longer)]
        assert torch.equal(tokens[1][:, : tokens[0].shape[1]], tokens[0])
        assert longer.captions == (CAPTIONS[0],)


def test_a_clip_is_seen_as_it_grows(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threading.Semaphore(0)

    def one_by_one(*args: Any, **more: Any) -> Iterator[Written]:
        for written in produce(*args, **more):
            yield written
            seen.acquire()

    monkeypatch.setattr(module, "produce", one_by_one)
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.01)
    grown: list[dict[str, int]] = []
    for shown in studio.make(Ask("a", {"rounds": 1})):
        files = {path.suffix: times for path, times in shown.files.items()}
        if files and files != (grown[-1] if grown else None):
            grown.append(files)
            seen.release()
            assert shown.drawn <= shown.total
    assert grown == [
        {".png": 1},  # the first frame
        {".png": 2},
        {".png": 2, ".mp4": 1},  # the key frames
        {".png": 3, ".mp4": 1},
        {".png": 3, ".mp4": 2},
        {".png": 3, ".mp4": 2, ".gif": 1},
        {".png": 3, ".mp4": 2, ".gif": 1, ".safetensors": 1},
        {".png": 3, ".mp4": 2, ".gif": 1, ".safetensors": 1, ".yaml": 1},
    ]


def test_one_who_leaves_stops_alone(
    studio: Studio, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who decode together with them go on, whoever's thread makes the steps."""
    together = threading.Barrier(3)

    def at_the_same_time(*args: Any, **more: Any) -> Iterator[Written]:
        together.wait()
        yield from produce(*args, **more)

    monkeypatch.setattr(module, "produce", at_the_same_time)
    asks = [Ask("a", {"samples_per_prompt": 16, "rounds": 2}), Ask(CAPTIONS[0], {"rounds": 2})]
    leaving, staying = made = [studio.make(ask) for ask in asks]
    left, _ = map(next, made)
    leaving.close()  # type: ignore[attr-defined]
    together.wait()
    *_, last = staying
    assert contents(last.folder) == by_command(bundle, tmp_path / "sampled", "sample", CAPTIONS[0], "rounds=2")
    studio.close()
    assert not (left.folder / "samples.json").exists() and last.finished
    words = ["sample", "a", "samples_per_prompt=16", "rounds=2"]
    gone_on_with = by_command(bundle, left.folder, *words, "--resume")
    assert gone_on_with == by_command(bundle, tmp_path / "never-stopped", *words)


def test_closing_stops_all(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def told(*args: Any, **more: Any) -> Iterator[Written]:
        begun.set()
        while not studio._closed:
            time.sleep(0.01)
        return produce(*args, **more)

    monkeypatch.setattr(module, "produce", told)
    making = studio.make(Ask("a"))
    shown = next(making)
    assert begun.wait(60)
    studio.close()
    with pytest.raises(RuntimeError, match="stopped"):
        list(making)
    with pytest.raises(RuntimeError, match="stopped"):
        list(studio.make(Ask("a")))
    assert not (shown.folder / "samples.json").exists()


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (Ask(" \n"), "there is no prompt"),
        (Ask("a " * 90), "shorten it"),
        (Ask("a\n" * 17), "17 clips are more than the 16 that are made at once"),
        (Ask("a", {"samples_per_prompt": 100}), "100 clips are more than the 16"),
        (Ask("a\nb", {"rounds": 8}), "2050 frames are more than the 1100 that are made at once; lower rounds"),
        (Ask("a" * 30_000), "30000 letters of prompts; give at most 20000"),
        (Ask("a", {"sed": 3}), "did you mean 'seed'?"),
        (Ask("a", {"seed": "${oc.env:HOME}"}), "which a stored config may not"),
        (Ask("a", {"key_frames.temperature": None}), "key_frames.temperature=None does not fit; expected float"),
        (Ask("a", {"key_frames.temperature": -1.0}), "temperature=-1.0 must be above 0"),
        (Ask("a", {"weights": "int8"}), "weights= is chosen at the start"),
        (Ask("a", upsample=True), "there is no super-resolution here"),
        (Ask("a", file=Path("text.mp4")), "text.mp4 is no picture or video that can be read"),
        (Ask("a", file=Path("bad.safetensors")), "bad.safetensors does not hold tokens of clips"),
        (Ask("", file=Path("clip.mp4"), use="interpolate"), "there is no prompt"),
        (Ask("a\nb", file=Path("clip.mp4"), use="interpolate"), "one video, but 2 prompts"),
        (Ask("a", {"rounds": 0}, Path("clip.mp4"), "interpolate"), "rounds=0 puts no frame between any"),
    ],
)
def test_refused_in_a_line(studio: Studio, video: Path, tmp_path: Path, ask: Ask, said: str) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08" + bytes(20))
    if ask.file is not None:
        ask = replace(ask, file=video if ask.file.name == video.name else tmp_path / ask.file)
    with pytest.raises(ValueError) as error:
        next(studio.make(ask))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert os.listdir(studio.out) == []


def test_only_results_are_served(bundle: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    """The folder goes on where it ended, and is refused if it holds anything of somebody else's."""
    again = Studio(pipeline, bundle_sample_config(bundle, [], SMALL), tmp_path, directory=bundle)
    (tmp_path / "041-a").mkdir()
    again = Studio(pipeline, again.config, tmp_path, directory=bundle)
    *_, last = again.make(Ask("b", {"rounds": 0}))
    assert last.folder.name == "042-b"
    for name in ("notes", "043-a-file"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match="is not empty"):
            Studio(pipeline, again.config, tmp_path, directory=bundle)
        (tmp_path / name).unlink()


def test_super_resolution_afterwards(studio: Studio, bundle: Path) -> None:
    text, image, labels = open_tokenizers(bundle)
    config = SuperresConfig(
        num_layers=1,
        hidden_size=16,
        num_heads=2,
        text_len=16,
        low_res_side=2,
        high_res_side=6,
        num_positions=64,
        low_res_position_start=33,
        vocabulary=text.vocabulary,
    )
    torch.manual_seed(0)
    labels = np.arange(image.num_tokens) if labels is None else labels
    studio.upsampler = Upsampler(
        SuperresTransformer(config).eval(), None, image, text.encode, labels, UpsampleConfig(), ("direct",)
    )
    folders = {}
    for shown in studio.make(Ask(CAPTIONS[0], {"rounds": 0, "seed": 3}, upsample=True)):
        folders[shown.folder.name] = shown
    small, large = folders.values()
    assert large.folder.name == f"{small.folder.name}-large" and large.finished
    assert load_file(large.folder / "tokens.safetensors")["tokens"].shape == (1, 5, 36)
    assert "seed: 3" in (large.folder / "config.yaml").read_text()
