"""What the subcommands share: `--config FILE` and `key=value` words."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cogvideo.config import OVERRIDE, load_config

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a subcommand `--config FILE` (repeatable, later files win) and `key=value` words, as `args.overrides`."""
    parser.add_argument(
        "--config", metavar="FILE", type=Path, action="append", default=[], help="a YAML file; repeat it: later wins"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="set one config key; keys in a group are group.key=value",
    )


def config_from(cls: type[T], args: argparse.Namespace) -> T:
    """The config that `add_config_arguments` gathered.

    Raises: ValueError, OSError as `load_config`.
    """
    return load_config(cls, args.config, args.overrides)


def device_from(name: str | None) -> "torch.device":
    """The device of a `--device`; None or "auto": a GPU if there is one, each of several processes its own.

    Raises: ValueError if it is of no use here.
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
        raise ValueError(f"--device {name} is of no use here ({reason}); give cpu, cuda or cuda:1") from None
    return device


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part mixed words into plain ones and `key=value` ones; a prompt with spaces before its `=` stays a prompt."""
    return [w for w in words if not OVERRIDE.fullmatch(w)], [w for w in words if OVERRIDE.fullmatch(w)]
