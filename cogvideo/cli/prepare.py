"""Make training data from videos and captions: clips of five frames at several clip lengths, as image tokens.

    cogvideo prepare --captions FILE --tokenizer DIR --out DIR [--config FILE] [key=value ...]
    cogvideo prepare --captions FILE --frames --out DIR ...   single frames, to train an image tokenizer
    cogvideo prepare --captions FILE --tokenizer DIR --out DIR frame_pixels=480 low_res_pixels=160 ...   single frames
                                                              as image tokens at both sizes, to train super-resolution

FILE is a table or JSON with a video and a caption per record ("start" and "end" in seconds are optional), WebDataset
tars, or a folder of videos with texts beside them: docs/guides/data.md shows each. Unusable records are skipped and
listed. A run that was killed resumes when started again. --report writes a page to look at the data, also for a folder
that is already finished. `cogvideo digits` writes videos to try this on.

    torchrun --nproc-per-node 8 -m cogvideo prepare ...     in many processes, or with deepspeed: docs/guides/data.md
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideo.cli._common import (
    add_captions_arguments,
    add_config_arguments,
    config_from,
    device_from,
    read_options_from,
    weights,
)
from cogvideo.logs import get_logger

if TYPE_CHECKING:
    from cogvideo.data.prepare import Preparation, PrepareConfig
    from cogvideo.data.shards import Kind
    from cogvideo.distributed import ProcessGroup
    from cogvideo.tokenizers.text import TextTokenizer

log = get_logger("cogvideo.prepare")

USUAL_COMPRESS_RATE = 8
"""Pixels along each side of a token, for image tokenizers with the published structure and default settings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_captions_arguments(parser)
    parser.add_argument("--videos", type=Path, metavar="DIR", help="folder of videos (default: that of the captions)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make, or to resume")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tokenizer", type=weights, metavar="DIR", help="image tokenizer to encode with")
    kind.add_argument("--frames", action="store_true", help="store single frames as pixels instead")
    parser.add_argument(
        "--high-res-tokenizer",
        type=weights,
        metavar="DIR",
        help="image tokenizer for the large frames of pairs (default: --tokenizer)",
    )
    parser.add_argument(
        "--validation",
        type=float,
        metavar="FRACTION",
        help="hold out this fraction of the videos, at least one, as a second prepared folder, OUT/validation",
    )
    parser.add_argument(
        "--report", action="store_true", help="also write OUT/report.html, to look at the data before training"
    )
    parser.add_argument(
        "--text-tokenizer", type=weights, metavar="FILE", help="also say how many text tokens the captions take"
    )
    parser.add_argument(
        "--text-len",
        type=int,
        metavar="N",
        help="with --text-tokenizer: text tokens that the model reads (default: 64, published)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default)")
    parser.add_argument("--dry-run", action="store_true", help="count what would be made, and make nothing")
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from cogvideo.data.encode import TokenEncoder, check_frame_pixels
    from cogvideo.data.extract import crop_frames
    from cogvideo.data.prepare import PrepareConfig
    from cogvideo.distributed import ProcessGroup
    from cogvideo.evaluation.data_report import write_report
    from cogvideo.model.config import ModelConfig
    from cogvideo.tokenizers.image import check_same_codes, open_image_tokenizer
    from cogvideo.tokenizers.records import describe_tokenizer
    from cogvideo.tokenizers.text import open_text_tokenizer

    config, processes = config_from(PrepareConfig, args), ProcessGroup.from_environment()
    if args.dry_run and processes.rank:
        return  # rank 0 surveys all videos
    low_res = config.low_res_pixels
    if args.frames and low_res is not None:
        raise ValueError("low_res_pixels makes pairs of tokens; give --tokenizer instead of --frames, or leave it out")
    if args.high_res_tokenizer is not None and low_res is None:
        raise ValueError("--high-res-tokenizer is for pairs; give low_res_pixels, or leave it out")
    if config.crop_pixels is not None and not args.frames:
        raise ValueError("crop_pixels makes frames for an image tokenizer; give --frames, or leave crop_pixels out")
    if args.report and args.dry_run:
        raise ValueError("--report shows what was made, and --dry-run makes nothing; leave out one of them")
    if args.text_len is not None and (args.text_tokenizer is None or args.text_len < 1):
        raise ValueError(f"--text-len {args.text_len} goes with --text-tokenizer, and must be at least 1")
    text_len: int = args.text_len or ModelConfig().text_len
    text_tokenizer = None if args.text_tokenizer is None else open_text_tokenizer(args.text_tokenizer)
    encode_text = None if text_tokenizer is None else text_tokenizer.encode
    parts = _open_parts(args, config, processes)
    if args.frames:
        _check_usual_rate(config.crop_pixels or config.frame_pixels)
        if args.dry_run:
            return _print_surveys(parts, 3 * (config.crop_pixels or config.frame_pixels) ** 2)
        for part in parts:
            manifest = part.run(partial(crop_frames, side=config.crop_pixels))
            _print_result(part, manifest, text_tokenizer, text_len)
            if args.report and manifest is not None:
                print(write_report(part, encode_text=encode_text))
        return

    tokenizer = large = open_image_tokenizer(args.tokenizer)
    records = [describe_tokenizer(args.tokenizer, tokenizer)]
    if args.high_res_tokenizer is not None:
        large = open_image_tokenizer(args.high_res_tokenizer)
        check_same_codes(tokenizer, large)
        records.append(describe_tokenizer(args.high_res_tokenizer, large))
    check_frame_pixels(config.frame_pixels, large)
    if low_res is not None:
        check_frame_pixels(low_res, tokenizer, "low_res_pixels")
    if args.dry_run:
        frame_len = (config.frame_pixels // large.compress_rate) ** 2
        tokens = config.clips.num_frames * frame_len
        if low_res is not None:
            tokens = frame_len + (low_res // tokenizer.compress_rate) ** 2
        return _print_surveys(parts, tokens * (2 if tokenizer.num_tokens <= 1 << 16 else 4))
    encoder = TokenEncoder(large, str(device_from(args.device)), low_res, tokenizer)
    for part in parts:
        manifest = part.run(encoder, *records)
        _print_result(part, manifest, text_tokenizer, text_len)
        if args.report and manifest is not None:
            print(write_report(part, encoder.reconstruct, encode_text))


def _open_parts(args: argparse.Namespace, config: "PrepareConfig", processes: "ProcessGroup") -> list["Preparation"]:
    """The folders to prepare: one of all captions, or one to train on and then one of the held-out videos."""
    from cogvideo.data.prepare import Preparation, open_with_validation
    from cogvideo.data.readers import open_captions
    from cogvideo.distributed import ProcessGroup

    kind: Kind = "frames" if args.frames else "tokens" if config.low_res_pixels is None else "pairs"
    captions = open_captions(args.captions, read_options_from(args), videos=args.videos, skip_bad=not config.strict)
    if args.validation is None:
        return [Preparation(captions, args.out, kind, config, processes=processes)]
    processes = ProcessGroup() if args.dry_run else processes  # the others have ended
    return list(open_with_validation(captions, args.validation, args.out, kind, config, processes))


def _check_usual_rate(pixels: int) -> None:
    """Warn about frames that an image tokenizer with the usual compress rate would refuse.

    Frames are made before their image tokenizer, so its actual rate is not known yet.
    """
    if pixels % USUAL_COMPRESS_RATE:
        log.warning(
            "frames of %d pixels are not a multiple of %d, the compress rate of image tokenizers unless "
            "tokenizer.level or tokenizer.channel_multipliers is changed; training one will refuse them, so set "
            "frame_pixels to a multiple",
            pixels,
            USUAL_COMPRESS_RATE,
        )


def _print_surveys(parts: list["Preparation"], bytes_per_row: int) -> None:
    for part in parts:
        if len(parts) > 1:
            print(f"{part.out}:")
        _print_survey(part.survey(), bytes_per_row)


def _print_survey(survey: dict[str, Any], bytes_per_row: int) -> None:
    print(f"{survey['captions']} captions of {survey['videos']} videos; {survey['skipped']} captions would be skipped")
    print(f"{survey['frames']} frames to decode and encode")
    print(f"{survey['rows']} rows, about {survey['rows'] * bytes_per_row / 2**20:.1f} MiB" + _by_seconds(survey))


def _print_result(
    part: "Preparation", manifest: dict[str, Any] | None, text_tokenizer: "TextTokenizer | None", text_len: int
) -> None:
    """Print what was made, and warn about signs that it will not train well.

    `manifest`: None on ranks above 0. `text_len`: text tokens that the model reads.
    """
    from cogvideo.data.dataset import ClipDataset, PairDataset
    from cogvideo.data.statistics import FEW_CODES_ADVICE, MAX_CAPTIONS, CaptionLengths, CodeUse, spread

    if manifest is None:
        return
    print(f"{part.out}: {manifest['rows']} rows{_by_seconds(manifest)}")
    if part.kind != "frames":
        data = ClipDataset(part.out) if part.kind == "tokens" else PairDataset(part.out)
        use = CodeUse.count(data.sample_tokens(), data.num_tokens)
        if isinstance(data, ClipDataset):
            side = math.isqrt(data.frame_len)
            print(f"frames of {side}x{side} tokens (model.frame_side={side}); {use}")
        else:
            print(
                f"frames of {data.high_res_side}x{data.high_res_side} and {data.low_res_side}x{data.low_res_side} "
                f"tokens; {use}"
            )
        if use.is_low:
            log.warning("%s: %s", use, FEW_CODES_ADVICE)
    if text_tokenizer is not None:
        captions = part.captions.select(spread(len(part.captions), MAX_CAPTIONS))
        lengths = CaptionLengths.of_clips([caption.text for caption in captions], text_tokenizer)
        print(lengths.summary(text_len))


def _by_seconds(counts: dict[str, Any]) -> str:
    lengths = {seconds: count for seconds, count in counts["rows_by_seconds"].items() if seconds != "0"}
    return "; " + ", ".join(f"{count} of {seconds} s" for seconds, count in lengths.items()) if lengths else ""
