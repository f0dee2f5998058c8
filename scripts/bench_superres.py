"""Speed and memory of super-resolution on a CPU, against attention with dense masks: prints one JSON line per method.

    python scripts/bench_superres.py                      # 6 layers of 512, 20x20 -> 60x60 tokens, one frame
    python scripts/bench_superres.py --quick              # seconds, to try the script; too small to measure speed

Random weights in float32, a caption of 20 tokens. `direct` is the direct model's forward pass, which draws a frame;
`iterative` is one of the iterative model's six. `ours` is `SuperresTransformer.forward`; `dense` is the same function
with text, coarse grid and fine grid in one sequence, where all scores are computed and then masked; `fused` is the same
with PyTorch's fused attention and a dense mask, without storing scores. Each is measured in its own process.

`cpu_s` is the CPU time of a forward pass (median, without the first) and `attention_s` the part of it from queries,
keys and values to the weighted sum of values, which is all that differs; the rest is mostly matrix products.
`memory_mb` is the peak resident memory of the first forward pass above that of the process with its weights.
`difference` is the largest difference of hidden states from ours, relative to our root mean square, and `other_tokens`
how many of the likeliest tokens differ. This is not a test: it neither passes nor fails.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_train import resident_mb
from einops import rearrange
from torch import Tensor

from cogvideo.cli.main import run_command
from cogvideo.model.initialise import initialise
from cogvideo.recipes.steps import run_child
from cogvideo.sequence.layout import Vocabulary
from cogvideo.superres import transformer
from cogvideo.superres.batch import pad_captions
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.grid import redraw_mask
from cogvideo.superres.transformer import COARSE_NEIGHBOURHOOD, FINE_NEIGHBOURHOOD, SuperresTransformer

METHODS = ("direct", "iterative")
VARIANTS = ("ours", "dense", "fused")
SIZES = ("layers", "hidden", "heads", "threads", "repeats")
COMPARED = ("cpu_s", "attention_s", "memory_mb")
CAPTION_LEN = 20
ROWS_PER_CHUNK = 1024
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Takes query, key, value (batch, heads, rows, head_dim) and a mask (rows, rows), True where a row attends to a key."""


def model_config(args: argparse.Namespace) -> SuperresConfig:
    side, codes = (4, 100) if args.quick else (20, 20000)
    return SuperresConfig(
        method=args.method,
        num_layers=args.layers,
        hidden_size=args.hidden,
        num_heads=args.heads,
        low_res_side=side,
        high_res_side=3 * side,
        vocabulary=Vocabulary(codes + 480, codes, pad=codes, newline=codes + 1, start_of_image=codes + 2),
    )


def random_inputs(config: SuperresConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of `SuperresTransformer.forward` for one frame; the positions that the first round draws are masked."""
    generator = torch.Generator().manual_seed(1)
    codes, boi = config.vocabulary.num_image_tokens, config.vocabulary.start_of_image
    caption = torch.randint(codes + 3, config.vocabulary.size, (CAPTION_LEN,), generator=generator)
    low_res = torch.randint(codes, (1, config.low_res_len), generator=generator)
    high_res = torch.randint(codes, (1, config.high_res_len), generator=generator)
    hidden = redraw_mask(config.high_res_side, 1) if config.method == "iterative" else torch.ones_like(high_res[0]) > 0
    return *pad_captions([caption.tolist()], config), low_res, high_res.masked_fill(hidden, boi)


def dense_mask(config: SuperresConfig, text_mask: Tensor) -> Tensor:
    """Which rows of text, coarse grid and fine grid attend to which, from the definition: (rows, rows) bool."""
    words, context = config.text_len, config.text_len + config.low_res_len
    mask = torch.zeros(context + config.high_res_len, context + config.high_res_len, dtype=torch.bool)
    mask[:context, :words] = text_mask
    mask[words:context, words:context] = True
    places = torch.arange(config.high_res_len)
    y, x = places // config.high_res_side, places % config.high_res_side

    def near(key_side: int, neighbourhood: tuple[int, int]) -> Tensor:
        keys, ratio = torch.arange(key_side**2), config.high_res_side // key_side
        rows = (y[:, None] // ratio - keys // key_side).abs() <= neighbourhood[0] // 2
        return rows & ((x[:, None] // ratio - keys % key_side).abs() <= neighbourhood[1] // 2)

    mask[context:, context:] = near(config.high_res_side, FINE_NEIGHBOURHOOD)
    if config.method == "direct":
        mask[context:, words:context] = near(config.low_res_side, COARSE_NEIGHBOURHOOD)
    else:
        mask[context:, :words] = text_mask
    return mask


def dense_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value


def fused_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, mask)


def dense_forward(
    model: SuperresTransformer, text: Tensor, text_mask: Tensor, low_res: Tensor, high_res: Tensor, attend: Attention
) -> Tensor:
    """The same function as `model`, of one frame: text, coarse grid and fine grid in one sequence."""
    config, context = model.config, text.shape[1] + low_res.shape[1]
    mask = dense_mask(config, text_mask[0])
    first = config.low_res_position_start
    text_positions = (text_mask.cumsum(1) - 1).clamp(min=0)
    positions = torch.cat([text_positions, torch.arange(first, first + low_res.shape[1])[None]], dim=1)
    embedded = torch.cat([model.position_embeddings(positions), model.extra_position_embeddings.weight[None]], dim=1)
    x = model.word_embeddings(torch.cat([text, low_res, high_res], dim=1)) + embedded
    for layer in model.layers:
        grid_attention = layer.high_res_attention if config.method == "direct" else layer.attention
        normed = layer.input_layernorm(x)
        parts = zip(layer.attention.heads(normed[:, :context]), grid_attention.heads(normed[:, context:]), strict=True)
        query, key, value = (torch.cat(part, dim=2) for part in parts)
        attended = rearrange(attend(query, key, value, mask), "b h s d -> b s (h d)")
        of_context, of_grid = layer.attention.dense(attended[:, :context]), grid_attention.dense(attended[:, context:])
        x = layer._finish_rows(x, torch.cat([of_context, of_grid], dim=1))
    hidden: Tensor = model.final_layernorm(x[:, context:])
    return hidden


class Timed:
    """A function that counts the CPU time spent in it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Tensor:
        start = time.process_time()
        result = self.function(*arguments)
        self.seconds += time.process_time() - start
        return result


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant of one method in this process, and save the hidden states."""
    torch.set_num_threads(args.threads)
    config = model_config(args)
    model = SuperresTransformer(config).eval()
    initialise(model, torch.Generator().manual_seed(0))
    inputs = random_inputs(config)
    if args.variant == "ours":
        attention = Timed(transformer.attend_in_tiles)
        transformer.attend_in_tiles = attention
        forward: Callable[[], Tensor] = lambda: model(*inputs)  # noqa: E731
    else:
        attention = Timed({"dense": dense_attention, "fused": fused_attention}[args.variant])
        forward = lambda: dense_forward(model, *inputs, attention)  # noqa: E731
    torch.randn(512, 512) @ torch.randn(512, 512)  # so that the first product's allocations are not counted
    idle_mb = resident_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    hidden = forward()
    peak_mb = resident_mb("VmHWM")
    torch.save(hidden, args.save)
    total, parts = [], []
    for _ in range(args.repeats):
        start, attention.seconds = time.process_time(), 0.0
        forward()
        total.append(time.process_time() - start)
        parts.append(attention.seconds)
    return {
        "cpu_s": round(statistics.median(total), 3),
        "attention_s": round(statistics.median(parts), 3),
        "memory_mb": round(peak_mb - idle_mb, 1),
        "peak_rss_mb": round(peak_mb, 1),
    }


@torch.inference_mode()
def compare(args: argparse.Namespace, hidden: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """How far the hidden states of other variants are from ours, and how many of the likeliest tokens differ."""
    model = SuperresTransformer(config := model_config(args))
    initialise(model, torch.Generator().manual_seed(0))
    ours = hidden.pop("ours")
    assert ours.shape == (1, config.high_res_len, config.hidden_size)
    found = {}
    for name, other in hidden.items():
        pairs = zip(ours.split(ROWS_PER_CHUNK, 1), other.split(ROWS_PER_CHUNK, 1), strict=True)
        tokens = sum(int((model.logits(a).argmax(-1) != model.logits(b).argmax(-1)).sum()) for a, b in pairs)
        difference = float((ours - other).abs().max() / ours.square().mean().sqrt())
        found[name] = {"difference": difference, "other_tokens": tokens}
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3, help="measured forward passes (default: 3)")
    parser.add_argument("--quick", action="store_true", help="4x4 -> 12x12 tokens")
    parser.add_argument("--method", choices=METHODS, help="only this one")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    args = make_parser().parse_args()
    for name in SIZES:
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} is below 1")
    if args.variant is not None:
        print(json.dumps(measure(args)))
        return 0
    sizes = [f"--{name}={getattr(args, name)}" for name in SIZES] + ["--quick"] * args.quick
    for method in [args.method] if args.method else METHODS:
        args.method = method
        results, hidden = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            for variant in VARIANTS:
                file = Path(folder) / f"{variant}.pt"
                words = [sys.executable, __file__, *sizes, "--method", args.method, "--variant", variant]
                done = run_child([*words, "--save", str(file)], stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    return done.returncode
                results[variant], hidden[variant] = json.loads(done.stdout), torch.load(file)
        ours = results["ours"]
        for name, apart in compare(args, hidden).items():
            # a tiny model may take too little time to measure
            ratios = {each: round(results[name][each] / ours[each], 1) if ours[each] else None for each in COMPARED}
            results[name] |= apart | {f"{each}_over_ours": ratio for each, ratio in ratios.items()}
        print(json.dumps({"benchmark": "superres", "method": args.method, **results}))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, "bench_superres"))
