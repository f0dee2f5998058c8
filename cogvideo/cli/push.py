"""Upload weights to a repository of the Hugging Face hub, with a model card.

    cogvideo push runs/mine/bundle USER/REPO --license apache-2.0 [--private] [--yes]

DIR is a bundle, a checkpoint, an adapter or an image tokenizer; it is only read. It may also hold .png pictures, which
are uploaded too, and a README.md; any other file is refused. The card describes the weights and the run that made them.
A README.md in DIR is appended to the card, or replaces it if it has front matter. Log in first, with `hf auth login` or
HF_TOKEN. Everything is uploaded in one commit. Needs huggingface_hub: the extra [hub].
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR", help="the weights")
    parser.add_argument("repo", metavar="USER/REPO", help="where to upload; created if it does not exist")
    parser.add_argument("--license", metavar="NAME", help="license, as the hub names it: apache-2.0, mit, ...")
    parser.add_argument("--private", action="store_true", help="create a repository that only you can read")
    parser.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def run(args: argparse.Namespace) -> None:
    from cogvideo.sampling.publish import CARD, Publication

    publication = Publication.of(args.directory)
    card = publication.card(args.repo, args.license)
    files = {**publication.weights, **publication.sheets}
    for name, path in files.items():
        print(f"{path.stat().st_size / 1e6:10.2f} MB  {name}")
    print(f"{len(card.encode()) / 1e6:10.2f} MB  {CARD}", flush=True)
    if not args.yes:
        if not sys.stdin.isatty():
            raise ValueError("push asks before it uploads, and there is no terminal; give --yes")
        if input(f"upload this {publication.kind} to {args.repo}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing was uploaded")
            return
    print(publication.upload(args.repo, private=args.private, license=args.license))
