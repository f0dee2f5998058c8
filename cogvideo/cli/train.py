"""Train a model: the image tokenizer, the trunk, a video stage or super-resolution.

    cogvideo train --config configs/train/tiny_sequential.yaml run_dir=runs/stage1 [key=value ...] [--resume]
    deepspeed --num_accelerators 2 --module cogvideo train --config ...      the same in two processes

Weights start at random, from a trunk or from an earlier run (init.checkpoint). The run folder gets metrics.jsonl,
curves.png, previews/, checkpoints/ to resume from, and export/, which other commands read.
"""

import argparse
from pathlib import Path

from cogvideo.cli._common import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in run_dir, if there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, with every key, and exit")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.config import dump_yaml, load_config
    from cogvideo.logs import rank
    from cogvideo.training.config import TrainConfig
    from cogvideo.training.sizes import sizes_from_data

    config = load_config(TrainConfig, args.config, args.overrides, derive=sizes_from_data)
    if args.dry_run:
        print(dump_yaml(config), end="")
        return

    from cogvideo.training.launch import expand_segments, train, tune_allocator

    expand_segments()
    if config.train.recompute != "nothing":
        tune_allocator()  # before the first tensor exists
    train(config, resume=args.resume)
    if rank() == 0:
        print(_where(config.run_dir), flush=True)


def _where(run_dir: Path) -> str:
    """Where a run's results are, in one line."""
    exports = " and ".join(
        str(path) for path in sorted((run_dir / "export").iterdir()) if path.is_dir() and path.name[0] != "."
    )
    places = [f"model: {exports}"]
    if (run_dir / "previews").is_dir():
        places.append(f"sample sheets: {run_dir / 'previews'}")
    return "; ".join([*places, f"curves: {run_dir / 'curves.png'}"])
