"""Show the parameters of a model or checkpoint, its attention masks, and the memory and time that it needs.

    cogvideo inspect --config configs/model/cogvideo_stage1.yaml gpu=a100-80 count=8
    cogvideo inspect --config configs/train/paper_stage1.yaml --config configs/deepspeed/1x24gb.yaml
    cogvideo inspect --config configs/train/paper_stage1.yaml gpu=h100-80 count=8 --suggest
    cogvideo inspect --config configs/model/cogvideo_stage2.yaml --mask 4
    cogvideo inspect --checkpoint models/stage1

Keys: those of the config files; gpu=NAME, the GPU to estimate for (default: that of the machine file, or this machine,
measured); count=N, the number of GPUs. Config files of `cogvideo train` are read as `cogvideo train` reads them. With
files of configs/model alone, set how to train by training.micro_batch, training.zero_stage, training.frozen_trunk, etc.
"""

import argparse
from typing import Any

from cogvideo.cli._common import add_config_arguments, weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--checkpoint", type=weights, metavar="DIR", help="inspect a checkpoint folder")
    parser.add_argument("--no-verify", action="store_true", help="with --checkpoint: skip the hash check")
    parser.add_argument("--values", action="store_true", help="with --checkpoint: read all weights, report NaN and inf")
    parser.add_argument("--mask", type=int, metavar="SIDE", help="draw whole masks, for frames of SIDE x SIDE tokens")
    parser.add_argument("--no-plan", action="store_true", help="omit memory and time estimates")
    parser.add_argument("--suggest", action="store_true", help="print the fastest settings that fit the machine")


def run(args: argparse.Namespace) -> None:
    import dataclasses

    from cogvideo.checkpoint.format import load_checkpoint
    from cogvideo.checkpoint.inspection import describe_files, describe_parameters, describe_tensors
    from cogvideo.checkpoint.load import stored_config
    from cogvideo.config import load_config
    from cogvideo.model.config import ModelConfig
    from cogvideo.planning.machines import MACHINES, measure_machine
    from cogvideo.planning.report import (
        describe_layout,
        describe_sampling,
        describe_suggestions,
        describe_training,
        draw_masks,
    )
    from cogvideo.training.config import TrainConfig
    from cogvideo.training.resources import planned_model, planned_settings, resolve_auto

    given = load_config(_inspection(), args.config, args.overrides)
    trained = None
    if any(getattr(given, name) is not None for name in _training_groups()):
        own = ("gpu=", "count=", "training.")
        trained = load_config(TrainConfig, args.config, [w for w in args.overrides if not w.startswith(own)])
        if any(word.startswith("training.") for word in args.overrides):
            raise ValueError("training.* is for files of configs/model; give train.*, init.* and deepspeed.* here")
    gpu = given.gpu or (trained.machine.gpu if trained else None)
    if gpu is not None and gpu not in MACHINES:
        raise ValueError(f"unknown gpu={gpu}; choose one of {', '.join(MACHINES)}, or leave it out")
    if given.count is not None and given.count < 1:
        raise ValueError(f"count={given.count}; expected at least 1")
    count = given.count or (trained.machine.count if trained else given.training.count)

    checkpoint, config = None, planned_model(trained) if trained else given.model or given.superres
    if args.checkpoint is not None:
        checkpoint = load_checkpoint(args.checkpoint, verify=not args.no_verify)
        has_model = bool({"model", "superres"} & checkpoint.config.keys())
        if has_model:
            given_model, config = config, stored_config(checkpoint)
            words = [word for word in args.overrides if word.startswith(("model.", "superres."))]
            if (words or not trained) and given_model not in (None, config):
                what = words[0] if words else f"--config {args.config[-1]}"
                raise ValueError(
                    f"{what} describes a different model than {args.checkpoint} holds; leave out one of them"
                )
        print(describe_files(checkpoint, verified=not args.no_verify))
        if not has_model:
            print(describe_tensors(checkpoint))
            return
    if config is None and trained:
        raise ValueError(
            f"--config {args.config[-1]} is for the image tokenizer (task=tokenizer), which is small and has no plan; "
            "give the config of a transformer"
        )
    if config is None:
        raise ValueError("nothing to inspect; give --config FILE (see configs/model) or --checkpoint DIR")

    frozen = trained.init.freeze_trunk if trained else given.training.frozen_trunk
    adapters = trained.lora if trained else given.training.lora
    print(describe_parameters(config, checkpoint, frozen_trunk=frozen, values=args.values, adapters=adapters))
    if isinstance(config, ModelConfig):
        print(f"\n{describe_layout(config)}\n\n{draw_masks(config, args.mask)}")
    if args.no_plan:
        return
    machine = MACHINES[gpu] if gpu else measure_machine()
    if trained:
        settings = planned_settings(resolve_auto(trained, machine, count), count)
    else:
        settings = dataclasses.replace(given.training, count=count)
    source = "the vendor's figures" if gpu else "measured"
    print(f"\n{describe_training(config, machine, settings, source)}")
    if isinstance(config, ModelConfig):
        print(describe_sampling(config, machine))
    if args.suggest:
        print(describe_suggestions(config, machine, settings))


def _training_groups() -> list[str]:
    """The keys of `cogvideo train` that files of configs/model do not have."""
    import dataclasses

    from cogvideo.training.config import TrainConfig

    return [field.name for field in dataclasses.fields(TrainConfig) if field.name not in ("model", "superres")]


def _inspection() -> Any:
    """A config class with all keys of `cogvideo train`, null unless given, and those of this command."""
    import dataclasses
    import typing

    from cogvideo.planning.budgets import TrainingSettings
    from cogvideo.training.config import TrainConfig

    hints = typing.get_type_hints(TrainConfig)
    fields: list[tuple[str, Any, Any]] = [
        (field.name, hints[field.name] | None, None) for field in dataclasses.fields(TrainConfig)
    ]
    fields += [("gpu", str | None, None), ("count", int | None, None)]
    fields += [("training", TrainingSettings, dataclasses.field(default_factory=TrainingSettings))]
    return dataclasses.make_dataclass("Inspection", fields, frozen=True)
