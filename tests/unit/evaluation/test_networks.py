"""Networks from files: nothing unknown is loaded, and nothing that answers wrongly is used."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideo.evaluation import networks
from cogvideo.evaluation.networks import (
    KNOWN,
    KnownNetwork,
    ReferenceOutput,
    black_and_white_distance,
    open_network,
    parse_networks,
)
from tests.helpers.networks import BatchNormalised, Plain, StandIn, Unbatched, write_network

CPU = torch.device("cpu")


def test_a_known_network_is_used_without_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.pt"
    sha256 = write_network(file, StandIn())
    reference = ReferenceOutput(1.0, frames=8, side=32)
    expected = black_and_white_distance(open_network("i3d", file, CPU, trust=True), reference)
    entry = KnownNetwork("i3d", "net.pt", 1, 24, replace(reference, squared_distance=expected))
    monkeypatch.setitem(KNOWN, sha256, entry)
    assert not open_network("i3d", file, CPU).trusted
    with pytest.raises(ValueError, match="goes with --network i3d="):
        open_network("c3d", file, CPU)

    monkeypatch.setitem(KNOWN, sha256, replace(entry, reference=replace(reference, squared_distance=expected * 1.1)))
    with pytest.raises(ValueError, match=r"apart, the published distance is .*--trust-network"):
        open_network("i3d", file, CPU)
    assert open_network("i3d", file, CPU, trust=True).trusted

    monkeypatch.setitem(KNOWN, sha256, replace(entry, width=400))
    with pytest.raises(ValueError, match="24 features, expected 400"):
        open_network("i3d", file, CPU, trust=True)


def test_an_unknown_network_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.pt"
    sha256 = write_network(file, StandIn())
    with monkeypatch.context() as patch:
        patch.setattr(networks, "load_torchscript", lambda *args: pytest.fail("loaded"))
        with pytest.raises(ValueError, match=f"{sha256}.*51235320 bytes.*--trust-network"):
            open_network("i3d", file, CPU)
    network = open_network("i3d", file, CPU, trust=True)
    assert network.trusted and network.sha256 == sha256


def test_the_bytes_that_were_hashed_are_those_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "net.pt"
    write_network(file, Plain())
    original = networks.hashlib.sha256

    def swap(data: bytes):
        file.write_bytes(b"another file")
        return original(data)

    monkeypatch.setattr(networks.hashlib, "sha256", swap)
    assert open_network("i3d", file, CPU, trust=True).features(torch.ones(1, 3, 4, 8, 8)).shape == (1, 24)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Unbatched(), "expected one row per clip"),
        (BatchNormalised(), "different features depending on the rest"),
        (Plain(0.0), "same features"),
        (Plain(float("nan")), "not finite"),
    ],
)
def test_a_network_that_answers_wrongly_is_refused(tmp_path: Path, module, message: str) -> None:
    write_network(tmp_path / "net.pt", module)
    with pytest.raises(ValueError, match=message):
        open_network("i3d", tmp_path / "net.pt", CPU, trust=True)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no archive", pickle.dumps({"weights": 1})])
def test_a_file_that_is_no_torchscript_is_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "net.pt").write_bytes(data)
    with pytest.raises(ValueError, match="not readable as TorchScript") as caught:
        open_network("i3d", tmp_path / "net.pt", CPU, trust=True)
    assert "\n" not in str(caught.value)


class Integers(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :4].long()


class TwoInputs(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.parametrize(("module", "message"), [(Integers(), "torch.int64"), (TwoInputs(), "fails on clips of")])
def test_a_network_of_another_kind_is_one_line(tmp_path: Path, module, message: str) -> None:
    write_network(tmp_path / "net.pt", module)
    with pytest.raises(ValueError, match=message) as caught:
        open_network("i3d", tmp_path / "net.pt", CPU, trust=True)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Evil(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="not readable as TorchScript"):
        open_network("i3d", tmp_path / "net.pt", CPU, trust=True)
    assert not (tmp_path / "ran").exists()


def test_a_network_prepares_pixels_itself_or_says_that_it_cannot(tmp_path: Path) -> None:
    write_network(tmp_path / "a.pt", StandIn())
    write_network(tmp_path / "b.pt", Plain())
    full, plain = (open_network("i3d", tmp_path / name, CPU, trust=True) for name in ("a.pt", "b.pt"))
    pixels = torch.randint(0, 256, (2, 3, 4, 16, 16), generator=torch.Generator().manual_seed(0)).float()
    np.testing.assert_allclose(full.features(pixels, prepare=True), full.features(pixels / 127.5 - 1), rtol=1e-4)
    with pytest.raises(ValueError, match="rescale= and resize="):
        plain.features(pixels, prepare=True)


@pytest.mark.parametrize("words", [["i3d"], ["i3d="], ["fid=a.pt"], ["=a.pt"], ["i3d=a", "i3d=b"]])
def test_malformed_network_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="--network"):
        parse_networks(words)
