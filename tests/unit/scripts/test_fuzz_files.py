"""scripts/fuzz_files.py damages files of a kind that exists."""

import sys

import pytest

from tests.helpers.scripts import load_script

fuzz_files = load_script("fuzz_files")


def test_an_unknown_kind_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fuzz_files.torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(fuzz_files, "kinds", lambda folder: {"bundle": None, "clips": None})
    monkeypatch.setattr(sys, "argv", ["fuzz_files.py", "--only", "typo"])
    with pytest.raises(SystemExit) as caught:
        fuzz_files.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("--only typo: expected one of bundle, clips\n")
