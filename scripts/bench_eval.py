"""CPU time and memory of the metrics of `cogvideo eval`. Prints one JSON line per network.

    python scripts/bench_eval.py --clips 2048
    python scripts/bench_eval.py --clips 512 --only motion

Each network, or group of pixel measures, has its own process with one thread: clips of noise, 16 frames of 128 px, pass
through it as the protocol `local` prepares them; then two sets of as many features are compared. `clips_s` is the CPU
time of one set of clips, without that of making the noise; `compare_s`, that of each comparison; `peak_mb`, the peak
resident memory; `start_mb`, that before the first clip.

I3D, C3D, CLIP, InceptionV3 and LPIPS are stand-ins from `tests/helpers/networks.py`, which cost next to nothing: their
`clips_s` is the time of scaling frames, and `compare_s` that of random features as wide as the real network's. The
networks of appearance and motion distance are the real ones. `without` is motion, flicker, warp residual and drift.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cogvideo.evaluation import pixel_metrics
from cogvideo.evaluation.feature_metrics import inception_score, kernel_distance, precision_and_recall
from cogvideo.evaluation.frechet import Moments, frechet_distance
from cogvideo.evaluation.lpips import open_pair_network
from cogvideo.evaluation.measure import Meter
from cogvideo.evaluation.networks import FRAMES_SEEN, FeatureNetwork, open_network
from cogvideo.evaluation.packaged_networks import TAKES_PIXELS, open_packaged
from cogvideo.evaluation.preprocessing import network_input, to_bytes
from cogvideo.evaluation.protocols import LOCAL
from cogvideo.evaluation.weight_files import INCEPTION_FEATURES
from cogvideo.training.resources import peak_memory_mib
from tests.helpers.networks import CaptionStandIn, PairStandIn, StandIn, write_network

BATCH = 8
WIDTHS = {"i3d": 400, "c3d": 101, "inception": INCEPTION_FEATURES, "appearance": 1280, "motion": 1024}


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(Moments.of(x), Moments.of(y))


METRICS: dict[str, dict[str, Callable[[np.ndarray, np.ndarray], object]]] = {
    "without": {},
    "psnr_ssim": {},
    "lpips_alex": {},
    "i3d": {"fvd": frechet, "kvd": kernel_distance, "precision_recall": precision_and_recall},
    "c3d": {"is": lambda x, y: inception_score(x, 10, 42)},
    "clip": {},
    "inception": {"fid": frechet, "kid": kernel_distance, "frame_precision_recall": precision_and_recall},
    "motion": {"motion_distance": frechet},
    "appearance": {"appearance_distance": frechet},
}
"""By network or pixel measure: how two sets of its features are compared."""


def noise(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (LOCAL.frames, LOCAL.side, LOCAL.side, 3), np.uint8)


def open_for(role: str, folder: Path) -> FeatureNetwork:
    device, file = torch.device("cpu"), folder / "stand_in.pt"
    if role in ("appearance", "motion"):
        return open_packaged(device)[role]
    write_network(file, StandIn())
    return CaptionStandIn("clip", file, device) if role == "clip" else open_network("i3d", file, device, trust=True)


def work_on_clips(role: str, folder: Path) -> Callable[[list[np.ndarray]], object]:
    """The function to apply to a batch of clips (frames, height, width, 3)."""
    meter = Meter(LOCAL, {})
    if role == "without":
        return lambda clips: [meter._pixel_row(clip, np.arange(len(clip)) / 8) for clip in clips]
    if role == "psnr_ssim":
        return lambda clips: [(pixel_metrics.psnr(x, 255 - x), pixel_metrics.ssim(x, 255 - x)) for x in clips]
    if role == "lpips_alex":
        write_network(folder / "pair.pt", PairStandIn())
        pairs = open_pair_network(role, folder / "pair.pt", torch.device("cpu"), trust=True)
        return lambda clips: [pairs.distance(clip, 255 - clip) for clip in clips]
    network = open_for(role, folder)

    def features(clips: list[np.ndarray]) -> object:
        inputs = [network_input(LOCAL, meter.prepare(to_bytes(meter.prepare(clip))), role) for clip in clips]
        return network.features(torch.stack(inputs), prepare=LOCAL.network_prepares and role not in TAKES_PIXELS)

    return features


def measure(role: str, count: int) -> None:
    """Print the figures of one network."""
    rng, compare_s = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        work = work_on_clips(role, Path(folder))
        start_mb, clips_s = peak_memory_mib(torch.device("cpu")), 0.0
        for first in range(0, count, BATCH):
            clips = [noise(number) for number in range(first, min(first + BATCH, count))]
            start = time.process_time()
            work(clips)
            clips_s += time.process_time() - start
        for name, compare in METRICS[role].items():
            rows = count * (FRAMES_SEEN if role == "inception" else 1)
            x, y = (rng.normal(size=(rows, WIDTHS[role])).astype(np.float32) for _ in range(2))
            start = time.process_time()
            compare(x, y)
            compare_s[name] = round(time.process_time() - start, 1)
    about = {"network": role, "clips": count, "clips_s": round(clips_s, 1), "compare_s": compare_s}
    memory = {"peak_mb": round(peak_memory_mib(torch.device("cpu"))), "start_mb": round(start_mb)}
    print(json.dumps({**about, **memory}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2048, metavar="N")
    parser.add_argument("--only", choices=METRICS, metavar="NETWORK", help=", ".join(METRICS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    for role in [args.only] if args.only else METRICS:
        process = multiprocessing.get_context("fork").Process(target=measure, args=(role, args.clips))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"bench_eval: measuring {role} failed")


if __name__ == "__main__":
    main()
