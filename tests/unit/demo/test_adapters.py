"""Whose turn it is: the same adapters together, others in the order of arrival, and nobody waits for who left."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from cogvideo.demo.adapters import AdapterSwitch, Turn, name_adapters
from cogvideo.sampling.adapters import AdapterChoice
from cogvideo.sampling.pipeline import Pipeline


class Recording:
    """Stands in for a pipeline."""

    def __init__(self) -> None:
        self.set: list[dict[str, float]] = []
        self.fails = False

    def add_adapter(self, name: str, folder: Path) -> None:
        pass

    def set_adapters(self, scales: Mapping[str, float]) -> None:
        if self.fails:
            raise ValueError("cannot be merged")
        self.set.append(dict(scales))


@pytest.fixture
def pipeline() -> Recording:
    return Recording()


@pytest.fixture
def switch(pipeline: Recording) -> AdapterSwitch:
    choices = {"a": AdapterChoice(Path("a")), "b": AdapterChoice(Path("b"), 0.5)}
    return AdapterSwitch(cast(Pipeline, pipeline), choices)


def start(turn: Turn) -> Any:
    """Start a job in its turn; returns what ends it."""
    end = threading.Event()
    turn.thread = threading.Thread(target=end.wait)
    turn.thread.start()

    def finish() -> None:
        end.set()
        assert turn.thread is not None
        turn.thread.join()

    return finish


def test_the_same_adapters_run_together_and_others_afterwards(switch: AdapterSwitch, pipeline: Recording) -> None:
    first, same, other = switch.enter(["a"]), switch.enter(["a"]), switch.enter(["b", "a"])
    assert first.has_come() and same.has_come() and pipeline.set == [{"a": 1.0}]
    ends = [start(first), start(same)]
    assert not other.has_come()
    ends[0]()
    assert not other.has_come()
    ends[1]()
    assert other.has_come() and other.has_come() and pipeline.set == [{"a": 1.0}, {"a": 1.0, "b": 0.5}]


def test_those_who_came_earlier_are_not_overtaken(switch: AdapterSwitch) -> None:
    running, waiting, later = switch.enter([]), switch.enter(["b"]), switch.enter([])
    assert running.has_come()
    finish = start(running)
    assert not waiting.has_come() and not later.has_come(), "or visitors without adapters could go on forever"
    finish()
    assert not later.has_come()
    assert waiting.has_come()
    waiting.left = True  # before its job began
    assert later.has_come()


def test_who_leaves_while_waiting_holds_nobody_up(switch: AdapterSwitch) -> None:
    running, waiting, later = switch.enter(None), switch.enter([]), switch.enter(["a", "b"])
    assert running.has_come()
    finish = start(running)
    running.left = True  # the visitor left, but the thread still computes a step
    assert not waiting.has_come()
    waiting.left = True
    assert later.has_come()
    finish()


def test_a_failure_leaves_none_in_effect(switch: AdapterSwitch, pipeline: Recording) -> None:
    pipeline.fails = True
    turn = switch.enter(["a"])
    with pytest.raises(ValueError, match="cannot be merged"):
        turn.has_come()
    turn.left = True
    plain = switch.enter([])
    assert plain.has_come() and pipeline.set == []
    plain.left, pipeline.fails = True, False
    assert switch.enter(["a"]).has_come() and pipeline.set == [{"a": 1.0}]


def test_names_are_short_and_differ() -> None:
    paths = ["runs/mine/export/adapter", "other/mine/export/adapter", "adapter", "x/lora"]
    choices = [AdapterChoice(Path(path)) for path in paths] + [AdapterChoice(Path("x/lora"), 0.5)]
    assert list(name_adapters(choices)) == ["mine", "mine-2", "adapter", "lora", "lora (0.5)"]


def test_names_of_the_hubs_adapters_lack_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Path("/hub/models--someone--clips/snapshots", 40 * "a")
    choices = [AdapterChoice(path) for path in (snapshot, snapshot / "export/adapter", snapshot / "night")]
    assert list(name_adapters(choices)) == ["clips", "clips-2", "night"]
    (tmp_path / "mine@home").mkdir()
    monkeypatch.chdir(tmp_path / "mine@home")
    assert list(name_adapters([AdapterChoice(Path())])) == ["mine@home"]
