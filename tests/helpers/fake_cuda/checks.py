"""Runs all checks and prints JSON: the problem of each, or null.

    python -m tests.helpers.fake_cuda.checks DEVICE.so

DEVICE.so is what `build.build` made. Each check says which functions of cogvideo may wait for the GPU, and how often.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

from tests.helpers.fake_cuda.build import load

if __name__ == "__main__":
    load(Path(sys.argv[1]))  # before anything imports PyTorch

import torch

from cogvideo.dtypes import WeightName
from cogvideo.inference.backends import install_kernels
from cogvideo.model.config import AttentionName, Recompute
from cogvideo.model.quantize import convert_weights
from cogvideo.training.config import TrainConfig
from cogvideo.training.tasks.clips import ClipObjective
from cogvideo.training.tasks.tokenizer import TokenizerObjective
from tests.helpers import models, pipelines
from tests.helpers.fake_cuda.mode import FakeCuda, fake_cuda

Check = Callable[[FakeCuda], None]
GPU = torch.device("cuda")


def train(
    kind: str, recompute: Recompute, attention: AttentionName = "auto", *, frozen: bool = False, int8: bool = False
) -> Check:
    """A training step: forward, backward, AdamW. `kind`: of models.VARIANTS."""

    def check(mode: FakeCuda) -> None:
        config = replace(TrainConfig(), train=replace(TrainConfig().train, dtype="bf16"))
        model = models.tiny_model(replace(models.TINY, dropout=0.1, **models.VARIANTS[kind]))
        batch, objective = models.tiny_batch(model.config).to(GPU), ClipObjective(model, config)
        if frozen:
            model.freeze_trunk()
        if int8:
            model.quantize_trunk()
        model.to(GPU)
        model.recompute = recompute
        install_kernels(model, GPU, attention)
        model.train()
        loss, _ = objective(batch)
        loss.backward()
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert learning, "nothing learns"
        for parameter in learning:
            assert parameter.grad is not None and parameter.grad.device.type == "cuda", "a gradient is missing"
        torch.optim.AdamW(learning).step()
        _expect(mode, {"ClipObjective.forward": 1})  # the losses, for metrics

    return check


def train_tokenizer(mode: FakeCuda) -> None:
    tokenizer = pipelines.image_tokenizer()
    tokenizer.model.to(GPU).train()
    objective = TokenizerObjective(tokenizer, TrainConfig())
    objective.use_codes = True
    loss, _ = objective(torch.zeros(2, 3, 16, 16, dtype=torch.uint8).to(GPU))
    loss.backward()


def sample(schedule: str, weights: WeightName = "fp32") -> Check:
    """First frame, key frames and a round, with guidance, for prompts of different lengths."""

    def check(mode: FakeCuda) -> None:
        pipeline = pipelines.pipeline()
        for model in {pipeline.trunk, pipeline.sequential, pipeline.interpolation}:
            assert model is not None
            convert_weights(model, weights, torch.float32 if weights == "fp32" else torch.bfloat16)
            model.to(GPU)
            install_kernels(model, GPU)
        pipeline.image_tokenizer.model.to(GPU)
        config = replace(pipeline.config, schedule=schedule, rounds=1)
        tokens = pipeline.sample(["a", "a longer prompt"], config)
        assert tokens.shape == (2, 9, 4)
        allowed = {"Engine.generate"}
        if schedule == "speculative":
            allowed.add("decode_speculative")
        _expect(mode, dict.fromkeys(allowed))

    return check


def mixed_devices_are_noticed(mode: FakeCuda) -> None:
    try:
        torch.zeros(3, device=GPU) + torch.zeros(3)
    except Exception as error:
        assert "same device" in str(error), error
    else:
        raise AssertionError("a sum over two devices passed")


def unexpected_syncs_are_noticed(mode: FakeCuda) -> None:
    pipelines.image_tokenizer().model.to(GPU).quantize.embed.weight.sum().item()
    assert len(mode.syncs) == 1, mode.syncs


def _expect(mode: FakeCuda, allowed: dict[str, int | None]) -> None:
    """Syncs in these functions only, and as many as given; None: any number."""
    seen = Counter(mode.syncs)
    unexpected = seen.keys() - allowed.keys()
    assert not unexpected, f"waits for the GPU in {', '.join(sorted(unexpected))}"
    for function, count in allowed.items():
        assert count is None or seen[function] <= count, f"waits {seen[function]} times in {function}, expected {count}"


NARROW: tuple[WeightName, ...] = ("bf16", "int8", "int4")
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
CHECKS: dict[str, Check] = {
    "mixed devices": mixed_devices_are_noticed,
    "unexpected syncs": unexpected_syncs_are_noticed,
    **{f"train {kind} {how}": train(kind, how) for kind in models.VARIANTS for how in RECOMPUTES},
    **{f"train {kind} blocks": train(kind, "nothing", "sdpa") for kind in models.VARIANTS},
    **{f"train sequential {how} frozen": train("sequential", how, frozen=True) for how in RECOMPUTES},
    **{f"train sequential {how} int8 trunk": train("sequential", how, frozen=True, int8=True) for how in RECOMPUTES},
    "train tokenizer": train_tokenizer,
    **{f"sample {schedule}": sample(schedule) for schedule in ("sequential", "wavefront", "speculative")},
    **{f"sample {weights}": sample("sequential", weights) for weights in NARROW},
}


def main() -> None:
    only = sys.argv[2:]
    problems: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        if only and name not in only:
            continue
        try:
            with fake_cuda() as mode:
                check(mode)
            problems[name] = None
        except Exception as error:
            if only:
                raise
            problems[name] = f"{type(error).__name__}: {str(error)[:300]}"
    print(json.dumps(problems, indent=1))


if __name__ == "__main__":
    main()
