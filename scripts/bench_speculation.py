"""What speculative decoding saves: one JSON line per stage, with trained weights, on captions or a video's frames.

    python scripts/bench_speculation.py                         # bundled weights, moving digits
    python scripts/bench_speculation.py --model DIR --caption "a man" --video talk.mp4 --fps 4 rounds=2

Clips are sampled one at a time with both schedules. With a video, its frames, `--fps` per second, are interpolated;
without one, whole clips are sampled. `tokens_per_forward` is the mean number of tokens that a speculative forward pass
settles per clip (passes of sequential decoding, which settle one each, over those of speculative decoding); `gain` is
the CPU time of sequential over that of speculative decoding, each the minimum of `--repeats`; `equal` says whether the
tokens are the same. This is not a test: it neither passes nor fails.
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

from cogvideo.cli.main import run_command
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.rng import sample_keys
from cogvideo.sampling.bundle import load_sample_config
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.inputs import InputClips, InputReader
from cogvideo.sampling.pipeline import Pipeline

DIGITS = ("the red digit 3 moves left slowly", "蓝色的数字5向上快速移动", "the green digit 8 moves down quickly")


def forward_passes(pipeline: Pipeline) -> int:
    """Forward passes of all models so far."""
    return sum(engine.forward_passes for engine in pipeline.engines.values())


def measure_stages(
    pipeline: Pipeline, caption: str, config: SampleConfig, given: InputClips | None
) -> Iterator[tuple[str, int, int, float, Tensor]]:
    """For each stage its name, number of tokens, forward passes, CPU seconds of this thread, and the clip after it."""
    keys, num_frames = sample_keys(config.seed, [caption], 1), 0
    if given is None:
        stages = pipeline.stages(keys, pipeline.encode_prompts([caption], config), config)
        names = ["first frame", "key frames"]
    else:
        num_frames, names = given.num_frames, []
        prompts = pipeline.encode_interpolation_prompts([caption], config, num_frames)
        stages = pipeline.interpolate(given.tokens, keys, prompts, config)
    names += [f"round {number}" for number in range(1, config.rounds + 1)]
    for name in names:
        passes, start = forward_passes(pipeline), time.thread_time()
        clip = next(stages).tokens
        seconds = time.thread_time() - start
        new_tokens = (clip.shape[1] - num_frames) * clip.shape[2]
        yield name, new_tokens, forward_passes(pipeline) - passes, seconds, clip
        num_frames = clip.shape[1]


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
    torch.set_num_threads(1)  # so that this thread's CPU time is all of it
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
    given = None
    if args.video is not None:
        reader = InputReader(pipeline.image_tokenizer, pipeline.sequential.config.frame_side)
        given = reader.read([args.video], args.fps)
        config = replace(config, seconds=given.seconds)
        if config.rounds < 1:
            raise ValueError("rounds=0 interpolates nothing; give at least 1")
    tokens: dict[str, int] = defaultdict(int)
    passes: dict[tuple[str, str], int] = defaultdict(int)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    equal = True
    for caption in args.caption or DIGITS:
        clips: dict[str, Tensor] = {}
        fastest: dict[tuple[str, str], float] = {}
        for repeat in range(args.repeats):
            for schedule in ("sequential", "speculative"):
                stages = measure_stages(pipeline, caption, replace(config, schedule=schedule), given)
                for name, new_tokens, stage_passes, stage_seconds, clips[schedule] in stages:
                    key = name, schedule
                    fastest[key] = min(stage_seconds, fastest.get(key, stage_seconds))
                    if not repeat:
                        passes[key] += stage_passes
                        tokens[name] += new_tokens if schedule == "speculative" else 0
        for key, stage_seconds in fastest.items():
            seconds[key] += stage_seconds
        equal &= torch.equal(clips["sequential"], clips["speculative"])
    for name in tokens:
        sequential, speculative = (name, "sequential"), (name, "speculative")
        line = {
            "benchmark": "speculation",
            "part": name,
            "tokens": tokens[name],
            "forwards_sequential": passes[sequential],
            "forwards": passes[speculative],
            "tokens_per_forward": round(passes[sequential] / passes[speculative], 2),
            "seconds_sequential": round(seconds[sequential], 3),
            "seconds": round(seconds[speculative], 3),
            "gain": round(seconds[sequential] / seconds[speculative], 2),
            "equal": equal,
        }
        print(json.dumps(line))


if __name__ == "__main__":
    sys.exit(run_command(main, "bench_speculation"))
