"""Videos of captions.

    cogvideo sample "the red digit 3 moves left slowly" --out DIR [seed=7 samples_per_prompt=4 ...]
    cogvideo sample --prompts FILE --out DIR                 one prompt a line

Each sample gets an .mp4, a looping .gif and a contact sheet .png; tokens.safetensors, samples.json and config.yaml tell
what they are. A seed repeats its videos, whatever other prompts are asked for. docs/sampling.md lists the settings.
"""

import argparse
from pathlib import Path

MAX_PROMPT_FILE_BYTES = 16 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="PROMPT or key=value", help="what to show; a setting, e.g. seed=7")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="more prompts, one a line")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a folder to make, or an empty one")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds files already")
    parser.add_argument("--model", metavar="DIR", type=Path, help="a bundle of weights (default: in the package)")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, action="append", default=[], help="a YAML file; repeat it: later wins"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")


def run(args: argparse.Namespace) -> None:
    from cogvideo.cli.common import split_overrides
    from cogvideo.logs import get_logger, progress
    from cogvideo.sampling.bundle import DEFAULT_DIRECTORY, bundle_sample_config
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.sampling.results import claim_folder, write_results

    prompts, overrides = split_overrides(args.words)
    if args.prompts is not None:
        prompts += read_prompts(args.prompts)
    directory = args.model or DEFAULT_DIRECTORY
    config = bundle_sample_config(directory, args.config, overrides)
    pipeline = Pipeline.load(directory)
    pipeline.texts(prompts, config)  # every prompt fits, or nothing begins
    samples, frames = len(prompts) * config.samples_per_prompt, pipeline.num_frames(config)
    total = pipeline.num_tokens(config, len(prompts))
    plan = f"{samples} clip{'s' * (samples > 1)} of {frames} frames, {pipeline.fps(config):g} a second"
    if args.dry_run:
        print(f"{plan}: {total} tokens to draw; nothing was written")
        return

    claim_folder(args.out, args.overwrite)
    with progress(total, "tokens", "tok") as bar:
        tokens = pipeline.sample(prompts, config, bar.update)
    pictures = pipeline.decode(tokens)
    for path in write_results(args.out, prompts, config, str(directory), tokens, pictures, pipeline.fps(config)):
        get_logger().info(str(path))
    print(f"{plan}: {args.out}")


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 text file, one a line, blank lines left out. Raises: ValueError, OSError."""
    if path.stat().st_size > MAX_PROMPT_FILE_BYTES:
        raise ValueError(
            f"{path} is larger than {MAX_PROMPT_FILE_BYTES} bytes; expected a text file, one prompt a line"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; expected one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts
