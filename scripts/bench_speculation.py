"""What guessing ahead saves: a JSON line for each part, with trained weights, on captions or on a video's frames.

    python scripts/bench_speculation.py                         # bundled weights, moving digits
    python scripts/bench_speculation.py --model DIR --caption "a man" --video talk.mp4 --fps 4 rounds=2

Clips are drawn one at a time by both schedules. A video's frames, `--fps` of them a second, are interpolated; without
one the caption's whole clip is made. `tokens_a_forward` is what a guessing forward settles of a clip on average
(sequential decoding's forwards, each of which settles one, over guessing's), `gain` sequential decoding's CPU seconds
over guessing's, the least of `--repeats` each; `equal` that the tokens are the same.
Not a test: nothing here passes or fails.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.rng import sample_keys
from cogvideo.sampling.bundle import load_sample_config
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.inputs import InputClips, InputReader
from cogvideo.sampling.pipeline import Pipeline

DIGITS = ("the red digit 3 moves left slowly", "蓝色的数字5向上快速移动", "the green digit 8 moves down quickly")


class Counted:
    """Counts the forwards of a pipeline's models."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._engines = pipeline.engines.values()

    @property
    def forwards(self) -> int:
        return sum(engine.forward_passes for engine in self._engines)


def parts(
    pipeline: Pipeline, counted: Counted, caption: str, config: SampleConfig, given: InputClips | None
) -> Iterator[tuple[str, int, int, float, Tensor]]:
    """Each part's name, the tokens it drew, its forwards, CPU seconds of this thread, and the clip after it."""
    keys, before = sample_keys(config.seed, [caption], 1), 0
    if given is None:
        stages = pipeline.stages(keys, pipeline.encode_prompts([caption], config), config)
        names = ["first frame", "key frames"]
    else:
        before, names = given.num_frames, []
        prompts = pipeline.encode_interpolation_prompts([caption], config, before)
        stages = pipeline.interpolate(given.tokens, keys, prompts, config)
    names += [f"round {number}" for number in range(1, config.rounds + 1)]
    for name in names:
        forwards, began = counted.forwards, time.thread_time()
        clip = next(stages).tokens
        seconds = time.thread_time() - began
        yield name, (clip.shape[1] - before) * clip.shape[2], counted.forwards - forwards, seconds, clip
        before = clip.shape[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a bundle (default: the bundled weights)")
    parser.add_argument("--caption", action="append", help="may be given more than once")
    parser.add_argument("--video", type=Path, help="interpolate its frames")
    parser.add_argument("--fps", type=float, default=2.0, help="of the video that is given")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("override", nargs="*", metavar="key=value", help="a setting of sampling")
    args = parser.parse_intermixed_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}; expected at least 1")
    if args.video and not args.caption:
        parser.error("the video has no caption; pass --caption")
    torch.set_num_threads(1)  # whose time is then all there is
    try:
        report(args)
    except (ValueError, OSError) as error:
        print(f"bench_speculation: error: {error}", file=sys.stderr)
        return 2
    return 0


def report(args: argparse.Namespace) -> None:
    directory = args.model or BUNDLED_WEIGHTS
    config = load_sample_config(directory, [], args.override)
    pipeline = Pipeline.load(directory, config)
    counted, given = Counted(pipeline), None
    if args.video is not None:
        reader = InputReader(pipeline.image_tokenizer, pipeline.sequential.config.frame_side)
        given = reader.read([args.video], args.fps)
        config = replace(config, seconds=given.seconds)
        if config.rounds < 1:
            raise ValueError("rounds=0 puts no frame between any; give at least 1")
    tokens: dict[str, int] = defaultdict(int)
    forwards: dict[tuple[str, str], int] = defaultdict(int)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    equal = True
    for caption in args.caption or DIGITS:
        made: dict[str, Tensor] = {}
        least: dict[tuple[str, str], float] = {}
        for repeat in range(args.repeats):
            for schedule in ("sequential", "speculative"):
                drawn = parts(pipeline, counted, caption, replace(config, schedule=schedule), given)
                for name, count, calls, took, made[schedule] in drawn:
                    key = name, schedule
                    least[key] = min(took, least.get(key, took))
                    if not repeat:
                        forwards[key] += calls
                        tokens[name] += count if schedule == "speculative" else 0
        for key, took in least.items():
            seconds[key] += took
        equal &= torch.equal(made["sequential"], made["speculative"])
    for name in tokens:
        one, ahead = (name, "sequential"), (name, "speculative")
        line = {"benchmark": "speculation", "part": name, "tokens": tokens[name]}
        line |= {"forwards_sequential": forwards[one], "forwards": forwards[ahead]}
        line |= {"tokens_a_forward": round(forwards[one] / forwards[ahead], 2)}
        line |= {"seconds_sequential": round(seconds[one], 3), "seconds": round(seconds[ahead], 3)}
        print(json.dumps(line | {"gain": round(seconds[one] / seconds[ahead], 2), "equal": equal}))


if __name__ == "__main__":
    sys.exit(main())
