"""Runs checks on fake tensors of a GPU and prints a JSON object per line: the name of each, and its problem or null.

    python -m tests.helpers.fake_cuda.checks DEVICE.so quick|slow|NAME ...

DEVICE.so is what `build.build` made.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from typing import Any, Literal, get_args
from unittest import mock

from tests.helpers.fake_cuda.build import load

if __name__ == "__main__":
    load(Path(sys.argv[1]))  # before anything imports PyTorch

import numpy as np
import torch
from torch import nn

from cogvideo.dtypes import WeightName
from cogvideo.evaluation.likelihood import token_losses
from cogvideo.inference import backends
from cogvideo.inference.backends import install_kernels
from cogvideo.inference.engine import Engine
from cogvideo.model.config import AttentionName, Recompute
from cogvideo.model.quantize import convert_weights
from cogvideo.model.transformer import TrunkModel
from cogvideo.sampling.config import UpsampleConfig
from cogvideo.sampling.superres import Upsampler
from cogvideo.training.config import TrainConfig
from cogvideo.training.optimiser import make_optimiser
from cogvideo.training.previews import PreviewWriter
from cogvideo.training.tasks.base import read_metrics
from cogvideo.training.tasks.clips import ClipObjective, ClipTask
from cogvideo.training.tasks.superres import SuperresObjective
from cogvideo.training.tasks.tokenizer import TokenizerTask
from tests.helpers import models, pipelines, superres, training
from tests.helpers.fake_cuda.mode import FakeCuda, fake_cuda

Check = Callable[[FakeCuda], None]
Trunk = Literal["trained", "frozen", "int8", "float8"]
GPU = torch.device("cuda")

ALLOWED_SYNCS = {
    "read_metrics": "a step's losses are read at once, after its last backward pass",
    "Pipeline.labels": "codes are clustered on the host, once per pipeline",
    "Engine.generate": "a stage's tokens go back to the host",
    "decode_speculative": "how many guesses were right decides what is decoded next; see its docstring for the cost",
    "Upsampler.upsample_frames": "the fine tokens go back to the host",
    "token_losses": "scores go to a file on the host",
    "VQVAE.decode": "ids are checked before they index the codebook; pixels go to the host anyway",
    "_pixels": "pixels go to the host",
}
"""Functions that may wait for the GPU, and why; anywhere else it is a failure."""


def train_step(mode: FakeCuda, objective: nn.Module, batch: Any, unused: str | None = None) -> None:
    """Forward, backward, AdamW, as the trainer does: one wait, for the metrics.

    `unused`: a part of the names of parameters that do not reach the loss.
    """
    config = TrainConfig().optimiser
    optimiser = make_optimiser(objective, config)
    loss, metrics = objective(batch)
    loss.backward()
    assert not mode.syncs, f"waits for the GPU between micro-batches, in {', '.join(mode.syncs)}"
    read_metrics([metrics, metrics])
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad and (unused is None or unused not in name):
            assert parameter.grad is not None and parameter.grad.device.type == "cuda", f"no gradient of {name}"
    optimiser.step()
    _expect(mode, read_metrics=1)


def place(model: TrunkModel, recompute: Recompute, trunk: Trunk) -> None:
    if trunk != "trained":
        model.freeze_trunk()
    if trunk == "int8" or trunk == "float8":
        model.quantize_trunk(trunk)
    model.to(GPU)
    model.recompute = recompute
    model.train()


def train_clips(kind: str, recompute: Recompute, trunk: Trunk = "trained", attention: AttentionName = "auto") -> Check:
    """`kind`: of models.VARIANTS."""

    def check(mode: FakeCuda) -> None:
        config = replace(TrainConfig(), train=replace(TrainConfig().train, dtype="bf16"))
        model = models.tiny_model(replace(models.TINY, num_layers=2, dropout=0.1, **models.VARIANTS[kind]))
        place(model, recompute, trunk)
        install_kernels(model, GPU, attention)
        train_step(mode, ClipObjective(model, config), models.tiny_batch(model.config).to(GPU))

    return check


def train_superres(method: str, recompute: Recompute, trunk: Trunk = "trained") -> Check:
    def check(mode: FakeCuda) -> None:
        config = replace(TrainConfig(), train=replace(TrainConfig().train, dtype="bf16"))
        model = superres.tiny_superres(replace(superres.TINY_CONFIGS[method], dropout=0.1, attention_dropout=0.1))
        place(model, recompute, trunk)
        batch = superres.tiny_superres_batch(model.config, frames=2).select(slice(None), GPU)
        # of the direct model's last layer only rows of large frames are needed, which pass another output layer
        unused = f"layers.{model.config.num_layers - 1}.attention.dense." if method == "direct" else None
        train_step(mode, SuperresObjective(model, config), batch, unused)

    return check


def train_tokenizer(mode: FakeCuda) -> None:
    """A real task: a step without codes, one with them and the update of the codebook, and a sheet."""
    with tempfile.TemporaryDirectory() as folder:
        data = training.prepare_data(Path(folder))
        task = TokenizerTask(training.settings(data, data / "run", "tokenizer"), GPU)
        batch = next(task.batches(0))
        for use_codes in (False, True):
            mode.syncs.clear()
            task.objective.use_codes = use_codes
            train_step(mode, task.objective.train(), task.micro_batch(batch, 0, 2))
            if use_codes:
                task.after_step(2, is_updated=True)  # not 3, when dead codes are revived: how many, the host must know
            task.objective.forwards.clear()
        _expect(mode, read_metrics=1)
        mode.syncs.clear()
        PreviewWriter(None).write(task, 1, data / "sheet.png")
        assert (data / "sheet.png").stat().st_size > 0
        _expect(mode, **{"VQVAE.decode": None, "_pixels": None})


def start_and_preview(mode: FakeCuda) -> None:
    """A real task: its weights are made on the GPU, a step, and a sample sheet up to its tokens."""
    from cogvideo.training import previews

    with tempfile.TemporaryDirectory() as folder:
        data = training.prepare_data(Path(folder))
        task = ClipTask(training.settings(data, data / "run", train={"dtype": "bf16", "weights": "dtype"}), GPU)
        assert {p.device.type for p in task.model.parameters()} == {"cuda"}
        assert {p.dtype for p in task.model.parameters()} == {torch.bfloat16}
        assert not mode.syncs, f"waits for the GPU at the start, in {', '.join(mode.syncs)}"
        train_step(mode, task.objective.train(), task.micro_batch(next(task.batches(0)), 0, 2))
        mode.syncs.clear()
        task.objective.eval()
        with torch.no_grad():
            real, drawn, captions = previews._generate_clips(task, task.preview_batch(previews.ROWS))
        assert real.shape == drawn.shape and len(captions) == len(real)
        _expect(mode, **{"Engine.generate": 1})


def pipeline_on_gpu(weights: WeightName) -> Any:
    pipeline = pipelines.pipeline()
    for model in {pipeline.trunk, pipeline.sequential, pipeline.interpolation}:
        assert model is not None
        convert_weights(model, weights, torch.float32 if weights == "fp32" else torch.bfloat16)
        model.to(GPU)
        install_kernels(model, GPU)
    pipeline.image_tokenizer.model.to(GPU)
    return pipeline


def sample(schedule: str, weights: WeightName = "bf16") -> Check:
    """First frame, key frames and a round, with guidance, for prompts of different lengths, then their pixels."""

    def check(mode: FakeCuda) -> None:
        pipeline = pipeline_on_gpu(weights)
        config = replace(pipeline.config, schedule=schedule, rounds=1)
        tokens = pipeline.sample(["a", "a longer prompt"], config)
        assert tokens.shape == (2, 9, 4)
        guesses = {"decode_speculative": None} if schedule == "speculative" else {}
        _expect(mode, **{"Pipeline.labels": 1, "Engine.generate": 3}, **guesses)
        mode.syncs.clear()
        pixels = pipeline.image_tokenizer.decode(tokens.flatten(0, 1)).numpy(force=True)
        assert isinstance(pixels, np.ndarray)
        _expect(mode, **{"VQVAE.decode": 1, "outside": 1})

    return check


class NoGraphs:
    """Stands in for `kernels.graphs.Graphs`: what would be recorded runs each time."""

    def run(self, key: object, function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
        return function(*inputs)


def sample_by_graphs(mode: FakeCuda) -> None:
    """Steps as CUDA graphs record them, from input tokens to drawn tokens: no wait, or they could not be recorded."""
    pipeline = pipeline_on_gpu("bf16")
    with (
        mock.patch("cogvideo.kernels.graphs.Graphs", NoGraphs),
        mock.patch.object(
            backends, "compile_layer", lambda layer: lambda module, *words, **named: module(*words, **named)
        ),
    ):
        models_of = (pipeline.trunk, pipeline.sequential, pipeline.interpolation)
        pipeline.engines = {id(model): Engine(model, "compiled") for model in models_of}
        tokens = pipeline.sample(["a", "a longer prompt"], replace(pipeline.config, rounds=1))
    assert tokens.shape == (2, 9, 4)
    _expect(mode, **{"Pipeline.labels": 1, "Engine.generate": 3})


def prefill_and_steps(mode: FakeCuda) -> None:
    """Given frames, then the sampling of tokens: no wait in either, only at the end."""
    pipeline = pipeline_on_gpu("bf16")
    seen: list[tuple[str, int]] = []
    prefill = Engine.prefill

    def watched_prefill(engine: Engine, *words: Any) -> Any:
        logits = prefill(engine, *words)
        seen.append(("prefill", len(mode.syncs)))
        return logits

    def progress(tokens: int) -> None:
        seen.append(("step", len(mode.syncs)))

    with mock.patch.object(Engine, "prefill", watched_prefill):
        keys, prompts = pipelines_inputs(pipeline)
        frames = torch.zeros(1, 5, 4, dtype=torch.int64)
        config = replace(pipeline.config, rounds=1)
        (output,) = pipeline.interpolate(frames, keys, prompts, config, progress=progress)
    assert output.tokens.shape == (1, 9, 4)
    assert {name for name, _ in seen} == {"prefill", "step"}
    assert mode.syncs == ["Pipeline.labels", "Engine.generate"], mode.syncs
    assert {count for _, count in seen} == {1}, "waits during prefill or steps"


def pipelines_inputs(pipeline: Any) -> tuple[Any, Any]:
    from cogvideo.rng import sample_keys

    return sample_keys(0, ["a"], 1), pipeline.encode_interpolation_prompts(["a"], replace(pipeline.config, rounds=1), 5)


def upsample(mode: FakeCuda) -> None:
    """Both super-resolution models, all rounds."""
    from cogvideo.rng import SampleKey

    built = {method: superres.tiny_superres(config).eval().to(GPU) for method, config in superres.TINY_CONFIGS.items()}
    tokenizer = pipelines.image_tokenizer()
    upsampler = Upsampler(
        built["direct"],
        built["iterative"],
        tokenizer,
        tokenizer,
        lambda text: [50, 51],
        np.arange(40) % 8,
        UpsampleConfig(),
    )
    fine = upsampler.upsample_frames(torch.zeros(2, 16, dtype=torch.int64), SampleKey(0, "", 0), [50, 51], range(2))
    assert fine.shape == (2, 144) and fine.device.type == "cpu"
    _expect(mode, **{"Upsampler.upsample_frames": 1})


def score(mode: FakeCuda) -> None:
    """The likelihood of clips, as `cogvideo score` and `eval` compute it."""
    model = models.tiny_model(models.tiny_config("interpolation", window_size=2)).to(GPU)
    install_kernels(model)
    losses = token_losses(model, model.plan_clip(GPU), models.tiny_batch(model.config))
    assert losses.shape == (2, 5, 16)
    _expect(mode, token_losses=1)


def encode_images(mode: FakeCuda) -> None:
    tokenizer = pipelines.image_tokenizer()
    tokenizer.model.to(GPU)
    assert tokenizer.encode(torch.zeros(3, 3, 16, 16)).device.type == "cuda"
    _expect(mode)


def mixed_devices_are_noticed(mode: FakeCuda) -> None:
    try:
        torch.zeros(3, device=GPU) + torch.zeros(3)
    except Exception as error:
        assert "same device" in str(error), error
    else:
        raise AssertionError("a sum over two devices passed")


def unexpected_syncs_are_noticed(mode: FakeCuda) -> None:
    x = torch.zeros(3, device=GPU)
    x.sum().item()
    x.cpu()
    bool(x.isfinite().all())
    assert len(mode.syncs) == 3, mode.syncs
    for waits in (lambda: x[x > 0], lambda: x.nonzero(), lambda: torch.equal(x, x), lambda: x.long().bincount()):
        try:
            waits()
        except AssertionError as error:
            assert "waits for the GPU" in str(error)
        else:
            raise AssertionError("an output whose shape depends on values passed")


def _expect(mode: FakeCuda, **allowed: int | None) -> None:
    """Syncs in these functions only, and no more of them than given; None: any number."""
    unexplained = allowed.keys() - ALLOWED_SYNCS.keys() - {"outside"}
    assert not unexplained, f"ALLOWED_SYNCS gives no reason for {unexplained}"
    seen = Counter(mode.syncs)
    unexpected = seen.keys() - allowed.keys()
    assert not unexpected, f"waits for the GPU in {', '.join(sorted(unexpected))}"
    for function, count in allowed.items():
        assert count is None or seen[function] <= count, f"waits {seen[function]} times in {function}, expected {count}"


RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)
TRUNKS: tuple[Trunk, ...] = get_args(Trunk)
ALTERNATING = ("sequential", "interpolation", "interpolation", "sequential", "interpolation")
"""Each `recompute` and each trunk with both stages, in half as many checks as all combinations."""
QUICK: dict[str, Check] = {
    "mixed devices": mixed_devices_are_noticed,
    "unexpected syncs": unexpected_syncs_are_noticed,
    "train image": train_clips("image", "nothing"),
    "train sequential nothing": train_clips("sequential", "nothing"),
    "train sequential mlp frozen": train_clips("sequential", "mlp", "frozen"),
    "train sequential layer int8": train_clips("sequential", "layer", "int8"),
    "train sequential mlp float8": train_clips("sequential", "mlp", "float8"),
    "train interpolation layer frozen": train_clips("interpolation", "layer", "frozen"),
    "train superres direct frozen": train_superres("direct", "mlp", "frozen"),
    "train superres iterative": train_superres("iterative", "layer"),
    "train tokenizer": train_tokenizer,
    "start and preview": start_and_preview,
    **{f"sample {schedule}": sample(schedule) for schedule in ("sequential", "wavefront", "speculative")},
    "sample by graphs": sample_by_graphs,
    "prefill and steps": prefill_and_steps,
    "upsample": upsample,
    "score": score,
    "encode images": encode_images,
}
SLOW: dict[str, Check] = {
    **{
        f"train {kind} {recompute} {trunk}": train_clips(kind, recompute, trunk)
        for (recompute, trunk), kind in zip(product(RECOMPUTES, TRUNKS), cycle(ALTERNATING), strict=False)
    },
    **{f"train {kind} mlp": train_clips(kind, "mlp") for kind in models.VARIANTS},
    **{f"train {kind} sdpa": train_clips(kind, "nothing", attention="sdpa") for kind in models.VARIANTS},
    **{
        f"train superres direct {recompute} {trunk}": train_superres("direct", recompute, trunk)
        for recompute, trunk in zip(cycle(RECOMPUTES), TRUNKS, strict=False)
    },
    **{f"train superres iterative {recompute}": train_superres("iterative", recompute) for recompute in RECOMPUTES},
    **{f"sample {weights}": sample("wavefront", weights) for weights in ("fp32", "int8", "float8", "int4")},
}


def main() -> None:
    choice = sys.argv[2:]
    chosen = {("quick",): QUICK, ("slow",): SLOW}.get(tuple(choice))
    if chosen is None:
        chosen = {name: (QUICK | SLOW)[name] for name in choice}
    for name, check in chosen.items():
        problem, start = None, time.perf_counter()
        try:
            with fake_cuda() as mode:
                check(mode)
        except Exception as error:
            if choice == [name]:
                raise
            problem = f"{type(error).__name__}: {str(error)[:300]}"
        seconds = round(time.perf_counter() - start, 2)
        print(json.dumps({"name": name, "problem": problem, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
