"""The checks of check_gpu.py that are not commands of their own; each prints a JSON line or raises an exception.

python scripts/check_gpu_parts.py attention|launcher|start|sample_twice|superres|tokenizer [--device cuda]
"""

import argparse
import copy
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from device_timing import add_device_argument, device_argument, peak_gb, timed
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cogvideo.checkpoint.format import MANIFEST
from cogvideo.cli.main import run_command
from cogvideo.config import load_config
from cogvideo.model.attention import ATTENTION
from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import initialise
from cogvideo.model.joined import JoinedPlan, attend_dense, attend_flex, flex_is_available
from cogvideo.model.plan import plan_clip
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.planning.budgets import training_budget
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.tokenizers.image import ImageTokenizer
from cogvideo.tokenizers.quantise import TokenizerLossConfig, tokenizer_loss
from cogvideo.training.config import TrainConfig
from cogvideo.training.construction import construct
from cogvideo.training.resources import machine_of, planned_settings

ROOT = Path(__file__).resolve().parents[1]
CARD_BYTES = 24e9
MAX_BF16_ERROR = 1e-2
"""Largest allowed difference of a row of attention in bfloat16, relative to its norm; rounding gives 4e-3."""
MAX_ERROR = 1e-3
"""Largest allowed difference of float32 results on two devices, relative to the largest value."""


def attention(device: torch.device) -> dict[str, Any]:
    """Milliseconds of each SDPA kernel on the published shapes, a clip and its text, or why it refuses them.

    Then those of FlexAttention, compared with all pairs of rows. Each input must be served by a kernel at least.
    """
    config = ModelConfig()
    rows = config.text_len + config.layout.num_slots
    query, key, value = (
        torch.randn(4, config.num_heads, rows, config.head_dim, device=device, dtype=torch.bfloat16) for _ in range(3)
    )
    bias = torch.zeros(4, 1, rows, rows, device=device, dtype=torch.bfloat16)
    found: dict[str, Any] = {"flex_available": flex_is_available(device, config.head_dim), "kinds": sorted(ATTENTION)}
    served = set()
    for kernel in (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.MATH,
    ):
        for name, mask, dropout in (("plain", None, 0.0), ("bias", bias, 0.0), ("bias_dropout", bias, 0.1)):

            def attend(mask: Tensor | None = mask, dropout: float = dropout) -> Tensor:
                return F.scaled_dot_product_attention(query, key, value, mask, dropout)

            try:
                with sdpa_kernel(kernel):
                    attend()
                    seconds = min(timed(device, attend)[0] for _ in range(3))
                found[f"{kernel.name.lower()}_{name}_ms"] = round(1e3 * seconds, 3)
                served.add(name)
            except RuntimeError as error:
                found[f"{kernel.name.lower()}_{name}_ms"] = f"refused: {str(error).splitlines()[0][:80]}"
    assert served == {"plain", "bias", "bias_dropout"}, f"SDPA serves only {sorted(served)}: {found}"
    if found["flex_available"]:
        found |= _flex(query, key, value, config)
    return found


def _flex(query: Tensor, key: Tensor, value: Tensor, config: ModelConfig) -> dict[str, Any]:
    """Milliseconds of FlexAttention and of all pairs of rows, for each channel of a clip, and how they differ.

    `error` is the largest of any row, relative to the norm of the row. One wrong key among a thousand exceeds it.
    """
    plan = plan_clip(config, plan_type="joined").to(query.device)
    text_bias = torch.randn(len(query), config.text_len, device=query.device, dtype=query.dtype).float()
    found: dict[str, Any] = {}
    errors = {}
    for name, channel in (("spatial", plan.spatial), ("temporal", plan.temporal[0])):
        assert isinstance(channel, JoinedPlan)
        inputs = query, key, value, text_bias, channel.with_text(config.text_len), 0.0
        flex, dense = partial(attend_flex, *inputs), partial(attend_dense, *inputs)
        expected = dense().float()
        norms = [rows.norm(dim=(1, 3)) for rows in (flex().float() - expected, expected)]
        errors[name] = float((norms[0] / norms[1]).max())
        for way, attend in (("flex", flex), ("dense", dense)):
            found[f"{way}_{name}_ms"] = round(1e3 * min(timed(query.device, attend)[0] for _ in range(3)), 3)
    return found | {"error": _within(errors, "norm of a row", MAX_BF16_ERROR)}


def launcher(device: torch.device) -> dict[str, Any]:
    """A small run under DeepSpeed's launcher that stops, with a checkpoint, a preview and an export, and is resumed."""
    machine = "1x24gb" if device.type == "cuda" else "cpu"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "1"]
        words += ["--master_port", str(port), "--module", "cogvideo", "train", "--config", "configs/train/debug.yaml"]
        words += ["--config", f"configs/deepspeed/{machine}.yaml", f"run_dir={run}", "data.embedded_clips=8"]
        words += ["train.steps=4", "log.save_every=2", "log.preview_every=2"]
        for more, last in (("train.stop_at=2", "step_00000002"), ("--resume", "step_00000004")):
            subprocess.run([*words, more], check=True, cwd=ROOT, stdout=sys.stderr)
            step = (run / "checkpoints" / "latest").read_text().strip()
            assert step == last, f"{more} ended at {step}, expected {last}"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        assert list(losses) == [1, 2, 3, 4], losses
        for path in (run / "previews" / "step_00000002.png", run / "export" / "sequential" / MANIFEST):
            assert path.is_file(), f"{path.relative_to(run)} is missing"
    return {"loss": losses[4]}


def start(device: torch.device) -> dict[str, Any]:
    """Construct the full-size stage 1 with the settings for one 24 GB GPU, with memory limited to that much.

    `planned_gb` is the planner's figure for the weights, which are all that is on the device before the first step.
    """
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / total), device)
    files = [ROOT / "configs" / name for name in ("train/paper_stage1.yaml", "deepspeed/1x24gb.yaml")]
    config = load_config(TrainConfig, files, ["train.micro_batch_size=1", "train.recompute=layer"])
    config = replace(config, init=replace(config.init, checkpoint=None))
    planned = training_budget(config.model, machine_of(device), planned_settings(config, 1))
    seconds, model = timed(
        device,
        lambda: construct(lambda: CogVideoTransformer(config.model), config, device, lambda *_: {}),
    )
    assert {p.device.type for p in model.parameters()} == {device.type}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "start_s": round(seconds, 1),
        "peak_gb": peak_gb(device),
        "weights_gb": round(sum(p.nbytes for p in model.parameters()) / 1e9, 3),
        "planned_gb": round(planned.weights / 1e9, 3),
    }


def sample_twice(device: torch.device) -> dict[str, Any]:
    """Sample twice from the bundled weights, in float32; the tokens must be the same."""
    pipeline = Pipeline.load(config=SampleConfig(device=str(device), weights="fp32"))
    config = replace(pipeline.config, rounds=1)
    (first_s, first), (second_s, second) = (
        timed(device, lambda: pipeline.sample(["the red digit 3 moves left slowly"], config)) for _ in range(2)
    )
    assert torch.equal(first, second), "the same prompt and seed gave different tokens"
    return {"first_s": round(first_s, 2), "tokens_per_s": round(second.numel() / second_s, 1)}


def superres(device: torch.device) -> dict[str, Any]:
    """Hidden states of small models of both methods on the device and on the CPU."""
    errors = {}
    for method in ("direct", "iterative"):
        config = SuperresConfig(num_layers=4, hidden_size=256, num_heads=4, method=method)
        model = SuperresTransformer(config).eval()
        initialise(model, torch.Generator().manual_seed(0))
        inputs = _superres_inputs(config)
        with torch.no_grad():
            expected = model(*inputs)
            found = copy.deepcopy(model).to(device)(*(x.to(device) for x in inputs))
        errors[method] = _error(found, expected)
    return errors | {"error": _within(errors)}


def _superres_inputs(config: SuperresConfig) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    codes = config.vocabulary.num_image_tokens
    text, low, high = (
        torch.randint(codes, (2, length), generator=generator)
        for length in (config.text_len, config.low_res_len, config.high_res_len)
    )
    mask = torch.ones_like(text, dtype=torch.bool)
    mask[0, : config.text_len // 2] = False
    return text, mask, low, high


def tokenizer(device: torch.device) -> dict[str, Any]:
    """Loss and gradients of the bundled image tokenizer on the device and on the CPU."""
    bundled = Pipeline.load(config=SampleConfig(device="cpu")).image_tokenizer
    images = torch.from_numpy(np.random.default_rng(0).integers(256, size=(4, 3, 64, 64))).float() / 255

    def losses(where: torch.device) -> tuple[Tensor, Tensor]:
        own = ImageTokenizer(bundled.config, copy.deepcopy(bundled.model).to(where).train())
        result = tokenizer_loss(own.model, own.normalise(images), own.config.level, TokenizerLossConfig(), False)
        result.loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad.flatten() for p in own.model.parameters() if p.grad is not None]
        return result.loss.detach(), torch.cat(gradients)

    (loss, gradient), (there, gradient_there) = losses(torch.device("cpu")), losses(device)
    errors = {"loss": _error(there, loss), "gradient": _error(gradient_there, gradient)}
    return {f"{name}_relative_error": error for name, error in errors.items()} | {"error": _within(errors)}


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    return float((found.cpu() - expected).abs().max() / expected.abs().max())


def _within(errors: dict[str, float], of: str = "largest value", most: float = MAX_ERROR) -> float:
    """The largest of `errors`, relative to `of`. None of them may be above `most`, or NaN."""
    good = all(error <= most for error in errors.values())
    assert good, f"errors relative to the {of} are {errors}, expected at most {most}"
    return max(errors.values())


PARTS: dict[str, Callable[[torch.device], dict[str, Any]]] = {
    part.__name__: part for part in (attention, launcher, start, sample_twice, superres, tokenizer)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    add_device_argument(parser, default="cuda")
    args = parser.parse_args()
    device = device_argument(parser, args)
    if device.type == "cpu" and args.part in ("attention", "start"):
        parser.error(f"{args.part} needs a GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is compared
    print(json.dumps(PARTS[args.part](device)))


if __name__ == "__main__":
    sys.exit(run_command(main, "check_gpu_parts"))
