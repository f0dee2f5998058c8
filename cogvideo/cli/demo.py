"""The web page: prompts in a browser, and clips that grow while you look.

    cogvideo demo                                      with the weights in the package, at http://127.0.0.1:7860
    cogvideo demo --model DIR rounds=2 seconds=2       other weights; settings that the page begins with
    cogvideo demo --direct DIR --iterative DIR         with super-resolution
    cogvideo demo --host 0.0.0.0                       for others in your network, who then see all results

Several visitors share the models, and each forward. Results are kept below --out, each in a folder as `cogvideo sample`
makes it; a page started again goes on numbering. Nothing is fetched from other servers. Needs gradio: the extra [demo].
"""

import argparse
import os
import socket
import threading
from importlib.util import find_spec
from pathlib import Path

from cogvideo.cli._common import split_overrides

ABOUT_BUNDLED = (
    "These weights are small, and know one thing: a digit that moves, in English or Chinese. "
    "Name its colour, which one it is, where it goes, and whether slowly or quickly."
)
EXAMPLES = (
    "the red digit 3 moves left slowly",
    "the green digit 8 moves down quickly",
    "蓝色的数字5向上快速移动",
    "黄色的数字7向右缓慢移动",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="key=value", help="a setting to begin with, as of `sample`")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("samples/demo"), help="where results are kept")
    parser.add_argument("--model", metavar="DIR", type=Path, help="a bundle of weights (default: in the package)")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, action="append", default=[], help="a YAML file; repeat it: later wins"
    )
    parser.add_argument("--direct", metavar="DIR", type=Path, help="super-resolution: the direct model (cogview2-dsr)")
    parser.add_argument("--iterative", metavar="DIR", type=Path, help="and the iterative one (cogview2-itersr)")
    parser.add_argument("--examples", metavar="FILE", type=Path, help="prompts to click on, one a line")
    parser.add_argument("--at-once", metavar="N", type=int, default=8, help="asks being made; others wait (default: 8)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    parser.add_argument("--share", action="store_true", help="also a public address, through gradio's servers")


def run(args: argparse.Namespace) -> None:
    prompts, overrides = split_overrides(args.words)
    if prompts:
        raise ValueError(f"{prompts[0]!r} is no setting; prompts are typed on the page")
    if find_spec("gradio") is None:
        raise ValueError("`cogvideo demo` needs gradio; pip install 'cogvideo[demo]'")
    if args.at_once < 1:
        raise ValueError(f"--at-once {args.at_once} makes nothing; give at least 1")
    if args.iterative is not None and args.direct is None:
        raise ValueError("--iterative refines what the direct model draws; give --direct too")
    port = free_port(args.host, args.port)
    from cogvideo.cli._sampling import unwinding
    from cogvideo.cli.sample import read_prompts
    from cogvideo.demo.service import Studio
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.sampling.bundle import bundle_sample_config
    from cogvideo.sampling.config import UpsampleConfig
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.sampling.superres import open_upsampler

    directory = args.model or BUNDLED_WEIGHTS
    config = bundle_sample_config(directory, args.config, overrides)
    bundled = directory == BUNDLED_WEIGHTS
    examples = read_prompts(args.examples) if args.examples else EXAMPLES if bundled else ()
    pipeline = Pipeline.load(directory, config)
    upsampler = None
    if args.direct is not None:
        how = UpsampleConfig(weights=config.weights, device=config.device, stream_layers=config.stream_layers)
        upsampler = open_upsampler(directory, args.direct, args.iterative, how)
    studio = Studio(pipeline, config, args.out, directory=directory, upsampler=upsampler)
    from cogvideo.demo.server import served

    about = f"{studio.about} {ABOUT_BUNDLED if bundled else ''}"
    where = {"host": args.host, "port": port, "share": args.share}
    with unwinding(), served(studio, about=about, examples=examples, at_once=args.at_once, **where) as address:
        print(f"CogVideo is at {address}, results in {args.out}; Ctrl-C ends it", flush=True)
        threading.Event().wait()


def free_port(host: str, port: int) -> int:
    """The port, if it can be had; for 0 any that can. Raises: ValueError, before models are loaded."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            return tried.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({reason}); choose another") from None
