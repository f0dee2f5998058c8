"""Who takes which clips. Meeting is tested end to end, in tests/integration/test_sample_processes.py."""

import pytest

from cogvideo.distributed import Processes


def test_every_item_has_one_process() -> None:
    parts = [list(Processes(rank, 3).share(8)) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert list(Processes(2, 3).share(1)) == []


@pytest.mark.parametrize(
    ("rank", "count", "said"),
    [
        ("2", "2", "RANK=2 WORLD_SIZE=2 do not name a process"),
        ("-1", "2", "do not name a process"),
        ("x", "1", "do not name a process"),
        ("0", "2", "WORLD_SIZE=2, but MASTER_ADDR= MASTER_PORT=0; start with"),
    ],
)
def test_a_broken_environment(monkeypatch: pytest.MonkeyPatch, rank: str, count: str, said: str) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(ValueError, match=said):
        Processes.from_environment()


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes.from_environment()
    assert alone == Processes(0, 1) and alone.first_does(lambda: True)
    alone.wait_for_all()
    alone.part()
