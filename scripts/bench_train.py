"""Speed and memory of a training step: prints one JSON line.

    python scripts/bench_train.py --task sequential --baseline
    python scripts/bench_train.py --task interpolation --dtype bf16 --steps 5
    python scripts/bench_train.py --quick --baseline        # seconds, to try the script; too small to measure speed
    python scripts/bench_train.py --device cuda --published --layers 4 --dtype bf16 --micro-batch 4

One clip of 64 text rows and five frames of 20x20 tokens, 20,000 image tokens, a vocabulary of 20,480, the trunk frozen,
no dropout, AdamW, 2 threads; windows of 10 in interpolation. `--baseline` also measures scripts/dense_step.py. Each is
measured in its own process, without the first step.

`step_s_*` and `cpu_s` (median) are seconds of forward, backward and update. `peak_rss_mb` is the process's peak
resident memory, `idle_rss_mb` its resident memory after the imports; `memory_part` is the difference of the two for the
lean step, relative to the dense one. `loss` is the first step's, before any update. `gflops` counts the FLOPs that the
model's definition needs (visible keys and supervised rows only, no gradients of frozen weights), whatever is actually
computed; `matmul_gflops` is measured on a large matrix product in the same run, and `matmul_ratio` is `gflops` relative
to it. This is not a test: it neither passes nor fails.

`--published` uses the published width and vocabulary, with `--layers` of the 48 layers. On a GPU, steps are timed with
CUDA events; `peak_gb` is the peak memory of tensors, `planned_gb` what `cogvideo inspect` predicts for the step without
DeepSpeed, and `mfu` the step's useful FLOPS relative to the vendor's figure for dense bf16.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_timing import add_device_argument, device_argument, peak_gb, timed
from torch import Tensor

from cogvideo.cli.main import run_command
from cogvideo.inference.backends import install_kernels
from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import initialise
from cogvideo.model.masks import channel_masks
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.planning.budgets import TrainingSettings, training_budget
from cogvideo.planning.counts import attention_pairs, training_flops
from cogvideo.planning.machines import machine_like
from cogvideo.recipes.steps import run_child
from cogvideo.sequence.batch import Batch
from cogvideo.sequence.layout import Vocabulary
from cogvideo.training.launch import tune_allocator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def model_config(args: argparse.Namespace) -> ModelConfig:
    if args.published:
        window = 10 if args.task == "interpolation" else None
        return ModelConfig(
            task=args.task, num_layers=args.layers, window_size=window, dropout=0.0, attention_dropout=0.0
        )
    side, text_len, codes = (4, 8, 100) if args.quick else (20, 64, 20000)
    window = side // 2 if args.task == "interpolation" else None
    return ModelConfig(
        task=args.task,
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.heads,
        text_len=text_len,
        frame_side=side,
        window_size=window,
        dropout=0.0,
        attention_dropout=0.0,
        vocabulary=Vocabulary(codes + 480, codes, pad=codes, newline=codes + 1, start_of_image=codes + 2),
    )


def random_batch(config: ModelConfig, clips: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    words, codes = config.vocabulary.size, config.vocabulary.num_image_tokens
    text = torch.randint(codes + 3, words, (clips, config.text_len), generator=generator)
    frames = torch.randint(codes, (clips, config.layout.num_frames, config.frame_len), generator=generator)
    return Batch(text, torch.ones_like(text, dtype=torch.bool), frames, torch.full((clips,), 4.0))


def useful_flops(config: ModelConfig) -> float:
    """FLOPs of a step on one clip: `training_flops`, but counting visible keys instead of whole blocks."""
    spatial, temporal = channel_masks(config.layout, config.window_size)
    slots = np.arange(config.layout.num_slots)

    def visible(mask: Any) -> int:
        return int(mask.allowed(slots[:, None], slots[None]).sum()) + len(slots) * config.text_len

    pairs = visible(spatial) + sum(map(visible, temporal)) / len(temporal)
    # forward: q.k and weights.v, 2 FLOPs each per channel; backward: 2.5 times that, as scores are recomputed
    flops_per_pair = 4 * config.hidden_size * config.num_layers * 3.5
    return sum(training_flops(config, frozen_trunk=True)) - flops_per_pair * (attention_pairs(config) - pairs)


def resident_mb(field: str) -> float:
    """VmRSS (current) or VmHWM (peak) of this process; unlike getrusage's, not inherited from the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure steps of one variant in this process."""
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.recompute != "nothing":
        tune_allocator()  # as `cogvideo train` does; for both variants
    if args.variant == "dense":
        from dense_step import DenseStep
    idle_mb = resident_mb("VmRSS")
    device = torch.device(args.device)
    config = model_config(args)
    model = CogVideoTransformer(config)
    initialise(model, torch.Generator().manual_seed(0))
    model.train().freeze_trunk()
    if args.trunk_weights != "full":
        model.quantize_trunk(args.trunk_weights)
    model.to(device)
    model.recompute = args.recompute
    install_kernels(model)  # as the training tasks do
    batch = random_batch(config, args.micro_batch).to(device)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    step_loss: Callable[[Batch], Tensor]
    step_loss = DenseStep(model) if args.variant == "dense" else lambda b: model.token_losses(b).mean()

    def step() -> Tensor:
        with torch.autocast(device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32"):
            loss = step_loss(batch)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    losses, wall, cpu = [], [], []
    for _ in range(args.steps + 1):
        cpu_start = time.process_time()
        seconds, loss = timed(device, step)
        losses.append(loss.item())
        wall.append(seconds)
        cpu.append(time.process_time() - cpu_start)
    return {
        "step_s_min": round(min(wall[1:]), 4),
        "step_s_median": round(statistics.median(wall[1:]), 4),
        "cpu_s": round(statistics.median(cpu[1:]), 4),
        "peak_rss_mb": round(resident_mb("VmHWM")),
        "idle_rss_mb": round(idle_mb),
        "peak_gb": peak_gb(device),
        "loss": round(losses[0], 6),
    }


def matmul_gflops(args: argparse.Namespace) -> float:
    """GFLOPS of a large matrix product, the best of several."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    size = 256 if args.quick else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(DTYPES[args.dtype]) for _ in range(2))
    best = min(timed(device, lambda: a @ b)[0] for _ in range(6))
    return 2 * size**3 / best / 1e9


def measure_in_own_process(variant: str) -> dict[str, Any]:
    words = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
    done = run_child(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_argument(parser)
    parser.add_argument("--task", choices=("sequential", "interpolation"), default="sequential")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="bf16: autocast over float32 weights")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--baseline", action="store_true", help="also measure the dense step")
    parser.add_argument(
        "--recompute",
        choices=("nothing", "mlp", "layer"),
        default="nothing",
        help="activations recomputed in the lean step's backward pass",
    )
    parser.add_argument("--micro-batch", type=int, default=1, help="clips per step")
    parser.add_argument(
        "--trunk-weights", choices=("full", "int8", "float8"), default="full", help="of the frozen trunk"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--published", action="store_true", help="the published width; --hidden and --heads are ignored")
    size.add_argument("--quick", action="store_true", help="frames of 4x4 and a small vocabulary")
    parser.add_argument("--variant", choices=("lean", "dense"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("hidden", "layers", "heads", "steps", "threads", "micro_batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}; expected at least 1")
    device = device_argument(parser, args)
    args.device = str(device)
    if args.baseline and device.type == "cuda":
        parser.error("--baseline is for a CPU; leave out --device")
    try:
        config = model_config(args)
    except ValueError as error:
        parser.error(str(error))
    if args.variant:
        print(json.dumps(measure(args)))
        return

    before = matmul_gflops(args)
    lean = measure_in_own_process("lean")
    report = {"benchmark": "train", "task": args.task, "dtype": args.dtype, "threads": args.threads}
    report |= {"recompute": args.recompute, **lean}
    if args.baseline:
        dense = measure_in_own_process("dense")
        report |= {f"baseline_{name}": value for name, value in dense.items()}
        report["speedup"] = round(dense["step_s_min"] / lean["step_s_min"], 2)
        above_idle = [run["peak_rss_mb"] - run["idle_rss_mb"] for run in (lean, dense)]
        report["memory_part"] = round(above_idle[0] / above_idle[1], 3)
    matmul = max(before, matmul_gflops(args))
    gflops = args.micro_batch * useful_flops(config) / lean["step_s_min"] / 1e9
    tokens = args.micro_batch * (config.text_len + config.layout.num_slots)
    report |= {"device": args.device, "tokens_per_s": round(tokens / lean["step_s_median"], 1)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine = machine_like(properties.name, properties.total_memory)
        settings = TrainingSettings(
            micro_batch=args.micro_batch,
            zero_stage=0,
            recompute=args.recompute,
            trunk_weights=args.trunk_weights,
            weights="fp32",
            products=args.dtype,
        )
        report |= {
            "gpu": properties.name,
            "planned_gb": round(training_budget(config, machine, settings).total / 1e9, 3),
            "mfu": round(gflops * 1e9 / machine.flops, 4),
        }
    report |= {
        "gflops": round(gflops, 1),
        "matmul_gflops": round(matmul, 1),
        "matmul_ratio": round(gflops / matmul, 3),
        "torch": torch.__version__,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(run_command(main, "bench_train"))
