"""scripts/check_gpu.py: a part of its list without a GPU; a check that fails, hangs or cannot run ends no other."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.scripts import ROOT, load_script

SCRIPT = ROOT / "scripts" / "check_gpu.py"


@pytest.fixture
def script() -> ModuleType:
    return load_script("check_gpu")


def run_main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check_gpu.py", *words])
    return script.main()


def python(code: str) -> str:
    return f"{{python}} -c '{code}'"


def test_a_check_that_fails_or_crashes_ends_no_other(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = 'print("noise"); print("{{\\"step_s_median\\": 0.25, \\"mfu\\": 0.4, \\"max_logit_error\\": 2e-5}}")'
    checks = (
        script.Check("fails", "an error", 60, "", on_cpu=python('raise SystemExit("out of memory")')),
        script.Check("crashes", "a signal", 60, "", on_cpu=python("import os; os.abort()")),
        script.Check("reports", "figures", 60, "", on_cpu=python(report)),
        script.Check("device", "a GPU's alone", 60, ""),
    )
    monkeypatch.setattr(script, "CHECKS", checks)
    assert run_main(script, monkeypatch, "--fake", "--out", str(tmp_path)) == 1
    written = {check["name"]: check for check in json.loads((tmp_path / "check_gpu.json").read_text())["checks"]}
    assert {name: check["status"] for name, check in written.items()} == {
        "fails": "failed",
        "crashes": "failed",
        "reports": "passed on the CPU",
        "device": "needs a GPU",
    }
    assert written["fails"]["message"] == "out of memory"
    assert written["reports"]["figures"]["mfu"] == 0.4
    table = (tmp_path / "check_gpu.md").read_text()
    assert table == capsys.readouterr().out
    (line,) = (line for line in table.splitlines() if line.startswith("| reports"))
    assert "| 250.0 |" in line and "| 0.4 |" in line and "| 2.0e-05 |" in line


@pytest.mark.parametrize(
    ("seconds", "minutes", "statuses", "code"),
    [(4, "10", ["timed out", "passed"], 1), (60, "0.1", ["cut off", "not started"], 0)],
)
def test_a_check_that_hangs_is_ended_and_fails_if_the_limit_was_its_own(
    seconds: int,
    minutes: str,
    statuses: list[str],
    code: int,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pid = tmp_path / "pid"
    hanging = f'import os, time; open("{pid}", "w").write(str(os.getpid())); print(1, flush=True); time.sleep(600)'
    checks = (script.Check("hangs", "", seconds, python(hanging)), script.Check("next", "", 60, python("print(1)")))
    monkeypatch.setattr(script, "CHECKS", checks)
    monkeypatch.setattr(script, "machine", lambda: {"gpu": "one"})
    assert run_main(script, monkeypatch, "--minutes", minutes, "--out", str(tmp_path)) == code
    written = json.loads((tmp_path / "check_gpu.json").read_text())["checks"]
    assert [check["status"] for check in written] == statuses
    time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_tiny_check_has_no_limit_of_its_own(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    check = script.Check("slow", "", 1, "", on_cpu=python("import time; time.sleep(600)"))
    monkeypatch.setattr(script, "CHECKS", (check,))
    assert run_main(script, monkeypatch, "--fake", "--minutes", "0.1", "--out", str(tmp_path)) == 0
    (written,) = json.loads((tmp_path / "check_gpu.json").read_text())["checks"]
    assert written["status"] == "cut off"


def test_checks_that_do_not_fit_are_not_started(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "CHECKS", (script.Check("late", "", 60, "", on_cpu=python("raise SystemExit(1)")),))
    assert run_main(script, monkeypatch, "--fake", "--minutes", "0", "--out", str(tmp_path)) == 0
    (check,) = json.loads((tmp_path / "check_gpu.json").read_text())["checks"]
    assert check["status"] == "not started"


def test_a_problem_on_fake_tensors_is_a_failure(script: ModuleType) -> None:
    check = script.Check("fake", "", 60, "")
    code = 'print("{\\"name\\": \\"x\\", \\"problem\\": \\"waits for the GPU\\"}")'
    result = script.run(check, "fake tensors", [sys.executable, "-c", code], 60)
    assert result.status == "failed"


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ([{"error": 0.0}], "0.0e+00"),
        ([{"loss_error": 0}, {"max_logit_error": 1e-6}], "1.0e-06"),
        ([{"error": float("nan")}, {"error": 1.0}], "nan"),
        ([{"error": "KeyError: x"}], ""),
        ([{"mfu": 0.4}], ""),
    ],
)
def test_the_largest_error_is_shown_and_none_is_nothing(
    script: ModuleType, lines: list[dict[str, Any]], shown: str
) -> None:
    result = script.Result("x", "", "passed", figures={"lines": lines} if len(lines) > 1 else lines[0])
    assert script.row(result)["error"] == shown


class Parsed(Exception):
    """Ends a script once its arguments are parsed."""


def parse(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a script's own parser makes of its arguments; the script goes no further."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser, *given: Any) -> None:
        raise Parsed(parse_args(parser, *given))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    with pytest.raises(Parsed) as parsed:
        load_script(script).main()
    return parsed.value.args[0]


COMMANDS = [
    pytest.param(command, id=f"{check.name}-{where}")
    for check in load_script("check_gpu").CHECKS
    for where, command in (("gpu", check.command), ("cpu", check.on_cpu))
    if command is not None
]


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_accept_their_arguments(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    assert words.pop(0) == "{python}"
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word).exists()
    if words[0] != "-m":
        path = ROOT / words[0].replace("{scripts}", "scripts")
        args = parse(path.stem, words[1:], monkeypatch)
        assert path.stem != "check_gpu_parts" or args.part in load_script("check_gpu_parts").PARTS


def test_checks_on_fake_tensors_exist(script: ModuleType) -> None:
    from tests.helpers.fake_cuda.checks import QUICK, SLOW

    for check in script.CHECKS:
        assert check.on_fake_tensors is None or check.on_fake_tensors in QUICK | SLOW


@pytest.mark.parametrize(
    ("words", "complaint"),
    [(["--only", "nothing"], "--only nothing; choose among packs"), ([], "give --fake to try the list")],
)
def test_wrong_arguments_are_one_line(words: list[str], complaint: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]


def test_a_training_step_at_a_tiny_size(tmp_path: Path) -> None:
    words = [sys.executable, str(SCRIPT), "--fake", "--only", "train_sequential", "--only", "attention_kernels"]
    done = subprocess.run([*words, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    checks = json.loads((tmp_path / "check_gpu.json").read_text())["checks"]
    assert [check["status"] for check in checks] == ["passed on the CPU", "needs a GPU"]
    assert checks[0]["figures"]["step_s_median"] > 0


@pytest.mark.slow
def test_the_list_without_a_gpu(tmp_path: Path) -> None:
    """One check of each kind; test_fake_cuda, test_bench_train and test_check_packs have what the others run."""
    names = ["decode_eager", "launcher", "frozen_int8", "sample_twice", "superres", "attention_kernels"]
    words = [
        sys.executable,
        str(SCRIPT),
        "--fake",
        "--minutes",
        "60",
        "--out",
        str(tmp_path),
        *[word for name in names for word in ("--only", name)],
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "check_gpu.json").read_text())["checks"]
    assert {check["name"]: check["status"] for check in written} == {
        **dict.fromkeys(names[:4], "passed on the CPU"),
        "superres": "passed on fake tensors",
        "attention_kernels": "needs a GPU",
    }
