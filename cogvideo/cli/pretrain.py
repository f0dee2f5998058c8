"""From captioned videos to a bundle of weights in one command: tokenizers, trunk, both stages, samples and a report.

    cogvideo pretrain --captions my.csv --out runs/mine [--pixels 64] [--minutes 90 | --gpu-hours 8]

Sizes, clip lengths and schedules are chosen for the videos and the machine. Each step is a `cogvideo` command, printed
before it runs; DIR/commands.sh lists them all, and DIR/configs holds the config files that they read, which you may
edit. After an interruption, repeat the command: finished steps are skipped and training resumes exactly.
"""

import argparse

from cogvideo.cli._recipes import add_recipe_arguments, begun_with, captions_words, open_captions_from, resources_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--pixels", type=int, metavar="N", help="side of the frames, a multiple of 8 (default: 64)")


def run(args: argparse.Namespace) -> None:
    from cogvideo.locks import lock_folder
    from cogvideo.recipes.folder import RecipeFolder
    from cogvideo.recipes.pretrain import SHARES, Choices, PretrainRecipe
    from cogvideo.recipes.report import write_report
    from cogvideo.recipes.survey import survey_videos

    resources = resources_from(args)
    deadline = resources.deadline
    captions, folder = open_captions_from(args), RecipeFolder(args.out)
    survey = survey_videos(captions)
    choices = Choices.of(survey, pixels=args.pixels, num_gpus=resources.num_gpus, bf16=resources.bf16)
    recipe = PretrainRecipe(folder, captions, captions_words(args), choices, resources.minutes)
    steps = recipe.steps()
    facts = [f"{args.captions}: {survey}.", f"Chosen: {choices}."]
    print("\n".join(facts), flush=True)
    if args.dry_run:
        print("\n".join(step.shown for step in steps))
        return
    with lock_folder(args.out):
        folder.begin(begun_with(args, resources, command="pretrain", pixels=args.pixels))
        folder.write_commands(steps)
        folder.run(steps, SHARES, deadline, resources.threads, resources.environment)
        report = write_report(folder, f"Trained on {args.captions.name}", facts, {"": folder / "samples"}, steps)
    print(f"bundle: {folder / 'bundle'}; report: {report}")
