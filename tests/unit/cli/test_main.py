"""The dispatcher: the commands it lists, fast help, and the exit code and message of each kind of failure."""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from cogvideo.cli import main as main_module
from cogvideo.cli._common import add_config_arguments
from cogvideo.cli.main import COMMANDS, main
from cogvideo.config import split_overrides
from cogvideo.files import atomic_write


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, default_signals: None):
    """Install a `cogvideo toy` whose `run` is the given function."""

    def install(run) -> None:
        module = ModuleType("cogvideo.cli.toy", "A toy.")
        module.add_arguments = add_config_arguments  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "cogvideo.cli.toy", module)
        monkeypatch.setattr(main_module, "_available", lambda: {"toy": "a toy", "train": "train"})

    return install


def fail_with(error: BaseException):
    def run(args: argparse.Namespace) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a=3;\n  expected 4"), 2, "cogvideo: error: a=3; expected 4\n"),
        (ValueError(), 2, "cogvideo: error: ValueError\n"),
        (FileNotFoundError(2, "No such file or directory", "clip.mp4"), 2, "clip.mp4: No such file or directory\n"),
        (PermissionError(13, "Permission denied", "/out"), 2, "cogvideo: error: /out: Permission denied\n"),
        (
            MemoryError(),
            2,
            "cogvideo: error: out of memory (MemoryError); process less at a time, or use a machine with more memory\n",
        ),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            2,
            "more memory\n",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 2, "more memory\n"),
        (RuntimeError("could not execute a primitive"), 2, "more memory\n"),
        (RuntimeError("can't start new thread"), 2, "(ulimit -u, or the container's), or use fewer threads\n"),
        (OSError(12, "Cannot allocate memory"), 2, "more memory\n"),
        (OSError(28, "No space left on device", "/out/a.npy"), 2, "and run the same command again\n"),
        (OSError("odd"), 2, "cogvideo: error: odd\n"),
        (KeyboardInterrupt(), 130, "cogvideo: interrupted\n"),
    ],
)
def test_failures_are_one_line_and_a_code(command, capsys, error: BaseException, code: int, line: str) -> None:
    command(fail_with(error))
    assert main(["toy"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.endswith(line) and err.count("\n") == 1


def swallow() -> None:
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


def convert() -> None:
    try:
        signal.raise_signal(signal.SIGTERM)
    except SystemExit:
        raise ImportError("half imported") from None


@pytest.mark.parametrize(
    ("act", "code"),
    [
        (lambda: signal.raise_signal(signal.SIGINT), 130),
        (lambda: signal.raise_signal(signal.SIGTERM), 143),
        (lambda: signal.raise_signal(signal.SIGHUP), 129),
        (swallow, 130),
        (convert, 143),
    ],
)
def test_an_interrupted_command_never_ends_with_0(command, tmp_path: Path, act: Callable[[], None], code: int) -> None:
    """Whatever becomes of the exception, which cleans up; the caller's handlers come back."""

    def run(args: argparse.Namespace) -> None:
        with atomic_write(tmp_path / "file"):
            act()
            raise OSError("goes on")

    command(run)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert main(["toy"]) == code
    assert [signal.getsignal(number) for number in numbers] == before
    assert not list(tmp_path.iterdir())


def test_an_ignored_signal_stays_ignored(command) -> None:
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        command(lambda args: signal.raise_signal(signal.SIGHUP))
        assert main(["toy"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_full_memory_says_what_to_lower(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogvideo.cli.train.run", fail_with(MemoryError()))
    assert main(["train"]) == 2
    assert "lower train.micro_batch_size" in capsys.readouterr().err


def test_internal_errors_are_not_hidden(command) -> None:
    command(fail_with(AssertionError("broken invariant")))
    with pytest.raises(AssertionError):
        main(["toy"])
    command(fail_with(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError):
        main(["toy"])


def test_the_traceback_is_shown_on_request(command, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    command(fail_with(ValueError("bad")))
    monkeypatch.setenv("COGVIDEO_TRACEBACK", "1")
    assert main(["toy"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("cogvideo: error: bad\n")


def test_words_and_options_mix_in_any_order(command) -> None:
    received = []
    command(lambda args: received.append((args.overrides, [str(file) for file in args.config])))
    assert main(["toy", "a=1", "--config", "x.yaml", "b.c=2", "--config", "y.yaml"]) == 0
    assert main(["toy"]) == 0
    assert received == [(["a=1", "b.c=2"], ["x.yaml", "y.yaml"]), ([], [])]


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_a_launchers_rank_option_is_dropped(command, words: list[str]) -> None:
    received = []
    command(lambda args: received.append(args.overrides))
    assert main([*words, "toy", "a=1"]) == 0
    assert received == [["a=1"]]


def test_an_unknown_command_or_option_is_one_line(command, capsys) -> None:
    command(fail_with(AssertionError("not reached")))
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "cogvideo: error: there is no command 'trian'; did you mean 'train'?\n"
    assert main(["zzz"]) == 2
    assert "choose one of toy, train" in capsys.readouterr().err
    assert main(["toy", "--colour"]) == 2
    err = capsys.readouterr().err
    assert "--colour" in err and "cogvideo toy --help" in err and err.count("\n") == 1


def test_only_commands_that_exist_are_listed(capsys) -> None:
    assert main(["--help"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed == list(main_module._available()) and set(listed) <= set(COMMANDS)


def test_prompts_and_overrides_are_split() -> None:
    prompts, overrides = (
        ["the red digit 3", "x = 3 is a caption", "红色的数字 = 3", "x=3 is one too"],
        ["seed=7", "guidance.scale=2", "a=[1, 2]"],
    )
    assert split_overrides([*overrides, *prompts]) == (prompts, overrides)


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in main_module._available())])
def test_help_needs_nothing_slow_to_import(words: list[str]) -> None:
    code = f"""
import sys
from cogvideo.cli.main import main
try:
    code = main({words!r})
except SystemExit as end:  # argparse leaves this way after --help
    code = end.code
heavy = {{"torch", "deepspeed", "numpy", "av", "matplotlib"}} & set(sys.modules)
sys.exit(f"imported {{heavy}}" if heavy else code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_openmp_spin_count_is_lowered_unless_set(
    command, monkeypatch: pytest.MonkeyPatch, chosen: dict[str, str], spins: str | None
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    received = []
    command(lambda args: received.append(os.environ.get("GOMP_SPINCOUNT")))
    main(["toy"])
    assert received == [spins]


def test_home_and_variables_in_options_that_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand `~` after the `=` of an option, and expands neither inside single quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("UNSET", raising=False)
    parser = main_module.Parser()
    parser.add_argument("--out", type=Path)
    assert parser.parse_args(["--out=~/x"]).out == parser.parse_args(["--out", "${HOME}/x"]).out == tmp_path / "x"
    for word, message in (("$UNSET/x", "variable UNSET is not set"), ("", "the path is empty")):
        with pytest.raises(ValueError, match=f"argument --out: .*{message}"):
            parser.parse_args([f"--out={word}"])
