"""Compare systems with human raters: make a blind page to vote on, and read the votes.

    cogvideo study make samples/ours samples/theirs --prompts prompts.txt --out study
    cogvideo study make ours=runs/a theirs=runs/b third=runs/c --prompts prompts.txt --out study --per-rater 40
    cogvideo study read votes-*.json --key study/key.json

make: each folder holds a clip for each prompt: results of `cogvideo sample`, or videos named after the prompt
(PROMPT.mp4, PROMPT-0.mp4) or its line number, counted from 0 (0000.mp4). Raters get OUT/page, which works without a
server, sends nothing and names no system. Each rater sees the pairs in a different order, on random sides, and answers
with the keyboard which clip is better in quality, relevance and motion. Raters send back the file that the page
downloads. Keep OUT/key.json: it alone says which system made which clip.

read: win rates with intervals, Bradley-Terry strengths, agreement between raters. Votes from another study, damaged or
edited files, and raters that occur twice are refused.
"""

import argparse
from pathlib import Path

from cogvideo.cli._common import refuse_replaced_inputs

TITLE = "Which clip is better?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("make", "read"), help="what to do")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="make: two or more folders, DIR or NAME=DIR; read: files of votes"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="make: the prompts, one per line")
    parser.add_argument("--out", type=Path, metavar="DIR", help="make: folder to write; must not exist")
    parser.add_argument("--title", metavar="TEXT", help=f"make: title of the page (default: {TITLE})")
    parser.add_argument(
        "--per-rater", type=int, metavar="N", help="make: pairs that each rater gets, drawn at random (default: all)"
    )
    parser.add_argument("--key", type=Path, metavar="FILE", help="read: the study's key.json")
    parser.add_argument("--json", type=Path, metavar="FILE", help="read: also write all figures to this file")


def run(args: argparse.Namespace) -> None:
    makes = args.action == "make"
    needed = ["prompts", "out"] if makes else ["key"]
    others = ["key", "json"] if makes else ["prompts", "out", "title", "per_rater"]
    for name in needed:
        if getattr(args, name) is None:
            raise ValueError(f"`study {args.action}` needs --{name}; see `cogvideo study --help`")
    for name in others:
        if getattr(args, name) is not None:
            raise ValueError(f"`study {args.action}` takes no --{name.replace('_', '-')}; leave it out")
    if makes:
        _make(args)
    else:
        _read(args)


def _make(args: argparse.Namespace) -> None:
    from cogvideo.evaluation.study.design import make_study, open_system
    from cogvideo.locks import lock_output
    from cogvideo.logs import get_logger, progress
    from cogvideo.text import clean_text, read_numbered_prompts

    if args.per_rater is not None and args.per_rater < 1:
        raise ValueError(f"--per-rater {args.per_rater}; expected at least 1")
    title = TITLE if args.title is None else clean_text(args.title, "title")
    prompts: dict[str, int] = {}
    for line, prompt in read_numbered_prompts(args.prompts):
        prompts.setdefault(prompt, line)
    folders = dict(_named_folder(text) for text in args.inputs)
    if len(folders) < len(args.inputs):
        raise ValueError("two systems have the same name; give names of your own, as in ours=DIR")
    if len(folders) < 2:
        raise ValueError("a study compares systems; give two folders or more")
    systems = [open_system(name, folder, prompts) for name, folder in folders.items()]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with lock_output(args.out):
        if args.out.exists():
            raise FileExistsError(f"{args.out} exists; choose another name")
        with progress(len(systems) * len(prompts), "encoding", "clips") as bar:
            key, notes = make_study(
                args.out, title, systems, list(prompts), per_rater=args.per_rater, progress=bar.update
            )
    for note in notes:
        get_logger("study").warning("%s", note)
    count = len(key["trials"])
    each = min(args.per_rater or count, count)
    print(f"{count} pairs: {len(systems)} systems, {len(prompts)} prompts; {each} per rater")
    print(f"give raters {args.out / 'page'}; keep {args.out / 'key.json'}, which says what they compared")


def _named_folder(text: str) -> tuple[str, Path]:
    """DIR or NAME=DIR as a name and a folder. Raises: ValueError."""
    from cogvideo.config import expand_path

    name, equals, rest = text.partition("=")
    if equals and name and not Path(text).is_dir():
        return name, expand_path(rest)
    folder = expand_path(text)
    return folder.resolve().name, folder


def _read(args: argparse.Namespace) -> None:
    from cogvideo.config import expand_path
    from cogvideo.evaluation.study.design import read_key
    from cogvideo.evaluation.study.results import summarise
    from cogvideo.evaluation.study.votes import read_votes
    from cogvideo.files import write_json

    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ValueError(f"--json {args.json} cannot be written; name a file in a folder that exists")
    votes = [expand_path(text) for text in args.inputs]
    refuse_replaced_inputs("--json", args.json, [args.key, *votes])
    key = read_key(args.key)
    results = summarise(key, read_votes(votes, key))
    print(results.table())
    if args.json:
        write_json(args.json, {"study": key["title"], "systems": key["systems"], **results.to_json()})
