"""Check in minutes whether the whole chain, from data to samples, is sound with your data on this machine.

    cogvideo check --data runs/own/clips --image-tokenizer DIR --text-tokenizer FILE
    cogvideo check --data runs/own/clips --model runs/own/bundle         also checks the bundle's stage 1
    cogvideo check --captions videos/captions.csv --model runs/own/bundle frame_pixels=64

A small model, trained like any other, memorises a handful of clips and reproduces them token by token: given the true
previous tokens and given sampled ones, with and without the key/value cache. Frames make the round trip through the
image tokenizer, and caption lengths are measured. With --captions, key=value words are settings of `cogvideo prepare`.
Each check prints a line: ok, or BROKEN with what to do. The exit code is 1 if anything is broken.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import add_captions_arguments, add_config_arguments, read_options_from, weights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cogvideo.data.statistics import CaptionLengths
    from cogvideo.evaluation.soundness import Finding
    from cogvideo.model.config import ModelConfig
    from cogvideo.sequence.batch import Batch
    from cogvideo.sequence.prompt import PromptFormat
    from cogvideo.tokenizers.image import ImageTokenizer
    from cogvideo.tokenizers.text import TextTokenizer

USUAL_TEXT_LEN, USUAL_FRAME_SIDE = 64, 8
"""As in configs/train/own.yaml; the side is in tokens."""
MAX_VIDEOS, MAX_FRAMES = 16, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, metavar="DIR", help="clips that `cogvideo prepare` made")
    add_captions_arguments(parser, required=False)
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder of videos (default: that of the captions)")
    parser.add_argument(
        "--model", type=weights, metavar="DIR", help="a bundle: its tokenizers are used, and its stage 1 is checked"
    )
    parser.add_argument("--image-tokenizer", type=weights, metavar="DIR", help="default: the bundle's")
    parser.add_argument("--text-tokenizer", type=weights, metavar="FILE", help="default: the bundle's")
    parser.add_argument(
        "--text-len", type=int, metavar="N", help="text tokens of your model (default: the bundle's, 64)"
    )
    parser.add_argument("--clips", type=int, default=4, metavar="N", help="clips to learn, 1 to 32 (default: 4)")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="training steps (default: 200)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, metavar="T", help="time limit for training, in minutes (default: 5)"
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from cogvideo.evaluation.soundness import summary

    if (args.data is None) == (args.captions is None):
        raise ValueError("give either --data DIR (prepared clips) or --captions FILE")
    if args.data is not None and (args.config or args.overrides):
        raise ValueError("key=value and --config say how videos are prepared; leave them out with --data")
    for name, least, most in (("clips", 1, 32), ("steps", 1, 100_000), ("text_len", 1, 1 << 16)):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} {value}; expected {least} to {most}")
    if not 0 < args.minutes < math.inf:
        raise ValueError(f"--minutes {args.minutes:g}; expected above 0")
    findings = []
    with tempfile.TemporaryDirectory(prefix="cogvideo-check-") as folder:
        for finding in _checks(args, Path(folder)):
            print(finding, flush=True)
            findings.append(finding)
    print(summary(findings))
    return 0 if all(finding.sound for finding in findings) else 1


def _checks(args: argparse.Namespace, work: Path) -> "Iterator[Finding]":
    """Run the checks, from data to samples. Raises: OSError, ValueError for input that cannot be checked."""
    import torch

    from cogvideo.checkpoint.load import load_model
    from cogvideo.data.dataset import ClipDataset
    from cogvideo.data.statistics import MAX_CAPTIONS, CodeUse, spread
    from cogvideo.evaluation.soundness import (
        Finding,
        check_cache,
        check_captions,
        check_round_trip,
        check_samples,
        check_training,
        decode_again,
    )
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.tokenizers.image import open_image_tokenizer
    from cogvideo.tokenizers.records import are_different, describe_tokenizer
    from cogvideo.tokenizers.text import open_text_tokenizer
    from cogvideo.training.overfit import Overfit, overfit, write_few

    prompt, text_len, frame_side = _of_bundle(args.model)
    text_len = args.text_len or text_len
    bundle = args.model or BUNDLED_WEIGHTS
    image_path = args.image_tokenizer or bundle / "image_tokenizer"
    text_path = args.text_tokenizer or bundle / "text.model"
    image, text = open_image_tokenizer(image_path), open_text_tokenizer(text_path)
    if args.captions is not None:
        data, lengths, frames, rebuilt = _prepare(args, work / "clips", image, image_path, text, prompt, frame_side)
        clips, fits = ClipDataset(data), True
    else:
        data, clips = args.data, ClipDataset(args.data)
        lengths = _lengths(clips.texts(spread(len(clips), MAX_CAPTIONS)), text, prompt)
        fits = not are_different(clips.tokenizer_record, describe_tokenizer(image_path, image))
    yield from check_captions(lengths, text_len)
    use = CodeUse.count(clips.sample_tokens(), clips.num_tokens or image.num_tokens)
    if not fits:
        yield Finding(
            "image tokenizer",
            False,
            f"{image_path} did not make the tokens of {data}, which decode to noise; give the one that the clips "
            "were prepared with, or prepare them again with this one",
        )
    else:
        if args.captions is None:
            frames, rebuilt = _from_tokens(image, clips)
        yield check_round_trip(frames, rebuilt, use)

    few = write_few(data, spread(len(clips), args.clips), work / "few")
    longest = _lengths(ClipDataset(few).texts(range(len(ClipDataset(few)))), text, prompt).longest
    settings = Overfit(text_path, image_path if fits else None, longest, prompt, args.steps, args.minutes)
    try:
        export, losses = overfit(few, work / "run", settings)
    except ValueError as error:  # anything that training refuses, such as non-finite losses
        yield Finding("training", False, str(error))
        return
    device = _device()
    model = load_model(export, device=device).eval()
    batch = _batch(model.config, few, text_path, prompt)
    decoded = decode_again(model, batch)
    yield check_training(decoded, losses[0], len(losses), model.config.vocabulary.num_image_tokens)
    yield check_cache(decoded)
    yield check_samples(decoded)
    if args.model is None:
        return
    name = "cache of the bundle's stage 1"
    model = load_model(args.model / "sequential", device=device, dtype=torch.float32).eval()
    try:
        batch = _batch(model.config, few, text_path, prompt)
    except ValueError as error:  # the bundle does not fit the clips
        yield Finding(name, False, str(error))
        return
    yield check_cache(decode_again(model, batch), name)


def _batch(config: "ModelConfig", data: Path, text_tokenizer: Path, prompt: "PromptFormat") -> "Batch":
    """All clips of a prepared folder, as training reads them. Raises: ValueError if they do not fit the model."""
    from cogvideo.evaluation.likelihood import open_prepared_clips

    source = open_prepared_clips(data, config, text_tokenizer, prompt, suffix=True)
    return source.batch(range(source.count))


def _of_bundle(folder: Path | None) -> "tuple[PromptFormat, int, int]":
    """A bundle's prompt format, the text length of its stage 1, and the side of its frames in tokens."""
    from cogvideo.checkpoint.format import load_checkpoint
    from cogvideo.checkpoint.load import stored_config
    from cogvideo.config import from_dict
    from cogvideo.files import read_json
    from cogvideo.model.config import ModelConfig
    from cogvideo.sampling.bundle import BundleConfig
    from cogvideo.sequence.prompt import PromptFormat

    if folder is None:
        return PromptFormat(), USUAL_TEXT_LEN, USUAL_FRAME_SIDE
    if not (folder / "sequential").is_dir():
        raise FileNotFoundError(f"no bundle of weights at {folder}: it has no sequential/; give another folder")
    file = folder / "bundle.json"
    values = read_json(file, dict[str, Any]) if file.is_file() else {}
    config = stored_config(load_checkpoint(folder / "sequential", verify=False))
    if not isinstance(config, ModelConfig):
        raise ValueError(f"{folder / 'sequential'} holds a super-resolution model, expected stage 1")
    return from_dict(BundleConfig, values, str(file)).prompt, config.text_len, config.frame_side


def _lengths(texts: "list[tuple[float, str]]", tokenizer: "TextTokenizer", prompt: "PromptFormat") -> "CaptionLengths":
    """Count the text tokens of captions, encoded as for sampling."""
    from cogvideo.data.statistics import CaptionLengths
    from cogvideo.sequence.prompt import NO_LIMIT

    newline = tokenizer.vocabulary.newline

    def read(seconds: float, caption: str) -> list[int]:
        return prompt.clip_text(tokenizer.encode, newline, seconds, caption, NO_LIMIT, suffix=prompt.video_suffix)

    return CaptionLengths.count(texts, read, tokenizer.has_pieces_for)


def _prepare(
    args: argparse.Namespace,
    out: Path,
    image: "ImageTokenizer",
    image_path: Path,
    text: "TextTokenizer",
    prompt: "PromptFormat",
    frame_side: int,
) -> "tuple[Path, CaptionLengths, NDArray[np.uint8], NDArray[np.uint8]]":
    """Prepare some of the videos. Returns the folder, caption lengths, frames, and their reconstructions.

    Caption lengths are of up to MAX_CAPTIONS captions of all videos.
    """
    import numpy as np

    from cogvideo.config import load_config
    from cogvideo.data.encode import TokenEncoder, check_frame_pixels
    from cogvideo.data.prepare import Preparation, PrepareConfig
    from cogvideo.data.readers import open_captions
    from cogvideo.data.statistics import MAX_CAPTIONS, spread
    from cogvideo.tokenizers.records import describe_tokenizer

    pixels = frame_side * image.compress_rate
    config = load_config(PrepareConfig, args.config, [f"frame_pixels={pixels}", *args.overrides])
    if args.model and config.frame_pixels != pixels:
        raise ValueError(
            f"frame_pixels={config.frame_pixels}, but {args.model} reads frames of {pixels} pixels; leave out "
            "frame_pixels, or --model"
        )
    for name, makes in (("low_res_pixels", "pairs for super-resolution"), ("crop_pixels", "single frames")):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)} makes {makes}, and clips are checked; leave {name} out")
    check_frame_pixels(config.frame_pixels, image)
    captions = open_captions(args.captions, read_options_from(args), videos=args.videos, skip_bad=not config.strict)
    chosen = captions.select(spread(len(captions), MAX_CAPTIONS))
    lengths = _lengths([(4.0, caption.text) for caption in chosen], text, prompt)
    videos = len({caption.video for caption in captions})
    if videos > MAX_VIDEOS:
        _, captions = captions.split(MAX_VIDEOS / videos)
    encoder = TokenEncoder(image, str(_device()))
    seen: list[NDArray[np.uint8]] = []

    def encode(frames: "NDArray[np.uint8]") -> "NDArray[Any]":
        if sum(len(batch) for batch in seen) < MAX_FRAMES:
            seen.append(frames.copy())
        return encoder(frames)

    Preparation(captions, out, "tokens", config).run(encode, describe_tokenizer(image_path, image))
    frames = np.concatenate(seen)[:MAX_FRAMES]
    return out, lengths, frames, encoder.reconstruct(frames)


def _from_tokens(image: "ImageTokenizer", clips: Any) -> "tuple[NDArray[np.uint8], NDArray[np.uint8]]":
    """Frames decoded from prepared clips, and their reconstructions by another round trip."""
    import torch

    from cogvideo.data.encode import TokenEncoder
    from cogvideo.data.statistics import spread
    from cogvideo.sampling.pipeline import decode_frames

    encoder = TokenEncoder(image, str(_device()))
    tokens = clips.frames(spread(len(clips), max(1, MAX_FRAMES // clips.num_frames)))
    frames = decode_frames(image, torch.from_numpy(tokens.reshape(-1, tokens.shape[-1])))
    return frames, encoder.reconstruct(frames)


def _device() -> Any:
    """The device that training uses."""
    import os

    from cogvideo.cli._common import device_from

    return device_from("cpu" if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" else "auto")
