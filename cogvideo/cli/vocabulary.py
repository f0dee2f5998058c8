"""Train a text tokenizer on captions; its ids follow the image tokenizer's codes.

    cogvideo vocabulary --captions FILE --tokenizer DIR --out text.model [--pieces 512]
    cogvideo vocabulary --captions FILE --extend BUNDLE --out DIR [--pieces 512]

Clip lengths, prompt suffixes and single bytes are pieces too, so any text can be encoded.

--extend copies a bundle and adds up to --pieces text pieces that its tokenizer spells in bytes or letter by letter. Old
ids stay, and the models treat them as before; finetune the models to learn the new ones.
"""

import argparse
from itertools import islice
from pathlib import Path

from cogvideo.cli._common import (
    add_captions_arguments,
    captions_files,
    read_options_from,
    refuse_replaced_inputs,
    weights,
)
from cogvideo.hub import describe
from cogvideo.logs import get_logger

log = get_logger("cogvideo.vocabulary")

SHOWN = 12
"""Number of new pieces that are printed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_captions_arguments(parser)
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--tokenizer", type=weights, metavar="DIR", help="the image tokenizer")
    base.add_argument("--extend", type=weights, metavar="BUNDLE", help="the bundle to copy with more pieces")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model file, or bundle, to write")
    parser.add_argument(
        "--pieces",
        type=int,
        default=512,
        help="maximum number of text pieces, 256 of which are single bytes; with --extend, of new ones",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out")


def run(args: argparse.Namespace) -> None:
    from cogvideo.data.readers import open_captions
    from cogvideo.locks import lock_output

    if args.pieces < 1:
        raise ValueError(f"--pieces {args.pieces}; expected at least 1")
    refuse_replaced_inputs("--out", args.out, [*captions_files(args.captions), args.tokenizer, args.extend])
    with lock_output(args.out):
        if args.out.exists() and not args.overwrite:
            raise FileExistsError(f"{args.out} exists; choose another name, or --overwrite to replace it")
        found = open_captions(args.captions, read_options_from(args), skip_bad=True)
        for reason in islice(found.bad_reasons(), 10):
            log.warning("skipped %s", reason)
        captions = [caption.text for caption in found]
        if args.extend is not None:
            _extend(args, captions)
        else:
            _train(args, captions)


def _extend(args: argparse.Namespace, captions: list[str]) -> None:
    from cogvideo.sampling.extend import extend_vocabulary
    from cogvideo.tokenizers.text import TextTokenizer

    old = TextTokenizer.load(args.extend / "text.model")
    extended = old.extended(captions, args.pieces)
    extend_vocabulary(args.extend, extended, args.out, overwrite=args.overwrite)
    added = [extended.piece(id) for id in range(old.vocabulary.size, extended.vocabulary.size)]
    shown = " ".join(added[:SHOWN]) + (" ..." if len(added) > SHOWN else "")
    print(f"{args.out}: {describe(args.extend)} with {len(added)} more pieces{': ' if added else ''}{shown}")


def _train(args: argparse.Namespace, captions: list[str]) -> None:
    from cogvideo.data.statistics import MAX_CAPTIONS, CaptionLengths, spread
    from cogvideo.model.config import ModelConfig
    from cogvideo.tokenizers.image import open_image_tokenizer
    from cogvideo.tokenizers.text import TextTokenizer

    num_codes = open_image_tokenizer(args.tokenizer).num_tokens
    tokenizer = TextTokenizer.train(captions, args.out, args.pieces, num_codes)
    size = tokenizer.vocabulary.size
    lengths = CaptionLengths.of_clips([captions[i] for i in spread(len(captions), MAX_CAPTIONS)], tokenizer)
    print(f"{args.out}: {size} ids, {num_codes} of them image codes; trained on {len(captions)} captions")
    print(lengths.summary(ModelConfig().text_len))
    if lengths.longest > ModelConfig().text_len:
        log.warning("model.text_len must be %d to read the longest caption whole; or raise --pieces", lengths.longest)
