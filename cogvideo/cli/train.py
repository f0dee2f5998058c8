"""Train any of the models, from random weights, a trunk or an earlier run.

    cogvideo train --config configs/train/tiny_sequential.yaml run_dir=runs/stage1 [key=value ...] [--resume]
    deepspeed --num_accelerators 2 --module cogvideo train --config ...      the same, in two processes

The run folder gets metrics.jsonl, curves.png, previews/, checkpoints/ to resume from, and export/, which other
commands read.
"""

import argparse

from cogvideo.cli._common import add_config_arguments, config_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in run_dir, if any")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config, which shows every key there is, and stop"
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.config import dump_yaml
    from cogvideo.training.config import TrainConfig

    config = config_from(TrainConfig, args)
    if args.dry_run:
        print(dump_yaml(config), end="")
        return

    from cogvideo.training.memory import return_freed_memory

    if config.train.recompute != "nothing":
        return_freed_memory()  # before any tensor is made, the preview's tokenizer too

    from cogvideo.training.launch import train
    from cogvideo.training.previews import SheetWriter

    train(config, resume=args.resume, preview=SheetWriter(config.data.image_tokenizer))
