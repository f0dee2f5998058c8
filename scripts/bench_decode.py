"""Time the decoding of clips: one JSON line for a case, a schedule and a weight type.

    python scripts/bench_decode.py --case stage1
    python scripts/bench_decode.py --case clip --schedule wavefront --dtype bf16
    python scripts/bench_decode.py --case clip --quick        # tiny, to try the script; says nothing about speed
    python scripts/bench_decode.py --case stage1 --device cuda --published --layers 8 --dtype bf16 --steps 64 --compile

Random weights: hidden 512, 6 layers, 8 heads, 20,000 image tokens of a vocabulary of 20,480, frames of 20x20, five per
clip, windows of 10 in stage 2, 2 threads; published sampling settings. The cases are the parts of one guided clip of 33
frames, and the whole clip: first_frame; stage1 (guided; stage1x4: four clips at once; late4: the same four, each in a
thread that starts when the previous one is a quarter done); round2, round4, round8 (stage 2 on that many triplets);
clip.

`wall_s` is the time of decoding, prefill included; `plan_s` that of the setup done once for any number of clips.
`bandwidth_share` is the time that reading the weights in every forward pass would take, at the memory bandwidth
measured afterwards, divided by `wall_s`: at 1, only fewer passes or fewer bytes would help. `tokens` is a hash, equal
if the same tokens were sampled. With --baseline, `baseline_wall_s` is an estimate for the published loop in fp32: the
mean time of some of its steps (published_loop.py) times the number of steps, without prefill; `speedup` is relative to
it. This is not a test: it neither passes nor fails.

`--published` uses the published width and vocabulary, with `--layers` of the 48 layers. `--steps` ends each part after
that many steps. On a GPU the case is run twice and the second run counts; the first, which compiles and captures
graphs, is `first_wall_s`. Times are then from CUDA events, and `peak_gb` is the peak memory of tensors in both runs.
"""

import argparse
import hashlib
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from device_timing import add_device_argument, device_argument, peak_gb, read_speed, reset_peak, timed
from published_loop import step_seconds
from torch import Tensor

from cogvideo.checkpoint.load import on_meta
from cogvideo.cli.main import run_command
from cogvideo.dtypes import ACTIVATION_DTYPES, WeightName
from cogvideo.inference.backends import install_kernels
from cogvideo.inference.engine import Program, Progress
from cogvideo.inference.sampler import PUBLISHED_CLUSTERS
from cogvideo.inference.schedules import SCHEDULES
from cogvideo.model.config import ModelConfig
from cogvideo.model.quantize import convert_weights
from cogvideo.model.transformer import CogVideoTransformer, is_temporal
from cogvideo.rng import SampleKey, sample_keys
from cogvideo.sampling.config import SampleConfig, StageName
from cogvideo.sampling.pipeline import FrameSampler, Pipeline
from cogvideo.sampling.prompts import ClipPrompts, EncodedPrompt
from cogvideo.sequence.layout import Vocabulary
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.training.resources import peak_memory_mib

WORDS = Vocabulary(20480, 20000, pad=20000, newline=20001, start_of_image=20002)
FULL = ModelConfig(num_layers=6, hidden_size=512, num_heads=8, window_size=10, vocabulary=WORDS)
PUBLISHED = ModelConfig(window_size=10)
QUICK = replace(FULL, num_layers=2, hidden_size=32, num_heads=2, frame_side=4, window_size=2)
"""Windows are used in stage 2 only."""
CASES = ("first_frame", "stage1", "stage1x4", "late4", "round2", "round4", "round8", "clip")
DTYPES = ("fp32", "bf16", "fp16", "int8")
SETTINGS = SampleConfig()
TEXT, GUIDE = list(range(20100, 20116)), list(range(20100, 20106))
"""Token ids of the caption and of its guide, chosen arbitrarily."""
PROMPT = EncodedPrompt(TEXT, GUIDE)
PROMPTS = ClipPrompts(EncodedPrompt(TEXT, None), PROMPT, [PROMPT] * SETTINGS.rounds)


CPU = torch.device("cpu")


def random_model(config: ModelConfig, dtype: WeightName, device: torch.device = CPU) -> CogVideoTransformer:
    """Random weights whose logits are spread like those of trained ones.

    Each matrix is drawn in float32 on the device and converted before the next one, so that all of them fit wherever
    the converted ones do.
    """
    model = on_meta(lambda: CogVideoTransformer(config)).eval()
    generator = torch.Generator(device).manual_seed(0)
    activations = torch.float32 if device.type == "cpu" else ACTIVATION_DTYPES[dtype]
    for prefix, module in model.named_modules():
        module.to_empty(device=device, recurse=False)
        with torch.no_grad():
            for name, p in module.named_parameters(prefix, recurse=False):
                if p.ndim == 2:
                    p.normal_(0.0, 0.1 if name == "word_embeddings.weight" else 0.02, generator=generator)
                else:
                    p.fill_(1.0 if name.endswith("layernorm.weight") else 0.0)
        if dtype != "fp32" and not list(module.children()):
            convert_weights(module, dtype, activations)
    if dtype != "fp32":
        convert_weights(model, dtype, activations)  # what belongs to modules with children
    if device.type == "cuda":
        install_kernels(model, device)
    return model


class FirstSteps(Pipeline):
    """A pipeline whose stages end after `max_steps` steps; None: no limit."""

    def __init__(self, max_steps: int | None, **parts: Any) -> None:
        super().__init__(**parts)
        self._max_steps = max_steps
        self._first_steps: dict[Program, Program] = {}
        """By whole program. An engine keeps memory and graphs for an object, so every run must give it the same one."""

    def frame_sampler(self, stage: StageName, config: SampleConfig, num_given: int = 1) -> FrameSampler:
        sampler = super().frame_sampler(stage, config, num_given)
        whole = sampler.program
        program = self._first_steps.setdefault(whole, replace(whole, steps=whole.steps[: self._max_steps]))
        return replace(sampler, program=program)


class Stage:
    """A stage of a pipeline, and what it has cost so far."""

    def __init__(
        self, model: CogVideoTransformer, name: StageName, config: SampleConfig, backend: str, max_steps: int | None
    ) -> None:
        labels = np.arange(model.config.vocabulary.num_image_tokens) % PUBLISHED_CLUSTERS
        self.pipeline = FirstSteps(
            max_steps,
            encode=lambda text: TEXT,
            prompt_format=PromptFormat(),
            image_tokenizer=None,  # type: ignore[arg-type]  # nothing is decoded to pixels
            sequential=model,
            interpolation=model,
            labels=labels,
            backend=backend,
        )
        start = time.perf_counter()
        self.sampler = self.pipeline.frame_sampler(name, config)
        self.plan_s = time.perf_counter() - start
        self.model, self.program, self.engine = model, self.sampler.program, self.sampler.engine
        self.wall_s, self.tokens = 0.0, 0
        self.batches: list[int] = []
        """Number of clips in each run."""
        self._passes_before = (0, 0)

    def run(self, sample: Callable[[Pipeline, Progress], Tensor]) -> Tensor:
        """Run `sample(pipeline, progress)`, one batch; adds its time and tokens to the totals."""
        before = self.tokens
        seconds, tokens = timed(self.engine.device, lambda: sample(self.pipeline, self._count_tokens))
        self.wall_s += seconds
        self.batches.append((self.tokens - before) // self.program.tokens_per_clip)
        return tokens

    def reset(self) -> None:
        """Reset all times and counts."""
        self.wall_s, self.tokens = 0.0, 0
        self.batches.clear()
        self._passes_before = self.engine.forward_passes, self.engine.prefill_passes

    @property
    def steps(self) -> int:
        """Forward passes that produced tokens; prefill produces them only if no frames are given."""
        prefills = self.engine.prefill_passes - self._passes_before[1]
        return self.forwards - (0 if self.program.given is None else prefills)

    @property
    def forwards(self) -> int:
        return self.engine.forward_passes - self._passes_before[0]

    def _count_tokens(self, drawn: int) -> None:
        self.tokens += drawn

    @property
    def bytes_read(self) -> int:
        """Bytes of weights that all forward passes read: the layers, and the image token embeddings for the logits."""
        model = self.model
        layers = (
            p
            for name, p in model.named_parameters()
            if name.startswith("layers.") and (self.program.temporal or not is_temporal(name))
        )
        scores = model.word_embeddings.weight[: model.config.vocabulary.num_image_tokens]
        return self.forwards * sum(p.nbytes for p in (*layers, scores))


class Bench:
    """The stages of a clip, each built when it is first needed."""

    def __init__(
        self,
        base: ModelConfig,
        dtype: WeightName,
        schedule: str,
        device: torch.device = CPU,
        backend: str = "auto",
        max_steps: int | None = None,
    ) -> None:
        self.base, self.dtype, self.device = base, dtype, device
        self.backend, self.max_steps = backend, max_steps
        self.config = replace(SETTINGS, schedule=schedule)
        self.stages: list[Stage] = []

    def load(self, case: str) -> None:
        """Build the stages that a case runs."""
        names = {"first_frame": ["first_frame"], "clip": ["first_frame", "key_frames", "interpolation"]}
        for name in names.get(case, ["interpolation" if case.startswith("round") else "key_frames"]):
            getattr(self, name)

    def run(self, case: str) -> Tensor:
        """Tokens of a case, (samples, frames, frame_len). Its given frames are random."""
        keys = sample_keys(0, [""], 4 if case in ("stage1x4", "late4") else 1)
        prompts = [PROMPTS] * len(keys)

        def random_frames(number: int) -> Tensor:
            size = (len(keys), number, self.base.frame_len)
            return torch.from_numpy(np.random.default_rng(0).integers(self.base.vocabulary.num_image_tokens, size=size))

        def first_frame(pipeline: Pipeline, progress: Progress) -> Tensor:
            return next(pipeline.stages(keys, prompts, self.config, progress=progress)).tokens

        def key_frames(first: Tensor) -> Tensor:
            return self.key_frames.run(
                lambda pipeline, progress: (
                    next(pipeline.stages(keys, prompts, self.config, previous_frames=first, progress=progress)).tokens
                )
            )

        def interpolate(frames: Tensor) -> Tensor:
            rounds_before = (frames.shape[1] // 2).bit_length() - 2
            once, rounds = replace(self.config, rounds=1), [prompt.rounds for prompt in prompts]
            return self.interpolation.run(
                lambda pipeline, progress: (
                    next(
                        pipeline.interpolate(frames, keys, rounds, once, rounds_before=rounds_before, progress=progress)
                    ).tokens
                )
            )

        match case:
            case "first_frame":
                return self.first_frame.run(first_frame)
            case "stage1" | "stage1x4":
                return key_frames(random_frames(1))
            case "late4":
                return self.key_frames.run(
                    lambda pipeline, progress: sample_late(
                        pipeline, keys, prompts, self.config, random_frames(1), progress
                    )
                )
            case "clip":
                clip = key_frames(self.first_frame.run(first_frame))
                for _ in range(SETTINGS.rounds):
                    clip = interpolate(clip)
                return clip
            case _:
                return interpolate(random_frames(2 * int(case.removeprefix("round")) + 1))

    @cached_property
    def sequential(self) -> CogVideoTransformer:
        """Stage 1, whose trunk makes the first frame; as published, with full attention."""
        return random_model(replace(self.base, task="sequential", window_size=None), self.dtype, self.device)

    @cached_property
    def first_frame(self) -> Stage:
        return self._stage(self.sequential, "first_frame")

    @cached_property
    def key_frames(self) -> Stage:
        return self._stage(self.sequential, "key_frames")

    @cached_property
    def interpolation(self) -> Stage:
        return self._stage(
            random_model(replace(self.base, task="interpolation"), self.dtype, self.device), "interpolation"
        )

    def _stage(self, model: CogVideoTransformer, name: StageName) -> Stage:
        self.stages.append(Stage(model, name, self.config, self.backend, self.max_steps))
        return self.stages[-1]


def sample_late(
    pipeline: Pipeline,
    keys: Sequence[SampleKey],
    prompts: Sequence[ClipPrompts],
    config: SampleConfig,
    first_frames: Tensor,
    progress: Progress,
) -> Tensor:
    """Key frames, each clip in a thread that starts when the previous clip is a quarter done."""
    start, sampled = [threading.Event() for _ in range(len(keys) + 1)], dict[int, Tensor]()
    quarter = pipeline.frame_sampler("key_frames", config).program.tokens_per_clip // 4

    def work(clip: int) -> None:
        drawn = 0

        def count(tokens: int) -> None:
            nonlocal drawn
            drawn += tokens
            if drawn >= quarter:
                start[clip + 1].set()
            progress(tokens)

        start[clip].wait()
        own = slice(clip, clip + 1)
        stages = pipeline.stages(keys[own], prompts[own], config, previous_frames=first_frames[own], progress=count)
        sampled[clip] = next(stages).tokens

    threads = [threading.Thread(target=work, args=(clip,)) for clip in range(len(keys))]
    start[0].set()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat([sampled[clip] for clip in range(len(keys))])


def baseline_seconds(stages: list[Stage]) -> float:
    """The published loop's time for the stages' tokens: one step per token, for all clips of a batch."""
    total = 0.0
    for stage in stages:
        config = stage.model.config
        model = random_model(config, "fp32")  # whatever the stages' own weights are
        guided = 2 if stage.sampler.config.guidance_scale is not None else 1
        begin = 0 if stage.program.given is None else len(stage.program.given.slots)
        steps = stage.program.tokens_per_clip
        for clips in stage.batches:
            lengths = [len(TEXT) + begin + steps * part // 4 for part in (1, 2, 3)]
            times = [step_seconds(model, guided * clips, n, temporal=stage.program.temporal) for n in lengths]
            total += steps * sum(times) / len(times)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="One JSON line; the script's docstring explains its fields."
    )
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--schedule", metavar="{" + ",".join(SCHEDULES) + "}", default="sequential")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=2, help="default 2; on a busy machine 1 is faster")
    parser.add_argument("--baseline", action="store_true", help="time the published loop's steps too")
    parser.add_argument("--layers", type=int, help="default: 6, of the published size 48")
    parser.add_argument("--steps", type=int, metavar="N", help="only the first N steps of each part")
    parser.add_argument("--compile", action="store_true", help="compiled layers and CUDA graphs; needs a GPU")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--published", action="store_true", help="the published width and vocabulary")
    size.add_argument("--quick", action="store_true", help="a tiny model on frames of 4x4, to try the script")
    add_device_argument(parser)
    args = parser.parse_args()
    device = device_argument(parser, args)
    for name in ("layers", "steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}; expected at least 1")
    if device.type == "cuda" and args.baseline:
        parser.error("--baseline is for a CPU; leave out --device")
    if args.compile and device.type != "cuda":
        parser.error("--compile needs a GPU; give --device cuda")
    if args.steps and (args.schedule == "speculative" or args.case not in ("first_frame", "stage1")):
        parser.error("--steps is for the cases first_frame and stage1, and not for --schedule speculative")
    if args.schedule not in SCHEDULES:
        parser.exit(2, f"--schedule {args.schedule} is not among {', '.join(SCHEDULES)}\n")

    torch.set_num_threads(args.threads)
    base = QUICK if args.quick else PUBLISHED if args.published else FULL
    base = replace(base, num_layers=args.layers or base.num_layers)
    backend = "compiled" if args.compile else "auto"
    bench = Bench(base, args.dtype, args.schedule, device, backend, args.steps)
    bench.load(args.case)
    reset_peak(device)
    tokens = bench.run(args.case)
    first_wall_s = sum(stage.wall_s for stage in bench.stages)
    if device.type == "cuda":
        for stage in bench.stages:
            stage.reset()
        tokens = bench.run(args.case)
    peak_rss_mb, peak_device_gb = peak_memory_mib(CPU), peak_gb(device)  # before read_speed allocates its own

    def total(field: str) -> float:
        return sum(getattr(stage, field) for stage in bench.stages)

    bound_s, wall_s = total("bytes_read") / read_speed(device), total("wall_s")
    report = {
        "case": args.case,
        "schedule": args.schedule,
        "dtype": args.dtype,
        "threads": args.threads,
        "quick": args.quick,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16],
        "steps": total("steps"),
        "forwards": total("forwards"),
        "wall_s": round(wall_s, 3),
        "tokens_per_s": round(total("tokens") / wall_s, 2),
        "plan_s": round(total("plan_s"), 3),
        "peak_rss_mb": round(peak_rss_mb),
        "bandwidth_share": round(bound_s / wall_s, 4),
        "device": str(device),
    }
    if device.type == "cuda":
        report |= {
            "gpu": torch.cuda.get_device_name(device),
            "first_wall_s": round(first_wall_s, 3),
            "step_s": round(wall_s / total("forwards"), 5),
            "peak_gb": peak_device_gb,
        }
    if args.baseline:
        baseline_s = baseline_seconds(bench.stages)
        report |= {"baseline_wall_s": round(baseline_s, 2), "speedup": round(baseline_s / wall_s, 2)}
    print(json.dumps(report))


if __name__ == "__main__":
    sys.exit(run_command(main, "bench_decode"))
