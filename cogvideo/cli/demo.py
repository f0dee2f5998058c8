"""Serve a web page: type prompts in a browser, and watch the clips grow.

    cogvideo demo                                      the bundled weights, at http://127.0.0.1:7860
    cogvideo demo --model DIR rounds=2 seconds=2       other weights; initial settings of the page
    cogvideo demo --model DIR --model DIR              several weights, for visitors to choose among
    cogvideo demo --model DIR --direct DIR             super-resolution with a model other than the bundle's own
    cogvideo demo --adapter DIR[:SCALE]                an adapter to switch on and off; repeat it for several
    cogvideo demo --host 0.0.0.0                       for others on your network, who can then see all results
    cogvideo demo --root-path /video --proxies 1       behind a proxy that serves it under a path

Visitors share the models, and concurrent requests share forward passes. Each result is a numbered folder in --out, like
those that `cogvideo sample` writes; a restarted server continues the numbering. When results take more than --disk, the
oldest are removed. Nothing is fetched from other servers.

GET /health answers 200 and "ready", or 503 and "loading" or "stopping". A first Ctrl-C or SIGTERM lets running requests
finish; a second one stops the server at once. Needs gradio: the extra [demo].
"""

import argparse
import errno
import logging
import logging.handlers
import math
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cogvideo.cli._common import add_config_argument, weights
from cogvideo.cli._sampling import refuse_unused_settings
from cogvideo.config import split_overrides

if TYPE_CHECKING:
    from cogvideo.demo.places import Limits
    from cogvideo.demo.server import Server
    from cogvideo.demo.service import DemoService
    from cogvideo.sampling.config import SampleConfig, UpsampleConfig
    from cogvideo.sampling.superres import Upsampler

SAME_SIGNAL_SECONDS = 0.5
"""A signal repeated within this time counts once: `timeout` and some other programs send each signal twice."""
ABOUT_BUNDLED = (
    "These small weights generate only moving digits; prompts may be in English or Chinese. "
    "Name the digit, its colour, its direction, and whether it moves slowly or quickly."
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
    parser.add_argument(
        "--model",
        metavar="DIR",
        type=weights,
        action="append",
        help="a bundle of weights (default: the bundled weights); may be repeated, for visitors to choose among",
    )
    add_config_argument(parser)
    parser.add_argument(
        "--adapter",
        metavar="DIR[:SCALE]",
        action="append",
        default=[],
        help="an adapter that the page can switch on and off; may be repeated",
    )
    parser.add_argument(
        "--direct",
        metavar="DIR",
        type=weights,
        help="direct super-resolution model (cogview2-dsr; default: the bundle's own, if it has one)",
    )
    parser.add_argument(
        "--iterative",
        metavar="DIR",
        type=weights,
        help="iterative model (cogview2-itersr; default: the bundle's own, unless --direct is given)",
    )
    parser.add_argument(
        "--examples",
        metavar="FILE",
        type=Path,
        help="example prompts to click on, one per line (default: the bundle's)",
    )
    parser.add_argument(
        "--at-once", metavar="N", type=int, default=8, help="requests that run at the same time (default: 8)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0: any that is free (default: 7860)")
    add = parser.add_argument_group("limits").add_argument
    add("--waiting", metavar="N", type=int, default=64, help="requests that may wait while others run (default: 64)")
    add(
        "--per-visitor",
        metavar="N",
        type=int,
        default=4,
        help="requests from one address, running or waiting (default: 4)",
    )
    add(
        "--seconds-per-clip",
        metavar="S",
        type=float,
        default=3600,
        help="time to generate a clip and enlarge it (default: 3600)",
    )
    add(
        "--disk",
        metavar="GB",
        type=float,
        default=10,
        help="space for results; the oldest are removed first (default: 10)",
    )
    add = parser.add_argument_group("proxy and access log").add_argument
    add("--root-path", metavar="PATH", default="", help="where the proxy serves the page: /video, or a full URL")
    add(
        "--proxies",
        metavar="N",
        type=int,
        default=0,
        help="trusted proxies, whose X-Forwarded-For names the visitor (default: 0, the header is ignored)",
    )
    add(
        "--access-log",
        metavar="FILE",
        default="-",
        help="a line per request, without prompts; - is stderr, off is none (default: -)",
    )
    add("--log-prompts", action="store_true", help="write prompts into the log too")
    parser.add_argument("--share", action="store_true", help="also create a public address, through gradio's servers")


def run(args: argparse.Namespace) -> None:
    prompts, overrides = split_overrides(args.words)
    if prompts:
        raise ValueError(f"{prompts[0]!r} is not a setting; prompts are typed on the page")
    refuse_unused_settings(overrides, {"given_frames"})
    if find_spec("gradio") is None:
        raise ValueError("`cogvideo demo` needs gradio; pip install -e '.[demo]'")
    if args.at_once < 1:
        raise ValueError(f"--at-once {args.at_once} allows no requests; give at least 1")
    for option in ("--direct", "--iterative", "--examples"):
        value = getattr(args, option.removeprefix("--"))
        if value is not None and len(args.model or ()) > 1:
            raise ValueError(
                f"{option} works with a single --model; `cogvideo bundle {option}` puts it into each bundle"
            )
    limits, root_path = _limits(args), _root_path(args.root_path)
    if args.proxies < 0:
        raise ValueError(f"--proxies {args.proxies} is below 0; give the number of trusted proxies")
    log = _access_log(args.access_log)
    with listen(args.host, args.port) as listener:
        from cogvideo.demo.adapters import name_adapters
        from cogvideo.demo.service import DemoService, check_out
        from cogvideo.demo.weights import ServedWeights, assign_adapters, is_bundled, name_weights
        from cogvideo.files import BUNDLED_WEIGHTS
        from cogvideo.locks import lock_folder
        from cogvideo.sampling.adapters import AdapterChoice
        from cogvideo.sampling.bundle import UPSAMPLE
        from cogvideo.sampling.pipeline import Pipeline

        adapters = name_adapters(AdapterChoice.parse(text) for text in args.adapter)
        directories = name_weights(args.model or [BUNDLED_WEIGHTS])
        examples = {name: _examples(path, args.examples) for name, path in directories.items()}
        superres = {name: _find_superres(path, args) for name, path in directories.items()}
        unused = [word for word in overrides if word.startswith(f"{UPSAMPLE}.")]
        if unused and not any(superres.values()):
            raise ValueError(f"{unused[0]} sets super-resolution, and no weights here have it; leave it out")
        configs = {name: _load_configs(path, superres[name], args, overrides) for name, path in directories.items()}
        check_out(args.out)
        with lock_folder(args.out):
            from cogvideo.demo.places import Places
            from cogvideo.demo.server import Server

            server = Server(
                Places(limits),
                listener,
                root_path=root_path,
                proxies=args.proxies,
                share=args.share,
                log=log,
                log_prompts=args.log_prompts,
            )
            with server.listening():
                pipelines = {name: Pipeline.load(path, configs[name][0]) for name, path in directories.items()}
                fitting = assign_adapters(adapters, pipelines)
                served = {
                    name: ServedWeights(
                        pipelines[name],
                        configs[name][0],
                        path,
                        upsampler=_open_upsampler(path, superres[name], configs[name][1]),
                        adapters=fitting[name],
                        examples=examples[name],
                        note=ABOUT_BUNDLED if is_bundled(path) else "",
                    )
                    for name, path in directories.items()
                }
                service = DemoService(served, args.out, limits=limits)
                try:
                    address = server.show(service)
                    print(f"CogVideo is at {address}, with results in {args.out}; press Ctrl-C to stop", flush=True)
                    _wait_for_signal(server, service)
                finally:
                    service.close()


def _examples(directory: Path, file: Path | None) -> Sequence[str]:
    """Prompts to click on: those of --examples, else the bundle's own. Raises: OSError, ValueError."""
    from cogvideo.demo.weights import is_bundled
    from cogvideo.sampling.bundle import read_config
    from cogvideo.text import read_prompts

    if file is not None:
        return read_prompts(file)
    return EXAMPLES if is_bundled(directory) else read_config(directory).examples


def _find_superres(directory: Path, args: argparse.Namespace) -> "tuple[Path, Path | None] | None":
    """The direct and the iterative model: those given, else the bundle's own; None without any. Raises: ValueError."""
    from cogvideo.sampling.superres import find_models, own_models

    if args.direct is None and args.iterative is None and "direct" not in own_models(directory):
        return None
    return find_models(directory, args.direct, args.iterative)


def _load_configs(
    directory: Path, superres: "tuple[Path, Path | None] | None", args: argparse.Namespace, overrides: list[str]
) -> "tuple[SampleConfig, UpsampleConfig | None]":
    """Settings of clips, and of super-resolution with models that `_find_superres` found. Raises: as `load_config`."""
    from cogvideo.sampling.bundle import UPSAMPLE, load_sample_config
    from cogvideo.sampling.superres import load_both_configs, own_models

    if superres is None:
        of_clips = [word for word in overrides if not word.startswith(f"{UPSAMPLE}.")]
        return load_sample_config(directory, args.config, of_clips), None
    own = own_models(directory)
    are_own = superres == (own.get("direct"), own.get("iterative"))
    return load_both_configs(directory, args.config, overrides, own_models=are_own)


def _open_upsampler(
    directory: Path, models: "tuple[Path, Path | None] | None", config: "UpsampleConfig | None"
) -> "Upsampler | None":
    """Open models that `_find_superres` found. Raises: as `open_upsampler`."""
    from cogvideo.sampling.superres import open_upsampler

    return None if models is None or config is None else open_upsampler(directory, *models, config)


def _limits(args: argparse.Namespace) -> "Limits":
    """The limits that the arguments set. Raises: ValueError for one that is too small."""
    from cogvideo.demo.places import Limits

    least = {"waiting": 0, "per_visitor": 1, "seconds_per_clip": 1, "disk": 0.001}
    for name, smallest in least.items():
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= smallest):
            raise ValueError(f"--{name.replace('_', '-')} {value:g} is too small; give at least {smallest:g}")
    return Limits(args.at_once, args.waiting, args.per_visitor, args.seconds_per_clip, int(args.disk * 1e9))


def _root_path(text: str) -> str:
    """A path or URL without a trailing slash. Raises: ValueError."""
    path = text.rstrip("/")
    if path and not re.fullmatch(r"(https?://[\w.:\[\]-]+)?(/[\w.~-]+)*", path):
        raise ValueError(f"--root-path {text} is not a path; give one such as /video, or https://example.org/video")
    return path


def _access_log(name: str) -> Callable[[str], None] | None:
    """A function that logs a line with a timestamp; None if off. Raises: OSError if the file cannot be written."""
    if name == "off":
        return None
    handler: logging.Handler
    # the file is reopened after it was moved away, by logrotate for example
    handler = logging.StreamHandler(sys.stderr) if name == "-" else logging.handlers.WatchedFileHandler(name)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.Logger("cogvideo.demo.access")
    log.addHandler(handler)
    return log.info


def _wait_for_signal(server: "Server", service: "DemoService") -> None:
    """Wait for a signal, then for running requests to finish, unless a second signal arrives."""
    try:
        threading.Event().wait()
    except (KeyboardInterrupt, SystemExit):
        start = time.monotonic()

        def end(number: int, frame: FrameType | None) -> None:
            if time.monotonic() - start > SAME_SIGNAL_SECONDS:
                raise SystemExit(128 + number)

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, end)
        if running := service.running_jobs():
            requests = f"{running} running request{'s' * (running > 1)}"
            print(f"waiting for {requests}; press Ctrl-C to stop at once", flush=True)
        server.finish(service)
        raise


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0: any free port. Raises: ValueError, before models are loaded."""
    if not host:
        raise ValueError("--host is empty; give 127.0.0.1 for this machine only, 0.0.0.0 for all of its addresses")
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port} is not a valid port; give one from 1024 to 65535, or 0 for any that is free")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.EADDRINUSE:
            advice = "stop the program that uses it, or give another --port (0: any that is free)"
        elif number == errno.EACCES:
            advice = "give a --port from 1024 to 65535, or 0 for any that is free"
        else:
            advice = "give --host an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"--host {host} --port {port}: cannot listen there ({reason}); {advice}") from None
