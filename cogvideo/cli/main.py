"""The `cogvideo` command: find the subcommand, run it, and turn bad input into one line and exit code 2.

An interrupted command exits with 128 + the signal's number, as shells expect.

A subcommand is a file in this folder with `add_arguments(parser)` and `run(args) -> int | None`; its docstring is its
help text. It is imported only when it is used, and imports torch only inside `run`, so that `--help` is fast.
"""

import argparse
import contextlib
import difflib
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from cogvideo import __version__
from cogvideo.interrupts import signals_as_exceptions
from cogvideo.logs import is_exhausted, one_line

COMMANDS = {
    "digits": "write the built-in moving digits as videos and captions",
    "worlds": "write a simulated world (bodies that roll, fall, collide) as videos and captions",
    "pretrain": "train everything on captioned videos, from tokenizers to a bundle",
    "finetune": "finetune a bundle of weights on captioned videos",
    "prepare": "turn videos and captions into token shards at several frame rates",
    "vocabulary": "train a text tokenizer on captions",
    "extend": "copy a bundle for longer clips or larger frames",
    "train": "train a model, in one process or in many with the deepspeed launcher",
    "runs": "compare training runs: settings, results, curves",
    "merge": "add finetuned adapters to a model's weights",
    "bundle": "put trained models into one folder to sample from",
    "push": "upload weights to the Hugging Face hub",
    "sample": "generate videos from captions",
    "interpolate": "generate frames between those of a clip",
    "upsample": "raise the resolution of a clip",
    "eval": "measure the quality of generated clips",
    "score": "compute the likelihood of clips, token by token",
    "study": "compare systems by human votes on a blind page",
    "check": "check that data, tokenizers, training and sampling work together",
    "convert": "convert published checkpoints to ours and back",
    "inspect": "show a model's or checkpoint's parameters, memory and time",
    "demo": "serve a web page to generate clips",
}
INTERRUPTED = 128 + int(signal.SIGINT)
"""The exit code after Ctrl-C."""

LESS_AT_ONCE = "process less at a time"
MEMORY_ADVICE = {
    "prepare": "lower encode_batch, workers or max_video_mib",
    "train": "lower train.micro_batch_size, or set train.recompute=layer",
    "sample": "lower clips_at_once or rounds",
    "interpolate": "lower clips_at_once or rounds",
    "upsample": "lower frames_at_once",
    "eval": "lower clips_at_once, --batch or --num-prompts",
    "score": "lower --batch",
    "check": "lower --clips",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return the exit code."""
    _shorten_openmp_spinning()
    words = list(sys.argv[1:] if argv is None else argv)
    words = _drop_launcher_options(words)
    advice = MEMORY_ADVICE.get(words[0] if words else "", LESS_AT_ONCE)
    with _outcome("cogvideo", advice) as outcome:
        command = _parse(words)
        outcome.code = command() or 0
    code = outcome.code
    if argv is None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python ignores a KeyboardInterrupt while it shuts down
    return code


def run_command(work: Callable[[], int | None], name: str = "cogvideo", *, memory_advice: str = LESS_AT_ONCE) -> int:
    """Run a command's work and return its exit code; an error is printed as one line that begins with `name`.

    `memory_advice`: the advice to print when memory runs out.

    A signal ends the work with an exception, so that temporary files are removed. The exit code is then 128 + the
    signal's number, even if a library catches that exception or turns it into another one.
    """
    with _outcome(name, memory_advice) as outcome:
        outcome.code = work() or 0
    return outcome.code


@dataclass
class Outcome:
    """The exit code of a command."""

    code: int = 0


@contextlib.contextmanager
def _outcome(name: str, memory_advice: str) -> Iterator[Outcome]:
    """Like `run_command`, for the body of a `with` statement, which sets the exit code unless it fails."""
    outcome = Outcome()
    with signals_as_exceptions() as received:
        try:
            yield outcome
        except KeyboardInterrupt:
            outcome.code = INTERRUPTED
        except SystemExit as end:
            if not received and not (isinstance(end.code, int) and end.code > 128):
                raise
            outcome.code = end.code if isinstance(end.code, int) else 1
        except BrokenPipeError:  # `cogvideo inspect ... | head`; without this Python fails again when it flushes stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            outcome.code = 1
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_exhausted(error) and not received:
                raise
            if os.environ.get("COGVIDEO_TRACEBACK") == "1":
                traceback.print_exc()
            outcome.code = 2
            if not received:
                print(f"{name}: error: {one_line(error, memory_advice)}", file=sys.stderr)
        except Exception:
            if not received:
                raise
            outcome.code = 1
    outcome.code = 128 + received[0] if received else outcome.code
    if outcome.code == INTERRUPTED:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(f"{name}: interrupted", file=sys.stderr)


def _parse(words: list[str]) -> Callable[[], int | None]:
    """The command that a command line asks for, ready to run."""
    if not words or words[0] in ("-h", "--help"):
        return partial(print, _overview())
    if words[0] == "--version":
        return partial(print, f"cogvideo {__version__}")
    name, commands = words[0], _available()
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(commands)}"
        raise ValueError(f"there is no command '{name}'; {hint}")
    module = importlib.import_module(f"cogvideo.cli.{name}")
    parser = Parser(
        prog=f"cogvideo {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    from cogvideo.cli._common import fetch_weights  # takes a moment to import, and the overview does not need it

    module.add_arguments(parser)
    # intermixed: options and key=value words in any order, as in `train a=1 --config FILE b=2`
    args = parser.parse_intermixed_args(words[1:])
    fetch_weights(parser, args)
    return partial(module.run, args)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all other errors, and which expands `~` and `$NAME` in paths.

    A shell does not expand the `~` in `--out=~/x`, and expands neither inside single quotes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", Path, _local_path)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _local_path(text: str) -> Path:
    from cogvideo.cli._common import local_path

    return local_path(text)


def _shorten_openmp_spinning() -> None:
    """Make waiting OpenMP threads sleep after spinning for microseconds; effective only before torch is imported.

    By default they spin for milliseconds. If another program keeps one of two cores busy, a decoding step, which waits
    forty times, then takes forty times as long. Settings in the environment take precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _available() -> dict[str, str]:
    return {name: text for name, text in COMMANDS.items() if find_spec(f"cogvideo.cli.{name}")}


def _overview() -> str:
    lines = [f"  {name:<12} {text}" for name, text in _available().items()]
    return "\n".join(
        [
            "usage: cogvideo COMMAND ... (see `cogvideo COMMAND --help`; also `python -m cogvideo`)",
            "",
            *lines,
            "",
            "Bad input gives one line and exit code 2; COGVIDEO_TRACEBACK=1 adds the traceback. An interrupted command",
            "ends with 130 (Ctrl-C), 143 (SIGTERM) or 129 (SIGHUP). Also: --version",
        ]
    )


def _drop_launcher_options(words: list[str]) -> list[str]:
    """Remove the `--local_rank=N` that launchers put before the subcommand; the environment has the rank too."""
    while words and re.fullmatch(r"--local[_-]rank(=\d+)?", words[0]):
        words = words[1:] if "=" in words[0] else words[2:]
    return words
