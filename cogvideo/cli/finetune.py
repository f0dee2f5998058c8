"""Finetune a bundle of weights on captioned videos in one command, with samples before and after.

    cogvideo finetune BUNDLE --captions my.csv --out runs/mine [--minutes 90 | --gpu-hours 8]

The tokenizers, the frame size and the maximum prompt length stay those of BUNDLE, except that text pieces are added if
captions need them. All weights are trained if they fit the device, otherwise adapters (LoRA), which are then merged.
Each step is a `cogvideo` command, printed before it runs; DIR/commands.sh lists them all, and DIR/configs holds the
config files that they read, which you may edit. After an interruption, repeat the command to continue.
"""

import argparse

from cogvideo.cli._common import weights
from cogvideo.cli._recipes import add_recipe_arguments, begun_with, captions_words, open_captions_from, resources_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=weights, metavar="BUNDLE", help="the folder of weights to start from")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--train", choices=("auto", "all", "lora"), default="auto", help="what to train (default: all, if it fits)"
    )


def run(args: argparse.Namespace) -> None:
    from dataclasses import replace

    import torch

    from cogvideo.hub import describe
    from cogvideo.locks import lock_folder
    from cogvideo.recipes.finetune import SHARES, Base, CaptionNeeds, FinetuneRecipe, choose_mode
    from cogvideo.recipes.folder import RecipeFolder
    from cogvideo.recipes.report import write_report
    from cogvideo.recipes.survey import survey_videos
    from cogvideo.training.resources import machine_of

    resources = resources_from(args)
    deadline = resources.deadline
    base, captions, folder = Base.open(args.bundle), open_captions_from(args), RecipeFolder(args.out)
    needs, survey = CaptionNeeds.of(base, captions), survey_videos(captions)
    recipe = FinetuneRecipe(
        folder,
        base,
        captions,
        captions_words(args),
        survey,
        needs.new_pieces,
        "all" if args.train == "auto" else args.train,
        resources.bf16,
        resources.num_gpus,
        resources.minutes,
    )
    lengths = ", ".join(f"{seconds:g}" for seconds in base.clip_seconds(survey))
    facts = [f"{args.captions}: {survey}; {needs}.", f"Clips of {lengths} s; {base.describe_fixed()}."]
    if args.train == "auto":
        mode, reason = choose_mode(recipe, machine_of(torch.device("cuda" if resources.num_gpus else "cpu")))
        recipe = replace(recipe, mode=mode)
        facts.append(f"{reason[0].upper()}{reason[1:]}.")
    steps = recipe.steps()
    print("\n".join(facts), flush=True)
    if args.dry_run:
        print("\n".join(step.shown for step in steps))
        return
    with lock_folder(args.out):
        folder.begin(
            begun_with(args, resources, command="finetune", bundle=describe(args.bundle.absolute()), train=recipe.mode)
        )
        folder.write_commands(steps)
        folder.run(steps, SHARES, deadline, resources.threads, resources.environment)
        name = args.bundle.name if describe(args.bundle) == str(args.bundle) else describe(args.bundle)
        clips = {"before": folder / "before", "after": folder / "after"}
        report = write_report(folder, f"{name}, finetuned on {args.captions.name}", facts, clips, steps)
    print(f"bundle: {folder / 'bundle'}; report: {report}")
