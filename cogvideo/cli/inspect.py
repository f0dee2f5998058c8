"""Show what a model or checkpoint holds, its attention masks, and the memory and time that it needs.

    cogvideo inspect --config configs/model/cogvideo_stage1.yaml gpu=a100-80 count=8
    cogvideo inspect --config configs/model/cogvideo_stage2.yaml --mask 4
    cogvideo inspect --checkpoint models/stage1

Keys: those of the config file; gpu=NAME, the GPU to estimate for (default: this machine is measured); count=N, how many
of them (short for training.count=); training.micro_batch, training.zero_stage, training.frozen_trunk,
training.recompute and training.trunk_weights.
"""

import argparse
from pathlib import Path

from cogvideo.cli._common import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="inspect a checkpoint folder")
    parser.add_argument("--no-verify", action="store_true", help="with --checkpoint: skip the hash check")
    parser.add_argument("--values", action="store_true", help="with --checkpoint: read all weights, report NaN and inf")
    parser.add_argument("--mask", type=int, metavar="SIDE", help="draw whole masks, for frames of SIDE x SIDE tokens")
    parser.add_argument("--no-plan", action="store_true", help="omit memory and time estimates")


def run(args: argparse.Namespace) -> None:
    from dataclasses import dataclass, field

    from cogvideo.checkpoint.format import load_checkpoint
    from cogvideo.checkpoint.inspection import describe_files, describe_parameters, describe_tensors
    from cogvideo.checkpoint.load import stored_config
    from cogvideo.config import load_config
    from cogvideo.model.config import ModelConfig
    from cogvideo.planning.budgets import TrainingSettings
    from cogvideo.planning.machines import MACHINES, measure_machine
    from cogvideo.planning.report import describe_costs, describe_layout, draw_masks
    from cogvideo.superres.config import SuperresConfig

    @dataclass(frozen=True)
    class Inspection:
        model: ModelConfig | None = None
        superres: SuperresConfig | None = None
        gpu: str | None = None
        training: TrainingSettings = field(default_factory=TrainingSettings)

    overrides = [f"training.{word}" if word.startswith("count=") else word for word in args.overrides]
    settings = load_config(Inspection, args.config, overrides)
    if settings.gpu is not None and settings.gpu not in MACHINES:
        raise ValueError(f"unknown gpu={settings.gpu}; choose one of {', '.join(MACHINES)}, or leave it out")

    checkpoint, config = None, settings.model or settings.superres
    if args.checkpoint is not None:
        checkpoint = load_checkpoint(args.checkpoint, verify=not args.no_verify)
        print(describe_files(checkpoint, verified=not args.no_verify))
        if not {"model", "superres"} & checkpoint.config.keys():
            print(describe_tensors(checkpoint))
            return
        config = stored_config(checkpoint)
    if config is None:
        raise ValueError("nothing to inspect; give --config FILE (see configs/model) or --checkpoint DIR")

    frozen = settings.training.frozen_trunk
    print(describe_parameters(config, checkpoint, frozen_trunk=frozen, values=args.values))
    if not isinstance(config, ModelConfig):
        return
    print(f"\n{describe_layout(config)}\n\n{draw_masks(config, args.mask)}")
    if not args.no_plan:
        machine = MACHINES[settings.gpu] if settings.gpu else measure_machine()
        source = "the vendor's figures" if settings.gpu else "measured"
        print(f"\n{describe_costs(config, machine, settings.training, source)}")
