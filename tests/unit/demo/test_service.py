"""Requests of visitors: the clips of `cogvideo sample`, live progress, stopping one of several, refusals."""

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

from cogvideo.checkpoint.adapter import Base, fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model
from cogvideo.cli.main import main
from cogvideo.config import dump_yaml
from cogvideo.demo import service as module
from cogvideo.demo.places import Limits
from cogvideo.demo.service import DemoService, Request
from cogvideo.demo.storage import size_of
from cogvideo.demo.weights import ServedWeights
from cogvideo.media.video import write_video
from cogvideo.sampling.adapters import AdapterChoice
from cogvideo.sampling.bundle import load_sample_config, open_tokenizers
from cogvideo.sampling.config import UpsampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sampling.runner import WrittenFile, write_clips
from cogvideo.sampling.superres import Upsampler
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.transformer import SuperresTransformer
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import CAPTIONS, write_bundle

SMALL = ["num_clusters=32", "key_frames.top_k_clusters=4"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle")


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle)


@pytest.fixture
def service(bundle: Path, pipeline: Pipeline, tmp_path: Path) -> Iterator[DemoService]:
    service = DemoService(
        {"one": ServedWeights(pipeline, load_sample_config(bundle, [], SMALL), bundle)}, tmp_path / "out"
    )
    yield service
    service.close()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 frames, 2 per second."""
    path = tmp_path_factory.mktemp("given") / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 255, size=(9, 16, 16, 3), dtype=np.uint8)
    write_video(path, frames, 2, crf=0, pixel_format="yuv444p")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_command(bundle: Path, out: Path, *words: str | Path) -> dict[str, bytes]:
    settings = out.with_suffix(".yaml")
    settings.write_text(dump_yaml(load_sample_config(bundle, [], SMALL)), encoding="utf-8")
    assert main([*map(str, words), "--model", str(bundle), "--out", str(out), "--config", str(settings)]) == 0
    return contents(out)


def test_a_request_gives_the_files_of_the_command(service: DemoService, bundle: Path, tmp_path: Path) -> None:
    """Byte for byte, also when repeated."""
    request = Request(
        f"{CAPTIONS[0]}\n\n {CAPTIONS[1]} ",
        {"seed": 7, "rounds": 1, "samples_per_prompt": 2, "key_frames.temperature": 0.7},
    )
    expected = by_command(
        *(bundle, tmp_path / "sampled", "sample", *CAPTIONS[:2]),
        *("seed=7", "rounds=1", "samples_per_prompt=2", "key_frames.temperature=0.7"),
    )
    for number in range(2):
        *_, last = service.run(request)
        assert last.folder.name == f"{number:03d}-the-red-digit-3-moves-left-slowly"
        assert last.finished and last.drawn_tokens == last.total_tokens
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
def test_uploads_give_the_files_of_the_command(
    service: DemoService,
    bundle: Path,
    video: Path,
    tmp_path: Path,
    use: Any,
    settings: dict[str, Any],
    words: list[str],
) -> None:
    *_, last = service.run(Request(CAPTIONS[0], settings, video, use))
    assert contents(last.folder) == by_command(bundle, tmp_path / "by", *(word.format(video=video) for word in words))
    if use == "continue":  # downloaded tokens can be continued, and have their caption
        *_, longer = service.run(Request("", settings, last.folder / "tokens.safetensors", use))
        tokens = [load_file(each.folder / "tokens.safetensors")["tokens"] for each in (last, longer)]
        assert torch.equal(tokens[1][:, : tokens[0].shape[1]], tokens[0])
        assert longer.captions == (CAPTIONS[0],)


def test_adapters_are_switched_between_requests_that_run_together(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each request gives the files of the command with its adapters, though all are asked for at once."""
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.01)
    base = Base(model="sequential", sha256=fingerprint(load_checkpoint(bundle / "sequential")), step=1)
    folders = [
        write_adapter(tmp_path / name, load_model(bundle / "sequential"), base, seed=seed)
        for seed, name in enumerate("ab")
    ]
    adapters = {"a": AdapterChoice(folders[0]), "b": AdapterChoice(folders[1], 0.5)}
    config = load_sample_config(bundle, [], SMALL)
    service = DemoService(
        {"one": ServedWeights(Pipeline.load(bundle), config, bundle, adapters=adapters)}, tmp_path / "out"
    )
    words = {(): [], ("b",): ["--adapter", f"{folders[1]}:0.5"]}
    words[("a", "b")] = ["--adapter", folders[0], *words[("b",)]]
    chosen: list[Any] = [None, (), ("b",), ("b", "a"), ()]
    running = [service.run(Request(CAPTIONS[0], {"rounds": 0}, adapters=names)) for names in chosen]
    states = [next(one) for one in running]
    assert [state.waiting for state in states] == [False, True, True, True, True]
    folders_of = []
    for one in running:
        *_, last = one
        folders_of.append(last.folder)
    service.close()
    found = [contents(folder) for folder in folders_of]
    for number, names in enumerate([("a", "b"), (), ("b",), ("a", "b"), ()]):
        command = ["sample", CAPTIONS[0], "rounds=0", *words[names]]
        assert found[number] == by_command(bundle, tmp_path / f"by-{number}", *command)
    assert len({files["tokens.safetensors"] for files in found}) == 3
    with pytest.raises(ValueError, match="there is no adapter 'c'; available: a, b"):
        next(service.run(Request("a", adapters=["c"])))


def test_files_appear_as_a_clip_grows(service: DemoService, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threading.Semaphore(0)

    def one_by_one(*args: Any, **more: Any) -> Iterator[WrittenFile]:
        for written in write_clips(*args, **more):
            yield written
            seen.acquire()

    monkeypatch.setattr(module, "write_clips", one_by_one)
    monkeypatch.setattr(module, "REFRESH_SECONDS", 0.01)
    grown: list[dict[str, int]] = []
    for progress in service.run(Request("a", {"rounds": 1})):
        files = {path.suffix: times for path, times in progress.files.items()}
        if files and files != (grown[-1] if grown else None):
            grown.append(files)
            seen.release()
            assert progress.drawn_tokens <= progress.total_tokens
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


def test_closing_one_request_does_not_affect_others(
    service: DemoService, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that share its forward passes continue, whichever thread runs them."""
    all_started = threading.Barrier(3)

    def simultaneously(*args: Any, **more: Any) -> Iterator[WrittenFile]:
        all_started.wait()
        yield from write_clips(*args, **more)

    monkeypatch.setattr(module, "write_clips", simultaneously)
    requests = [Request("a", {"samples_per_prompt": 16, "rounds": 2}), Request(CAPTIONS[0], {"rounds": 2})]
    leaving, staying = running = [service.run(request) for request in requests]
    left, _ = map(next, running)
    leaving.close()
    all_started.wait()
    *_, last = staying
    assert contents(last.folder) == by_command(bundle, tmp_path / "sampled", "sample", CAPTIONS[0], "rounds=2")
    service.close()
    assert not (left.folder / "samples.json").exists() and last.finished
    words = ["sample", "a", "samples_per_prompt=16", "rounds=2"]
    resumed = by_command(bundle, left.folder, *words, "--resume")
    assert resumed == by_command(bundle, tmp_path / "uninterrupted", *words)


def test_the_oldest_results_go_first(service: DemoService) -> None:
    """The disk space is counted after every request; what runs stays."""
    folders = [list(service.run(Request(prompt, {"rounds": 0})))[-1].folder for prompt in "abc"]
    service.limits = Limits(disk_bytes=2 * size_of(folders[0]))
    *_, last = service.run(Request("d", {"rounds": 0}))
    service.close()
    assert sorted(service.out.iterdir()) == [folders[2], last.folder]


def test_a_clip_has_limited_time(service: DemoService) -> None:
    service.limits = Limits(seconds_per_clip=0.01)
    with pytest.raises(RuntimeError, match="stopped after 0 s, the limit here; ask for fewer rounds or samples"):
        list(service.run(Request("a\nb", {"rounds": 3})))
    assert not list(service.out.glob("*/samples.json"))


def test_closing_the_service_stops_all_requests(service: DemoService, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()

    def until_closed(*args: Any, **more: Any) -> Iterator[WrittenFile]:
        started.set()
        while not service._closed:
            time.sleep(0.01)
        return write_clips(*args, **more)

    monkeypatch.setattr(module, "write_clips", until_closed)
    running = service.run(Request("a"))
    progress = next(running)
    assert started.wait(60)
    service.close()
    with pytest.raises(RuntimeError, match="stopped"):
        list(running)
    with pytest.raises(RuntimeError, match="stopped"):
        list(service.run(Request("a")))
    assert not (progress.folder / "samples.json").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (Request(" \n"), "there is no prompt"),
        (Request("a " * 90), "shorten it"),
        (Request("a\n" * 17), "17 clips are more than the limit of 16 per request"),
        (Request("a", {"samples_per_prompt": 100}), "100 clips are more than the limit of 16"),
        (Request("a\nb", {"rounds": 8}), "2050 frames are more than the limit of 1100 per request; lower rounds"),
        (Request("a" * 30_000), "the prompts have 30000 characters; give at most 20000"),
        (Request("a", {"sed": 3}), "did you mean 'seed'?"),
        (Request("a", {"seed": "${oc.env:HOME}"}), "not allowed in a stored config"),
        (Request("a", {"key_frames.temperature": None}), "key_frames.temperature=None is not valid; expected float"),
        (Request("a", {"key_frames.temperature": -1.0}), "temperature=-1.0 must be above 0"),
        (Request("a", {"weights": "int8"}), "weights= cannot change"),
        (Request("a", upsample=True), "super-resolution is not available here"),
        (Request("a", file=Path("text.mp4")), "text.mp4 is not a readable picture or video"),
        (Request("a", file=Path("bad.safetensors")), "bad.safetensors does not hold tokens of clips"),
        (Request("", file=Path("clip.mp4"), file_use="interpolate"), "there is no prompt"),
        (Request("a\nb", file=Path("clip.mp4"), file_use="interpolate"), "got 2 prompts for one video"),
        (Request("a", {"rounds": 0}, Path("clip.mp4"), "interpolate"), "rounds=0 adds no frames"),
    ],
)
def test_refused_in_one_line(service: DemoService, video: Path, tmp_path: Path, asked: Request, message: str) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08" + bytes(20))
    if asked.file is not None:
        asked = replace(asked, file=video if asked.file.name == video.name else tmp_path / asked.file)
    with pytest.raises(ValueError) as error:
        next(service.run(asked))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert os.listdir(service.out) == []


def test_unknown_weights_are_refused(service: DemoService) -> None:
    with pytest.raises(ValueError, match="there are no weights 'third'; available: one"):
        next(service.run(Request("a", weights="third")))


def test_a_folder_with_other_files_is_refused(bundle: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    """Numbering continues in an earlier folder; one with anything else in it is refused, since all of it is served."""
    again = DemoService({"one": ServedWeights(pipeline, load_sample_config(bundle, [], SMALL), bundle)}, tmp_path)
    (tmp_path / "041-a").mkdir()
    again = DemoService(again.weights, tmp_path)
    *_, last = again.run(Request("b", {"rounds": 0}))
    assert last.folder.name == "042-b"
    for name in ("notes", "043-a-file"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(FileExistsError, match=f"holds {name}, which is not a result of this page"):
            DemoService(again.weights, tmp_path)
        (tmp_path / name).unlink()


def test_super_resolution_afterwards(service: DemoService, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, image, labels = open_tokenizers(bundle)
    weights = service.weights["one"]
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
    weights.upsampler = Upsampler(
        SuperresTransformer(config).eval(), None, image, image, text.encode, labels, UpsampleConfig(), ("direct",)
    )
    with pytest.raises(ValueError, match="frames of 2x2 tokens, super-resolution reads 3x3; use models of one family"):
        other = SuperresTransformer(replace(config, low_res_side=3, high_res_side=9))
        replace(weights, upsampler=replace(weights.upsampler, direct=other))
    folders, deadlines = {}, set()
    for progress in service.run(Request(CAPTIONS[0], {"rounds": 0, "seed": 3}, upsample=True)):
        folders[progress.folder] = progress
        deadlines |= {running._deadline for running in service._running}
        with monkeypatch.context() as patch:  # as another request may at any time, once results take too much space
            patch.setattr(service, "limits", Limits(disk_bytes=1))
            service._tidy_up()
    small, large = folders.values()
    assert large.folder == small.folder / "large" and large.finished
    assert small.small is None and large.small == small and small.finished
    assert load_file(large.folder / "tokens.safetensors")["tokens"].shape == (1, 5, 36)
    assert "seed: 3" in (large.folder / "config.yaml").read_text()
    assert len(deadlines) == 1, "enlarging gets what is left of the time"
    weights.upsampler = replace(weights.upsampler, config=UpsampleConfig(seed=5))
    *_, last = service.run(Request(CAPTIONS[0], {"rounds": 0, "seed": 3}, upsample=True))
    assert "seed: 5" in (last.folder / "config.yaml").read_text(), "a seed of its own stays"
