"""Arguments that commands share: paths, weights, `--config FILE`, `key=value` words, `--device`, `--captions`.

Also: the check that an output does not replace an input.
"""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cogvideo.config import expand_path, load_config
from cogvideo.hub import resolve

if TYPE_CHECKING:
    import torch

    from cogvideo.data.readers import ReadOptions

T = TypeVar("T")


def local_path(text: str) -> Path:
    """The argparse type of path arguments; expands `~` and `$NAME`."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}".removeprefix(": ")) from None


def weights(text: str) -> Path:
    """The argparse type of weights arguments: a path, or USER/REPO[@REVISION].

    `fetch_weights` downloads a repository after parsing, when all arguments are known to be valid.
    """
    return local_path(text)


def fetch_weights(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Replace the values of `weights` arguments by local paths. Raises: OSError, ValueError as `hub.resolve`."""
    for action in parser._actions:
        given = getattr(args, action.dest, None)
        if action.type is weights and given is not None:
            setattr(args, action.dest, [resolve(one) for one in given] if isinstance(given, list) else resolve(given))


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE`, which may be repeated."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a YAML file; may be repeated, later files win",
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` and `key=value` words, as `args.overrides`."""
    add_config_argument(parser)
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="set a config key; keys in a group are group.key=value",
    )


def add_captions_arguments(parser: argparse._ActionsContainer, *, required: bool = True) -> None:
    """Add `--captions` and the options that say how it is read, for `read_options_from`."""
    parser.add_argument(
        "--captions",
        type=Path,
        required=required,
        metavar="FILE",
        help=".csv, .tsv, .jsonl, .json or .parquet; WebDataset tars, such as shard-{000..009}.tar, or a folder of "
        "them; or a folder of videos, with a metadata file or with NAME.txt beside NAME.mp4",
    )
    for role in ("video", "caption", "start", "end"):
        parser.add_argument(
            f"--{role}-column", metavar="NAME", help=f"the column with the {role} (default: found by usual names)"
        )
    parser.add_argument(
        "--encoding", metavar="NAME", help="encoding of a text file that is not in UTF-8, such as cp1252"
    )


def read_options_from(args: argparse.Namespace) -> "ReadOptions":
    """How to read captions, from the arguments of `add_captions_arguments`."""
    from cogvideo.data.readers import ReadOptions

    return ReadOptions(args.video_column, args.caption_column, args.start_column, args.end_column, args.encoding)


def captions_files(captions: Path) -> list[Path]:
    """The files that `--captions` names: its tars if it is a pattern; the metadata files of a folder, if it has any."""
    from cogvideo.data.readers import METADATA
    from cogvideo.data.readers.webdataset import find_tars

    tars = find_tars(captions)
    metadata = [captions / name for name in METADATA] if captions.is_dir() else []
    return [captions, *metadata, *(tars[0] if tars else ())]


def refuse_replaced_inputs(
    option: str, out: Path | None, inputs: Iterable[Path | None], weights: Iterable[Path | None] = ()
) -> None:
    """Refuse an output that would replace what the command reads.

    `inputs`: files and folders. `weights`: folders of which every file is an input.
    Raises: ValueError if `out`, given as `option`, is an input or a folder that holds one.
    """
    if out is None:
        return
    target = os.path.realpath(out)
    read = [(path, os.path.realpath(path)) for path in inputs if path is not None]
    for folder in weights:
        if folder is not None:
            is_inside = target.startswith(os.path.join(os.path.realpath(folder), ""))
            read.append((folder, target if is_inside and os.path.exists(target) else os.path.realpath(folder)))
    for path, place in read:
        if place == target or place.startswith(os.path.join(target, "")):
            raise ValueError(f"{option} {out} would replace what is read: {path} or a part of it; choose another name")


def config_from(cls: type[T], args: argparse.Namespace) -> T:
    """Load the config from the arguments of `add_config_arguments`. Raises: as `load_config`."""
    return load_config(cls, args.config, args.overrides)


def device_from(name: str | None) -> "torch.device":
    """The device for a `--device` option. None or "auto" is a GPU if there is one, a different one for each process.

    Raises: ValueError if it cannot be used on this machine.
    """
    import torch

    from cogvideo.distributed import open_device

    if name in (None, "auto"):
        return open_device("auto")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["it cannot be opened"])[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); give cpu, cuda or cuda:1") from None
    return device
