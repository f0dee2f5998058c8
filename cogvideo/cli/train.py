"""Train a model: the image tokenizer, the trunk, a video stage or super-resolution.

    cogvideo train --config configs/train/tiny_sequential.yaml run_dir=runs/stage1 [key=value ...] [--resume]
    deepspeed --num_accelerators 2 --module cogvideo train --config ...      the same in two processes

Weights start at random, from a trunk or from an earlier run (init.checkpoint). The run folder gets metrics.jsonl,
curves.png, previews/, checkpoints/ to resume from, and export/, which other commands read.
"""

import argparse

from cogvideo.cli._common import add_config_arguments, config_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in run_dir, if there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, with every key, and exit")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.config import dump_yaml
    from cogvideo.training.config import TrainConfig

    config = config_from(TrainConfig, args)
    if args.dry_run:
        print(dump_yaml(config), end="")
        return

    from cogvideo.training.launch import expand_segments, train, tune_allocator

    expand_segments()
    if config.train.recompute != "nothing":
        tune_allocator()  # before the first tensor exists
    train(config, resume=args.resume)
