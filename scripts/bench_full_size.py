"""Sample from a full-size stage on a CPU or a GPU: peak memory and seconds per token, as one JSON line.

    python scripts/bench_full_size.py [--config configs/model/cogvideo_stage1.yaml] [--work DIR] [model.key=value ...]
    python scripts/bench_full_size.py --device cuda --published --layers 8

Random bf16 weights are written shard by shard (15.4 GB at full size; kept in --work and reused), then a new process
maps them into memory and samples the first row of a frame's tokens, with both channels. It first measures the memory
bandwidth: at best, a token takes as long as reading all weights once. The first token reads the file from disk; the
time per token is the median of the others. Run it on an otherwise idle machine. On a GPU, `peak_gb` is the peak memory
of tensors from when the weights are loaded.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_timing import add_device_argument, device_argument, peak_gb, read_speed, reset_peak
from torch import Tensor

from cogvideo.checkpoint.format import MANIFEST, load_checkpoint, write_checkpoint
from cogvideo.checkpoint.load import load_model, stored_config
from cogvideo.checkpoint.parameters import parameter_shapes
from cogvideo.cli.main import run_command
from cogvideo.config import load_config, to_dict
from cogvideo.inference.backends import install_kernels
from cogvideo.inference.engine import Conditioning, Engine, build_program
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import Schedule
from cogvideo.logs import progress
from cogvideo.model.config import ModelConfig
from cogvideo.model.quantize import convert_weights
from cogvideo.recipes.steps import run_child
from cogvideo.tensor_file import TensorInfo
from cogvideo.training.resources import peak_memory_mib

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "configs" / "model" / "cogvideo_stage1.yaml"
TEXT_TOKENS = 20


@dataclass(frozen=True)
class Settings:
    model: ModelConfig = field(default_factory=ModelConfig)


def write_random(directory: Path, config: ModelConfig) -> None:
    """Write a checkpoint of random bf16 weights, one tensor in memory at a time, each from its own seed."""
    infos = {name: TensorInfo(torch.bfloat16, shape) for name, shape in parameter_shapes(config).items()}
    seeds = {name: seed for seed, name in enumerate(infos)}

    with progress(sum(info.nbytes for info in infos.values()) >> 20, "writing weights", "MB") as bar:

        def draw(name: str) -> Tensor:
            shape = infos[name].shape
            bar.update(infos[name].nbytes >> 20)
            if "layernorm" in name or len(shape) == 1:
                return torch.full(shape, float("layernorm" in name and name.endswith("weight")), dtype=torch.bfloat16)
            generator = torch.Generator().manual_seed(seeds[name])
            return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

        write_checkpoint(directory, infos, draw, {"model": to_dict(config)})


def sample_row(directory: Path, num_tokens: int, threads: int | None, device: torch.device) -> dict[str, Any]:
    """Load the weights and sample; runs in the new process."""
    if threads:
        torch.set_num_threads(threads)
    bandwidth = read_speed(device)
    before = time.perf_counter()
    model = load_model(directory, verify=False)
    convert_weights(model, "bf16", torch.float32 if device.type == "cpu" else torch.bfloat16)
    model.to(device)  # on a CPU the matrices stay memory-mapped, without a copy
    if device.type == "cuda":
        install_kernels(model, device)
    load_seconds = time.perf_counter() - before
    reset_peak(device)  # which read_speed's own memory would be
    config = model.config

    ids = torch.arange(TEXT_TOKENS) % (config.vocabulary.size - config.vocabulary.num_image_tokens)
    text = [(ids[: config.text_len] + config.vocabulary.num_image_tokens).tolist()]
    conditioning = Conditioning.from_tokens(text, [], config.vocabulary.pad, guidance_scale=None, text_bonus=0.0)
    slots = np.arange(num_tokens)
    program = build_program(config, Schedule(slots[:0], tuple(slots[:, None]))).to(device)
    codes = config.vocabulary.num_image_tokens
    sampler = ClusterSampler(np.arange(codes) % min(500, codes), 1.0, 16, 0.89).to(device)
    known = torch.zeros(1, config.layout.num_slots, dtype=torch.int64)
    uniforms = torch.rand(
        1, config.layout.num_slots, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    engine = Engine(model)
    ticks = [time.perf_counter()]
    with progress(num_tokens, "sampling", "tokens") as bar:

        def tick(tokens: int) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            ticks.append(time.perf_counter())
            bar.update(tokens)

        tokens = engine.generate(program, known, conditioning, sampler, uniforms, tick)

    seconds = np.diff(ticks).tolist()
    # text embeddings are looked up, not read as a whole
    read = sum(p.nbytes for p in model.parameters())
    read -= (config.vocabulary.size - codes) * config.hidden_size * model.word_embeddings.weight.element_size()
    token_seconds = statistics.median(seconds[1:])
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gigabytes": round(sum(p.nbytes for p in model.parameters()) / 1e9, 2),
        "load_seconds": round(load_seconds, 2),
        "first_token_seconds": round(seconds[0], 2),
        "token_seconds": round(token_seconds, 4),
        "read_once_seconds": round(read / bandwidth, 4),
        "ratio": round(token_seconds / (read / bandwidth), 3),
        "bandwidth_gb_per_second": round(bandwidth / 1e9, 2),
        "peak_resident_gib": round(peak_memory_mib(torch.device("cpu")) / 1024, 2),
        "device": str(device),
        "peak_gb": peak_gb(device),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "torch": torch.__version__,
        "tokens": tokens[0, :num_tokens].tolist(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=PUBLISHED)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "full_size", metavar="DIR")
    parser.add_argument("--tokens", type=int, help="how many (default: one row of a frame)")
    parser.add_argument("--threads", type=int, help="of the sampling process")
    parser.add_argument("--published", action="store_true", help="the published stage 1, whatever --config says")
    parser.add_argument("--layers", type=int, help="of the model; short for model.num_layers=N")
    add_device_argument(parser)
    parser.add_argument("--sample-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="model.key=value")
    args = parser.parse_args()
    device = device_argument(parser, args)
    weights = args.work / "weights"
    if args.sample_only:
        print(json.dumps(sample_row(weights, args.tokens, args.threads, device)))
        return 0

    overrides = [*args.overrides, *([] if args.layers is None else [f"model.num_layers={args.layers}"])]
    config = load_config(Settings, [PUBLISHED if args.published else args.config], overrides).model
    tokens = args.tokens or config.frame_side
    if not 2 <= tokens <= config.frame_len:
        parser.error(f"--tokens {tokens}; expected 2 to {config.frame_len}")
    write_seconds = None
    if not (weights / MANIFEST).is_file() or stored_config(load_checkpoint(weights, verify=False)) != config:
        need = 2 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
        args.work.mkdir(parents=True, exist_ok=True)
        free = os.statvfs(args.work).f_bavail * os.statvfs(args.work).f_frsize
        if free < need + (1 << 30):
            parser.error(f"{args.work} has {free / 1e9:.1f} GB free, the weights take {need / 1e9:.1f} GB")
        start = time.perf_counter()
        write_random(weights, config)
        write_seconds = round(time.perf_counter() - start, 1)

    words = [sys.executable, __file__, "--sample-only", "--work", str(args.work), "--tokens", str(tokens)]
    words += ["--device", str(device)]
    words += ["--threads", str(args.threads)] if args.threads else []
    done = run_child(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode
    print(json.dumps({"benchmark": "full_size", "write_seconds": write_seconds, **json.loads(done.stdout)}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "bench_full_size"))
