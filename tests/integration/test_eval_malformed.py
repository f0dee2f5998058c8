"""A hundred malformed inputs of `cogvideo eval`: each ends in one line that names what is wrong, and writes nothing."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from torch import Tensor, nn

from cogvideo.cli.main import main
from cogvideo.evaluation import weight_files
from cogvideo.evaluation.networks import FeatureNetwork
from tests.helpers.bundles import write_bundle
from tests.helpers.networks import (
    BatchNormalised,
    CaptionStandIn,
    Dense,
    PairStandIn,
    Plain,
    StandIn,
    Unbatched,
    write_network,
)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), x.flatten(1)


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :0]


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0]


class Fewer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:1, :4]


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] > 9, "line one\nline two"
        return x.flatten(1)


class Narrow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4] if len(x) > 1 else x.flatten(1)[:, :3]


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4].to(torch.complex64)


def broken_files(folder: Path) -> dict[str, Path]:
    """Files that hold none of what any option expects, by kind."""
    good = write_file(folder / "good.pt", b"")
    write_network(good, Plain())
    archive = good.read_bytes()
    files = {
        "empty": write_file(folder / "empty", b""),
        "noise": write_file(folder / "noise", bytes(range(256)) * 8),
        "half": write_file(folder / "half", archive[: len(archive) // 2]),
        "bytes lost": write_file(folder / "lost", archive[:40] + archive[90:]),
        "pickle": write_file(folder / "pickle", pickle.dumps({"losses": [1, 2]})),
        "text": write_file(folder / "text", b"video,caption\n\x00"),
        "not UTF-8": write_file(folder / "latin", b"\xff\xfe\x00\xd8"),
        "array": folder / "array.npy",
        "folder": folder / "folder",
        "missing": folder / "missing",
        "loop": folder / "loop",
        "dangling": folder / "dangling",
        "device": Path("/dev/null"),
        "deep JSON": write_file(folder / "deep", b"[" * 100_000),
    }
    np.save(files["array"], np.array([np.nan]))
    files["folder"].mkdir()
    os.symlink(files["loop"], files["loop"])
    os.symlink(folder / "gone", files["dangling"])
    return files


def write_file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def scores(folder: Path, name: str, losses: np.ndarray, learned: str | None) -> Path:
    path = folder / f"{name}.safetensors"
    save_file({"losses": losses}, path, None if learned is None else {"learned_frames": learned})
    return path


def clip_folders(folder: Path) -> dict[str, Path]:
    """Folders whose clips cannot be read."""
    made: dict[str, Path] = {
        name: folder / "clips" / name for name in ("truncated", "sizes", "text", "huge", "both", "fake")
    }
    for name, place in made.items():
        for number in range(4):
            clip = place / f"clip{number}"
            clip.mkdir(parents=True)
            for index in range(4):
                side = 24 if name == "sizes" and index == 2 else 16
                Image.fromarray(np.full((side, 16, 3), 60 * index, np.uint8)).save(clip / f"{index}.png")
    for picture in made["truncated"].rglob("1.png"):
        picture.write_bytes(picture.read_bytes()[:45])
    for picture in made["text"].rglob("1.png"):
        picture.write_text("no picture", encoding="utf-8")
    for picture in made["huge"].rglob("1.png"):  # claims 4 gigapixels
        data = bytearray(picture.read_bytes())
        data[16:24] = (65_000).to_bytes(4, "big") * 2
        picture.write_bytes(data)
    (made["both"] / "video.mp4").write_bytes(b"\x00")
    for picture in made["fake"].rglob("*.png"):
        picture.rename(picture.with_suffix(".mp4"))
    return made


def all_cases(folder: Path) -> dict[str, list[str]]:
    """Options by case; `TOKENIZER` and `CLIP` stand for good ones; good clips are put in for what a case leaves out."""
    files = broken_files(folder)
    cases: dict[str, list[str]] = {}
    trusted = ["--trust-network", "--tokenizer", "TOKENIZER"]
    others = ("c3d", "lpips_vgg", "inception")  # opened by the code that opens i3d and clip
    for kind, path in files.items():
        for role in ("i3d", "clip", *(others if kind in ("noise", "half", "missing") else ())):
            cases[f"{role}: {kind}"] = ["--network", f"{role}={path}", *trusted]
        cases[f"scores: {kind}"] = ["--scores", str(path)]
        cases[f"captions: {kind}"] = ["--captions", str(path), "--network", "clip=CLIP", *trusted]
        cases[f"real: {kind}"] = ["--real", str(path)]
        cases[f"generated: {kind}"] = ["--generated", str(path)]
        cases[f"tokenizer: {kind}"] = ["--tokenizer", str(path)]
    modules = [Pair(), Nothing(), Cube(), Fewer(), Raises(), Narrow(), Complex(), Unbatched(), BatchNormalised()]
    for number, module in enumerate([*modules, Plain(0.0), Plain(float("nan")), Plain(float("inf"))]):
        path = folder / f"net{number}.pt"
        write_network(path, module)
        cases[f"i3d answers wrongly: {number} {type(module).__name__}"] = ["--network", f"i3d={path}", *trusted]
    cases["i3d unknown"] = ["--network", f"i3d={path}"]
    for number, module in enumerate([PairStandIn(1.0), PairStandIn(float("nan")), PairStandIn(-1.0), Plain()]):
        path = folder / f"pair{number}.pt"
        write_network(path, module)
        cases[f"lpips answers wrongly: {number}"] = ["--network", f"lpips_alex={path}", *trusted]
    ones = np.ones((2, 3, 4), np.float32)
    for name, losses, learned in (
        ("no list", ones, None),
        ("no numbers", ones, '["a"]'),
        ("beyond", ones, "[3]"),
        ("none learned", ones, "[]"),
        ("no JSON", ones, "{"),
        ("deep JSON", ones, "[" * 100_000),
        ("flat", np.ones(3, np.float32), "[0]"),
        ("not finite", ones * np.nan, "[0]"),
        ("negative", -ones, "[0]"),
        ("no clips", ones[:0], "[0]"),
    ):
        cases[f"scores: {name}"] = ["--scores", str(scores(folder, name, losses, learned))]
    for name, place in clip_folders(folder).items():
        cases[f"real clips: {name}"] = ["--real", str(place)]
        cases[f"generated clips: {name}"] = ["--generated", str(place)]
    return cases


def good_input(folder: Path) -> list[str]:
    """Every option of which cases have malformed ones, as it should be."""
    modules = {"i3d": StandIn(), "c3d": Dense(), "lpips_vgg": PairStandIn(), "clip": Plain()}
    words = ["--trust-network", "--tokenizer", "TOKENIZER"]
    for role, module in modules.items():
        write_network(folder / f"{role}.pt", module)
        words += ["--network", f"{role}={folder / role}.pt"]
    captions = write_file(folder / "captions.csv", b"video,caption\n0,a bar\n1,two bars\n2,a bar\n3,two bars\n")
    losses = scores(folder, "scores", np.ones((2, 3, 4), np.float32), "[0]")
    return [*words, "--captions", str(captions), "--scores", str(losses)]


@pytest.mark.slow
def test_a_hundred_malformed_inputs_are_one_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = weight_files.open_weights

    def open_weights(role: str, path: Path, device: torch.device, *, trust: bool = False) -> FeatureNetwork:
        is_good = path == tmp_path / "input" / "clip.pt"
        return (CaptionStandIn if is_good else opened)(role, path, device, trust=trust)

    monkeypatch.setattr(weight_files, "open_weights", open_weights)
    good = tmp_path / "good"
    for number in range(4):
        (good / f"{number}").mkdir(parents=True)
        for index in range(4):
            picture = np.full((16, 16, 3), 40 * index + number, np.uint8)
            Image.fromarray(picture).save(good / f"{number}" / f"{index}.png")
    write_bundle(tmp_path / "bundle", num_layers=1)
    (tmp_path / "bad").mkdir()
    (tmp_path / "input").mkdir()
    cases = all_cases(tmp_path / "bad")
    assert len(cases) >= 100
    stands_for = {"TOKENIZER": tmp_path / "bundle" / "image_tokenizer", "clip=CLIP": f"clip={tmp_path}/input/clip.pt"}
    wrong = {}
    for name, words in {"good": good_input(tmp_path / "input"), **cases}.items():
        words = [str(stands_for.get(word, word)) for word in words]
        words += [word for side in ("--real", "--generated") if side not in words for word in (side, str(good))]
        out = tmp_path / "out.json"
        code = main(["eval", "local", "--frames", "4", "--side", "16", "--no-distances", "--json", str(out), *words])
        lines = capsys.readouterr().err.splitlines()
        if name == "good":
            assert code == 0 and out.is_file(), lines
            numbers = json.loads(out.read_text(encoding="utf-8"))["numbers"]
            assert numbers.keys() >= {"fvd", "is", "clipsim", "reconstructed_lpips_vgg", "token_nll"}
            out.unlink()
            continue
        errors = [line for line in lines if line.startswith("cogvideo: error")]
        if code != 2 or len(errors) != 1 or lines[-1:] != errors or out.exists():
            wrong[name] = (code, lines[-3:], out.exists())
            out.unlink(missing_ok=True)
    assert not wrong, json.dumps(wrong, indent=1)
