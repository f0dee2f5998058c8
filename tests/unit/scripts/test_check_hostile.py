"""What measures hostile files sees faults, and every file is one for a reader that exists."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogvideo.media.video import probe_video
from tests.helpers.bombs import bombs
from tests.helpers.readers import readers
from tests.helpers.scripts import load_script

hostile_readers = load_script("hostile_readers")
check_hostile = load_script("check_hostile")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("action", "text", "is_small"),
    [
        (lambda: None, "read", True),
        (lambda: fail(ValueError("damaged\nhere")), "damaged", True),
        (lambda: fail(KeyError("rows")), "KeyError", False),
        (lambda: fail(MemoryError()), "MemoryError", False),
        (lambda: len(bytearray(b"x") * (400 << 20)), str(400 << 20), False),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "the process ended with 9", False),
    ],
)
def test_an_outcome_says_what_happened(tmp_path: Path, action: Callable[[], Any], text: str, is_small: bool) -> None:
    outcome = hostile_readers.measured(action, tmp_path)
    assert outcome.text.startswith(text) and outcome.is_small == is_small, outcome


def test_the_process_that_parses_files_counts(tmp_path: Path) -> None:
    outcome = hostile_readers.measured(lambda: probe_video(tmp_path / "none.mp4"), tmp_path)
    assert outcome.ok and outcome.mb >= 20 and outcome.seconds > 0.02, outcome


def test_rows_fail_where_a_fault_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hostile_readers.wrong_metrics(tmp_path).ok
    monkeypatch.setattr(hostile_readers.MetricsFile, "read", lambda self: [{"step": 1}])
    assert not hostile_readers.wrong_metrics(tmp_path).ok
    monkeypatch.setattr(hostile_readers, "cogvideo", lambda words: 1)
    assert not hostile_readers.odd_videos(tmp_path).ok


def test_every_file_has_a_reader(tmp_path: Path) -> None:
    found = set(readers(tmp_path)) | {"captions-parquet"}  # which needs an extra
    assert {bomb.reader for bomb in bombs()} <= found
    assert len({(bomb.reader, bomb.name) for bomb in bombs()}) == len(bombs())


@pytest.mark.parametrize("name", ["captions-tar/long-name", "npy/claim", "npy/objects", "config-sampling/aliases"])
def test_small_files_with_large_claims_are_refused(tmp_path: Path, name: str) -> None:
    reader, _, kind = name.partition("/")
    outcome = hostile_readers.bomb_outcome(tmp_path, reader, kind)
    assert outcome.is_small and outcome.text != "read", outcome


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rows", "--only", "14"], "expected one of 1, 2, 3"),
        (["--rows", "--only", "1 samples"], "expected one of 1, 2, 3"),
        (["--readers", "--only", "npy/none"], "expected a part of one of captions-json/lists"),
        (["--commands", "--only", "sound"], "expected a part of one of samples.mp4"),
        (["--only", "none.mp4"], "expected a part of one of samples.mp4"),
    ],
)
def test_names_of_nothing_are_errors(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_hostile.py", *words])
    with pytest.raises(SystemExit) as caught:
        check_hostile.main()
    assert caught.value.code == 2 and expected in capsys.readouterr().err


def test_a_row_is_chosen_by_its_whole_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def outcomes(*rows: str) -> Callable[[Path], dict[str, Any]]:
        return lambda place: {row: hostile_readers.Outcome("tried", 1, 0.0, row != "6") for row in rows}

    monkeypatch.setattr(check_hostile, "page_outcome", lambda *_: hostile_readers.Outcome("tried", 1, 0.0, True))
    monkeypatch.setattr(hostile_readers, "two_at_once", outcomes("5", "6"))
    for number, ok, count in (("1", True, 2), ("3", True, 1), ("5", False, 2)):
        monkeypatch.setattr(sys, "argv", ["check_hostile.py", "--rows", "--only", number])
        assert check_hostile.main() == (0 if ok else 1)
        assert capsys.readouterr().out.count("| tried |") + (not ok) == count


@pytest.mark.parametrize(("mb", "seconds", "ok"), [(330, 10.0, True), (331, 1.0, False), (50, 10.1, False)])
def test_the_page_has_limits_of_memory_and_time(
    mb: int, seconds: float, ok: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_hostile.Watch, "peak", mb)
    monkeypatch.setattr(check_hostile.Watch, "seconds", seconds)
    monkeypatch.setattr(check_hostile, "_make_elsewhere", lambda names, folder: None)
    assert check_hostile.page_outcome(tmp_path, "none.mp4").ok == ok
