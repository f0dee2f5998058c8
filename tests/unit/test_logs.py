"""Only rank 0 logs; off a terminal a progress bar is plain lines; errors are one line that says what to do."""

import errno
import logging
import os
import re
from pathlib import Path

import pytest

from cogvideo.logs import get_logger, one_line, progress


@pytest.fixture(autouse=True)
def first_rank_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    yield
    monkeypatch.undo()
    get_logger()


def test_rank_0_logs_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    get_logger("cogvideo.a")
    get_logger("cogvideo.b").info("step %d", 3)
    get_logger("cogvideo.a").warning("low disk")
    out, err = capsys.readouterr()
    assert out == "" and err == "step 3\nwarning: low disk\n"


def test_other_ranks_log_only_errors(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    log = get_logger("cogvideo.a")
    log.info("step")
    log.error("lost")
    assert list(progress(range(3), "work")) == [0, 1, 2]
    assert capsys.readouterr().err == "[rank 2] error: lost\n"


def test_root_handlers_do_not_repeat_lines(capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        get_logger("cogvideo.a").info("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().err == "once\n"


def test_off_a_terminal_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(4, "train", "step", seconds_between_lines=0) as bar:
        bar.set_postfix_str("loss 1.5", refresh=False)
        for _ in range(4):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("train: 0/4 step") and lines[-1].startswith("train: 4/4 step")
    assert "loss 1.5" in lines[-1] and all("\r" not in line for line in lines)


def test_infrequent_lines_still_show_start_and_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert sum(progress(range(1000), "count", seconds_between_lines=60)) == 499_500
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[1] for line in lines] == ["0/1000", "1000/1000"]


def test_progress_can_start_in_the_middle(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(10, "resumed", initial=7) as bar:
        bar.update(3)
    assert "10/10" in capsys.readouterr().err


def test_an_error_of_the_disk_names_file_and_disk_and_what_to_do(tmp_path: Path) -> None:
    line = one_line(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "gone" / "x.npy")))
    assert re.fullmatch(
        rf"{tmp_path}/gone/x\.npy: No space left on device \(the disk at /.* has [\d,]+ MB free\); free .*", line
    )
    assert "mounted for writing" in one_line(OSError(errno.EROFS, "Read-only file system", "x"))
