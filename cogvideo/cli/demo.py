"""Serve the web page: prompts in a browser, and clips that grow as you watch.

    cogvideo demo                                      the bundled weights, at http://127.0.0.1:7860
    cogvideo demo --model DIR rounds=2 seconds=2       other weights; initial settings of the page
    cogvideo demo --direct DIR --iterative DIR         with super-resolution
    cogvideo demo --host 0.0.0.0                       for others in your network, who can then see all results

Visitors share the models, and concurrent requests share forward passes. Each result is a numbered folder below --out,
as `cogvideo sample` writes it; a restarted page continues the numbering. Nothing is fetched from other servers. Needs
gradio: the extra [demo].
"""

import argparse
import errno
import socket
import threading
from importlib.util import find_spec
from pathlib import Path

from cogvideo.config import split_overrides

ABOUT_BUNDLED = (
    "These small weights know one thing: a moving digit, in English or Chinese. "
    "Name its colour, the digit, its direction, and whether it moves slowly or quickly."
)
EXAMPLES = (
    "the red digit 3 moves left slowly",
    "the green digit 8 moves down quickly",
    "蓝色的数字5向上快速移动",
    "黄色的数字7向右缓慢移动",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="key=value", help="an initial setting, as for `sample`")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("samples/demo"), help="folder for results")
    parser.add_argument("--model", metavar="DIR", type=Path, help="a bundle of weights (default: the bundled weights)")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, action="append", default=[], help="a YAML file; repeat it: later wins"
    )
    parser.add_argument("--direct", metavar="DIR", type=Path, help="direct super-resolution model (cogview2-dsr)")
    parser.add_argument("--iterative", metavar="DIR", type=Path, help="iterative model (cogview2-itersr)")
    parser.add_argument("--examples", metavar="FILE", type=Path, help="example prompts to click on, one per line")
    parser.add_argument(
        "--at-once", metavar="N", type=int, default=8, help="requests that run at the same time (default: 8)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0: any that is free (default: 7860)")
    parser.add_argument("--share", action="store_true", help="also create a public address, through gradio's servers")


def run(args: argparse.Namespace) -> None:
    prompts, overrides = split_overrides(args.words)
    if prompts:
        raise ValueError(f"{prompts[0]!r} is not a setting; prompts are typed on the page")
    if find_spec("gradio") is None:
        raise ValueError("`cogvideo demo` needs gradio; pip install -e '.[demo]'")
    if args.at_once < 1:
        raise ValueError(f"--at-once {args.at_once} allows no request; give at least 1")
    if args.iterative is not None and args.direct is None:
        raise ValueError("--iterative refines what the direct model draws; give --direct too")
    port = free_port(args.host, args.port)
    from cogvideo.demo.service import DemoService
    from cogvideo.files import BUNDLED_WEIGHTS
    from cogvideo.locks import lock_folder
    from cogvideo.sampling.bundle import load_sample_config
    from cogvideo.sampling.config import UpsampleConfig
    from cogvideo.sampling.pipeline import Pipeline
    from cogvideo.sampling.superres import open_upsampler
    from cogvideo.text import read_prompts

    directory = args.model or BUNDLED_WEIGHTS
    config = load_sample_config(directory, args.config, overrides)
    bundled = directory == BUNDLED_WEIGHTS
    examples = read_prompts(args.examples) if args.examples else EXAMPLES if bundled else ()
    pipeline = Pipeline.load(directory, config)
    upsampler = None
    if args.direct is not None:
        loading = UpsampleConfig(weights=config.weights, device=config.device, stream_layers=config.stream_layers)
        upsampler = open_upsampler(directory, args.direct, args.iterative, loading)
    with lock_folder(args.out):
        service = DemoService(pipeline, config, args.out, directory=directory, upsampler=upsampler)
        from cogvideo.demo.server import serve

        page = serve(
            service,
            about=f"{service.about} {ABOUT_BUNDLED if bundled else ''}",
            examples=examples,
            host=args.host,
            port=port,
            share=args.share,
            max_running=args.at_once,
        )
        with page as address:
            print(f"CogVideo is at {address}, results in {args.out}; Ctrl-C ends it", flush=True)
            threading.Event().wait()


def free_port(host: str, port: int) -> int:
    """The port if it is free, or any free port for 0. Raises: ValueError, before models are loaded."""
    if not host:
        raise ValueError("--host is empty; give 127.0.0.1 for this machine only, 0.0.0.0 for all of its addresses")
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port} is no port; give one from 1024 to 65535, or 0 for any that is free")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that is none
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.EADDRINUSE:
            advice = "stop the program that uses it, or give another --port (0: any that is free)"
        elif number == errno.EACCES:
            advice = "give a --port from 1024 to 65535, or 0 for any that is free"
        else:
            advice = "give --host an address of this machine, as 127.0.0.1, or 0.0.0.0 for all"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({reason}); {advice}") from None
