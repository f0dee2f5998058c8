"""The conversation of `cogvideo sample --interactive`. Not a command.

Each line of standard input is a prompt, or settings for those after it (`seed=8 rounds=1`). Models stay loaded. The
clips of a prompt get a numbered folder. What is wrong with a line is said in a line, and the next one is read.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cogvideo.cli.common import split_overrides
from cogvideo.cli.making import make

if TYPE_CHECKING:
    from cogvideo.sampling.pipeline import Pipeline


def converse(args: argparse.Namespace, pipeline: "Pipeline", overrides: list[str]) -> None:
    """Answer lines until there are no more. Raises: ValueError, OSError if it cannot begin."""
    from cogvideo.cli.sample import clip_job, given_frames
    from cogvideo.files import safe_name
    from cogvideo.sampling.bundle import DEFAULT_DIRECTORY, bundle_sample_config
    from cogvideo.sampling.processes import Processes
    from cogvideo.sampling.results import claim_folder

    directory = args.model or DEFAULT_DIRECTORY
    config = bundle_sample_config(directory, args.config, overrides)
    given = given_frames(args, pipeline, config)
    claim_folder(args.out, args.overwrite)
    made: list[str] = []
    for line in _lines():
        try:
            prompt = _decode(line).strip()
            words, settings = split_overrides(prompt.split())
            if settings and not words:
                changed = bundle_sample_config(directory, args.config, [*overrides, *settings])
                if changed.weights != config.weights:
                    raise ValueError("weights= is chosen at the start: the models are loaded already")
                given = given_frames(args, pipeline, changed)
                config, overrides = changed, [*overrides, *settings]
            elif prompt:
                job = clip_job(pipeline, config, [*made, prompt], given, earlier=len(made))
                make(args, job, args.out / f"{len(made):03d}-{safe_name(prompt)}", Processes())
                made.append(prompt)
        except BrokenPipeError:  # nobody listens any more
            raise
        except (ValueError, OSError) as error:
            print(f"cogvideo: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("this line is not UTF-8 text; type it again") from None


def _lines() -> Iterator[bytes]:
    """Lines of standard input, asked for with a sign where someone is typing them."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("prompt> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        yield line
