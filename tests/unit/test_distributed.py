"""Ranks and devices. Barriers and broadcasts are tested end to end, in tests/integration/test_sample_processes.py."""

import signal
import socket

import pytest

from cogvideo import distributed
from cogvideo.distributed import ProcessGroup, connecting, open_device


def test_every_item_belongs_to_one_rank() -> None:
    shards = [list(ProcessGroup(rank, 3).shard(8)) for rank in range(3)]
    assert shards == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert list(ProcessGroup(2, 3).shard(1)) == []


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [
        ("2", "2", "RANK=2 WORLD_SIZE=2 is not a valid rank"),
        ("-1", "2", "is not a valid rank"),
        ("x", "1", "is not a valid rank"),
        ("0", "2", "WORLD_SIZE=2, but MASTER_ADDR= MASTER_PORT=0; start with"),
    ],
)
def test_contradictory_launcher_variables_are_refused(
    monkeypatch: pytest.MonkeyPatch, rank: str, size: str, message: str
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(ValueError, match=message):
        ProcessGroup.from_environment()


def test_a_single_process_needs_no_launcher_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = ProcessGroup.from_environment()
    assert alone == ProcessGroup(0, 1) and alone.broadcast_from_rank_0(lambda: True)
    alone.barrier()
    alone.close()


def test_a_taken_port_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in group.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ConnectionError, match=f"MASTER_PORT={port} is taken by another program; choose") as error:
            ProcessGroup.from_environment().barrier()
    assert "\n" not in str(error.value) and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("no-such-host.invalid", "29500", "MASTER_ADDR=no-such-host.invalid cannot be resolved .*; give the name"),
        ("127.0.0.1", "tcp://10.0.0.1:29500", "MASTER_PORT=tcp://10.0.0.1:29500 is not a valid port; choose another"),
        ("127.0.0.1", "65536", "MASTER_PORT=65536 is not a valid port"),
    ],
)
def test_a_bad_address_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str, port: str, message: str) -> None:
    monkeypatch.setattr(distributed, "RESOLVE_SECONDS", 0)
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises((ValueError, ConnectionError), match=message), connecting():
        raise AssertionError("must not be reached")


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "cuda:"])
def test_an_unknown_or_missing_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"device={name}"):
        open_device(name)
