"""The `cogvideo` command: finds the subcommand, runs it, and turns bad input into one line and exit code 2.

A subcommand is a file beside this one with `add_arguments(parser)` and `run(args) -> int | None`; its docstring is its
help. It is imported only when asked for, and imports torch only inside `run`, so that `--help` answers at once.
"""

import argparse
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

from cogvideo import __version__
from cogvideo.logs import one_line

COMMANDS = {
    "digits": "write the embedded moving digits as videos and captions",
    "prepare": "videos and captions -> token shards at several frame rates",
    "vocabulary": "learn a text tokenizer from captions",
    "train": "train any of the models: one process, or many under the deepspeed launcher",
    "bundle": "trained parts -> one folder to sample from",
    "sample": "captions -> videos",
    "interpolate": "a clip's tokens or a video -> more frames between its own",
    "upsample": "a clip's tokens or a video -> higher resolution",
    "eval": "measure a model's clips",
    "score": "the likelihood of given clips, token by token",
    "convert": "published checkpoints <-> ours",
    "inspect": "what a model or checkpoint holds, and what it needs to run",
    "demo": "the web page",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    _let_waiting_threads_sleep()
    try:
        return _dispatch(_drop_launcher_words(list(sys.argv[1:] if argv is None else argv)))
    except KeyboardInterrupt:
        print("cogvideo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `cogvideo inspect ... | head`; Python would complain again when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get("COGVIDEO_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"cogvideo: error: {one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"cogvideo {__version__}")
        return 0
    name, commands = words[0], _available()
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose one of {', '.join(commands)}"
        raise ValueError(f"there is no command '{name}'; {hint}")
    module = importlib.import_module(f"cogvideo.cli.{name}")
    parser = _Parser(
        prog=f"cogvideo {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    # Intermixed, so that `train a=1 --config FILE b=2` reads as it looks.
    return module.run(parser.parse_intermixed_args(words[1:])) or 0


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see `{self.prog} --help`)")


def _let_waiting_threads_sleep() -> None:
    """Before torch is imported: OpenMP's threads wait for each other some microseconds awake, then asleep.

    By default it is milliseconds awake; where another program has one of two cores, a step of decoding, which waits
    forty times, then takes forty times as long. Whoever has chosen for themselves is left alone.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def _available() -> dict[str, str]:
    return {name: text for name, text in COMMANDS.items() if find_spec(f"cogvideo.cli.{name}")}


def _overview() -> str:
    lines = [f"  {name:<12} {text}" for name, text in _available().items()]
    return "\n".join(
        [
            "usage: cogvideo COMMAND ... (`cogvideo COMMAND --help` tells more; also `python -m cogvideo`)",
            "",
            *lines,
            "",
            "Bad input gives one line and exit code 2; COGVIDEO_TRACEBACK=1 shows where it arose. Also: --version",
        ]
    )


def _drop_launcher_words(words: list[str]) -> list[str]:
    """Without the `--local_rank=N` that launchers put before the subcommand (the rank is in the environment too)."""
    while words and re.fullmatch(r"--local[_-]rank(=\d+)?", words[0]):
        words = words[1:] if "=" in words[0] else words[2:]
    return words
