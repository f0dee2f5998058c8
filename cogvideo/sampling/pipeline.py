"""From captions to videos: both stages, as `cogvideo sample`, evaluation and users of the Python API call them.

    pipeline = Pipeline.load()                                   # the bundled weights, or Pipeline.load(folder)
    config = replace(pipeline.config, seed=7)                    # settings that suit these weights, and a seed
    tokens = pipeline.sample(["the red digit 3 moves left slowly"], config)     # (samples, 33, frame_len) int64
    frames = pipeline.decode(tokens)                             # (samples, 33, height, width, 3) uint8
    pipeline.fps(config)                                         # 8.0

Key frames only, spanning two seconds: `replace(config, seconds=2.0, rounds=0)` gives (samples, 5, frame_len).
Any number of prompts can be passed at once; `config.clips_at_once` bounds memory. The samples of one caption are
adjacent. Several threads may use one pipeline: their requests share forward passes (inference/batching.py).

A sample is determined by (seed, caption, sample index per caption): other captions, their order, the batch size and
later rounds do not affect it. The same call on the same machine repeats bit for bit; another batch size changes logits
by float rounding only, which very rarely changes a token.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cogvideo.checkpoint.format import Checkpoint
from cogvideo.distributed import open_device
from cogvideo.files import BUNDLED_WEIGHTS, atomic_directory
from cogvideo.hub import resolve
from cogvideo.inference.engine import (
    Conditioning,
    Engine,
    Program,
    Progress,
    build_program,
    with_kept_memory_released,
)
from cogvideo.inference.sampler import PUBLISHED_CLUSTERS, ClusterSampler, TokenSampler, kmeans_labels
from cogvideo.inference.schedules import SCHEDULES
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.rng import SampleKey, sample_uniforms
from cogvideo.sampling.adapters import AdapterSet
from cogvideo.sampling.bundle import load_sample_config, open_bundle
from cogvideo.sampling.config import DrawConfig, SampleConfig, StageName
from cogvideo.sampling.prompts import ClipPrompts, EncodedPrompt, PromptBuilder, prompt_keys
from cogvideo.sampling.publish import Publication
from cogvideo.sequence.layout import ClipLayout
from cogvideo.sequence.prompt import Encode, PromptFormat
from cogvideo.tokenizers.image import ImageTokenizer

MAX_SAMPLERS = 16
"""Token samplers that are kept; visitors of a web page choose their settings freely."""
STAGE_1_ROUND = 0
"""Round number of stage 1 in the keys of its random numbers; rounds of interpolation count from 1."""


class StageOutput(NamedTuple):
    """Clips after one stage of generation."""

    tokens: Tensor
    """(clips, frames so far, frame_len) int64."""
    fps: float


class BatchCache(Protocol):
    """Keeps finished batches, so that a resumed run does not draw them again."""

    def load(self, name: str) -> Tensor | None:
        """The batch stored under this name; None if there is none."""
        ...

    def store(self, name: str, tokens: Tensor) -> None: ...


@dataclass(frozen=True)
class FrameSampler:
    """A model set up to draw certain frames of its clips; every stage of generation is one."""

    engine: Engine
    program: Program
    token_sampler: TokenSampler
    """On the engine's device, like the program."""
    config: DrawConfig

    def sample(
        self,
        known: Tensor,
        prompts: Sequence[EncodedPrompt],
        uniforms: Tensor,
        *,
        clips_at_once: int,
        name: str = "",
        cache: BatchCache | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Draw the program's frames for any number of clips, `clips_at_once` of them in a batch.

        Batches are cut here and nowhere else: a batch is one call of the engine and one file of a resumable run. A
        resumed run must cut the same batches, since their size affects rounding in the logits.

        Shapes: known (clips, frames, frame_len) int64, valid at given frames; uniforms (clips, frames, frame_len, 2);
        returns (clips, frames, frame_len). Input and output are on the CPU. `prompts`: one per clip.
        `cache` holds batches under `name` and the index of their first clip. `progress` receives the number of tokens
        just drawn, or loaded from the cache.
        Raises: ValueError for a cached batch of another shape, or with token ids out of range.
        """
        scale = self.config.guidance_scale
        batches = []
        for first in range(0, len(known), clips_at_once):
            part = slice(first, first + clips_at_once)
            batch_name = f"{name}-{first:06d}"
            batch = None if cache is None else cache.load(batch_name)
            if batch is not None:
                check_cached(batch, batch_name, known[part].shape, self.engine.model.config.vocabulary.num_image_tokens)
                if progress is not None:
                    progress(len(batch) * self.program.tokens_per_clip)
            else:
                guides = [prompt.guide for prompt in prompts[part] if prompt.guide is not None]
                conditioning = Conditioning.from_tokens(
                    [prompt.text for prompt in prompts[part]],
                    [] if scale is None else guides,
                    self.engine.model.config.vocabulary.pad,
                    guidance_scale=scale,
                    text_bonus=self.config.effective_text_bonus,
                )
                tokens = self.engine.generate(
                    self.program,
                    known[part].flatten(1),
                    conditioning,
                    self.token_sampler,
                    uniforms[part].flatten(1, 2),
                    progress,
                )
                batch = tokens.view_as(known[part])
                if cache is not None:
                    cache.store(batch_name, batch)
            batches.append(batch)
        return torch.cat(batches)


class Pipeline:
    """Models, tokenizers and settings that together turn captions into clips."""

    def __init__(
        self,
        *,
        encode: Encode,
        prompt_format: PromptFormat,
        image_tokenizer: ImageTokenizer,
        sequential: CogVideoTransformer,
        trunk: CogVideoTransformer | None = None,
        interpolation: CogVideoTransformer | None = None,
        labels: np.ndarray | None = None,
        config: SampleConfig | None = None,
        backend: str = "auto",
        checkpoints: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        """Assemble a pipeline from loaded parts; `load` opens a bundle. `trunk` defaults to stage 1's own.

        `backend`: how the models decode, see `inference.backends`. `checkpoints`: what the models (`trunk`,
        `sequential`, `interpolation`) were loaded from, which adapters are checked against.
        """
        self.encode, self.prompt_format, self.image_tokenizer = encode, prompt_format, image_tokenizer
        self.trunk, self.sequential, self.interpolation = trunk or sequential, sequential, interpolation
        self.config = config or SampleConfig()
        """Settings that suit these weights; by default the published ones."""
        self._labels: dict[int | None, np.ndarray] = {} if labels is None else {None: labels}
        self._programs: dict[tuple[StageName, bool, str, int], Program] = {}
        self._samplers: dict[tuple[int | None, tuple[float, int, float]], TokenSampler] = {}
        self._backend, self._checkpoints = backend, checkpoints or {}
        self._directory: Path | None = None
        self.engines: dict[int, Engine] = {}
        """By id of the model."""
        self._open_engines()

    @classmethod
    def load(cls, directory: Path | str | None = None, config: SampleConfig | None = None) -> "Pipeline":
        """Open a bundle (default: the bundled weights): a folder, or USER/REPO[@REVISION] on the Hugging Face hub.

        Only the LOADING_KEYS of `config`, by default those of the bundle's own settings, are used; seed and rounds are
        ignored.
        Raises: FileNotFoundError, ValueError as `open_bundle` and `open_device`; OSError as `hub.resolve`.
        """
        directory = resolve(directory or BUNDLED_WEIGHTS)
        own = load_sample_config(directory, [], [])
        config = config or own
        device = open_device(config.device)
        if config.compile and device.type != "cuda":
            raise ValueError("compile=true needs a GPU; the CPU kernels need no compilation, so leave it out")
        bundle = open_bundle(directory, config.weights, device, offload=config.stream_layers)
        pipeline = cls(
            encode=bundle.text_tokenizer.encode,
            prompt_format=bundle.config.prompt,
            image_tokenizer=bundle.image_tokenizer,
            sequential=bundle.sequential,
            trunk=bundle.trunk,
            interpolation=bundle.interpolation,
            labels=bundle.labels,
            config=own,
            backend="compiled" if config.compile else "auto",
            checkpoints=bundle.checkpoints,
        )
        pipeline._directory = directory
        return pipeline

    @classmethod
    def from_pretrained(
        cls, name_or_path: Path | str, *, revision: str | None = None, config: SampleConfig | None = None
    ) -> "Pipeline":
        """`load`, under the name that Hugging Face users expect.

        `revision`: a branch, a tag or a commit of the repository.
        """
        return cls.load(name_or_path if revision is None else f"{name_or_path}@{revision}", config)

    def save_pretrained(self, directory: Path | str) -> None:
        """Copy the bundle that this pipeline was loaded from; the folder appears complete or not at all.

        Raises: FileExistsError; ValueError if it was not loaded from a bundle, or while adapters are in effect.
        """
        publication = self._publication()
        with atomic_directory(directory) as building:
            for name, path in publication.weights.items():
                (building / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, building / name)

    def push_to_hub(self, repo: str, *, private: bool = False, license: str | None = None) -> str:
        """Upload the bundle that this pipeline was loaded from, as `cogvideo push` does; returns the commit's URL.

        Raises: as `save_pretrained` and `hub.upload`.
        """
        return self._publication().upload(repo, private=private, license=license)

    def _publication(self) -> Publication:
        if self._directory is None:
            raise ValueError("this pipeline was not loaded from a bundle; make one with `cogvideo bundle`")
        if self._adapters.in_effect:
            raise ValueError(
                "adapters are in effect and cannot be saved in a bundle; remove them with set_adapters({})"
            )
        return Publication.of(self._directory)

    def add_adapter(self, name: str, folder: Path | str) -> None:
        """Read an adapter, to be put into effect by `set_adapters` under a name of your choice.

        `folder` may be USER/REPO[@REVISION]. The adapter applies to the model that it was trained for, or to
        stage 1 if it does not record one (those that PEFT writes do not).
        Raises: FileNotFoundError, ValueError if it is damaged or does not fit the model.
        """
        self._adapters.add(name, resolve(folder))

    def set_adapters(self, scales: Mapping[str, float], *, merge: bool = True) -> None:
        """Replace the adapters in effect with these from `add_adapter`, each multiplied by its scale.

        {} restores the original weights exactly. `merge` adds the adapters to the weights, which costs nothing in
        sampling; otherwise they are computed beside them, which is slower but exact with quantized weights. Do not
        call this while other threads sample.
        Raises: ValueError for an unknown name or an invalid scale, before anything changes; ValueError or
        torch.OutOfMemoryError, with no adapter in effect, if weights cannot be merged.
        """
        self._adapters.check(scales)
        changed = True  # also if that fails halfway
        try:
            changed = self._adapters.set(scales, merge=merge)
        finally:
            if changed:
                self._open_engines()

    def _open_engines(self) -> None:
        """Open an engine for each model, replacing those opened for the previous weights.

        All are replaced, whichever model changed: models that share a trunk share its layers, whose memory an engine
        may move, and graphs that another engine recorded would still read the old memory.
        """
        self.engines.clear()  # first: the old ones hold weights
        models = {id(model): model for model in (self.trunk, self.sequential, self.interpolation) if model is not None}
        self.engines |= {key: Engine(model, self._backend) for key, model in models.items()}

    @cached_property
    def _adapters(self) -> AdapterSet:
        models = {"sequential": self.sequential}
        models |= {} if self.interpolation is None else {"interpolation": self.interpolation}
        models |= {"trunk": self.trunk} if self.trunk is not self.sequential else {}
        return AdapterSet(models, self._checkpoints)

    def num_frames(self, config: SampleConfig, num_previous: int = 0) -> int:
        """Frames per sample: the key frames, and those that the rounds of interpolation add.

        For a sample that continues `num_previous` frames: the frames from the last of those on.
        """
        key_frames = self.sequential.config.num_frames - self.num_given(config, num_previous)
        frames: int = key_frames * 2**config.rounds + 1
        return frames

    def num_given(self, config: SampleConfig, num_previous: int) -> int:
        """How many key frames are given when `num_previous` frames are continued; the first one always is.

        Raises: ValueError if that leaves no frame to draw.
        """
        most = self.sequential.config.num_frames - 1
        if config.given_frames > most:
            raise ValueError(f"given_frames={config.given_frames}; these weights accept at most {most} given frames")
        return max(1, min(config.given_frames, (num_previous - 1) // 2**config.rounds + 1))

    def fps(self, config: SampleConfig) -> float:
        return (self.num_frames(config) - 1) / config.seconds

    def num_tokens(self, config: SampleConfig, num_prompts: int) -> int:
        """Tokens that `sample` will draw, for a progress bar."""
        frames = num_prompts * config.samples_per_prompt * self.num_frames(config)
        return frames * self.sequential.config.frame_len

    def num_interpolation_tokens(self, config: SampleConfig, num_frames: int) -> int:
        """Tokens that `interpolate` will draw per sample of `num_frames` given frames."""
        model = self._model("interpolation").config
        counts = [(num_frames - 1) * 2**done + 1 for done in range(config.rounds)]
        clips = sum(model_clips_per_round(model.layout, count) for count in counts)
        return clips * len(model.layout.generation_order) * model.frame_len

    def encode_prompts(self, captions: Sequence[str], config: SampleConfig) -> list[ClipPrompts]:
        """Check and encode captions for all models of a clip. Raises: ValueError as `PromptBuilder.encode_clips`."""
        return self._prompt_builder.encode_clips(captions, config)

    def encode_interpolation_prompts(
        self, captions: Sequence[str], config: SampleConfig, num_frames: int
    ) -> list[list[EncodedPrompt]]:
        """Check and encode captions for `interpolate`, which starts from `num_frames` frames. Raises: ValueError."""
        return self._prompt_builder.encode_rounds(captions, config, num_frames)

    def sample(
        self, prompts: Sequence[str], config: SampleConfig | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Generate a clip for each sample of each prompt.

        Shapes: returns (len(prompts) * samples_per_prompt, num_frames, frame_len) int64.
        `progress` receives the number of tokens just drawn.
        Raises: ValueError for a prompt that is empty or too long, before anything is drawn.
        """
        config = config or self.config
        keys = prompt_keys(config.seed, prompts, config.samples_per_prompt)
        encoded = self.encode_prompts([key.caption for key in keys], config)
        *_, last = self.stages(keys, encoded, config, progress=progress)
        return last.tokens

    def stages(
        self,
        keys: Sequence[SampleKey],
        prompts: Sequence[ClipPrompts],
        config: SampleConfig,
        *,
        previous_frames: Tensor | None = None,
        cache: BatchCache | None = None,
        progress: Progress | None = None,
    ) -> Iterator[StageOutput]:
        """Generate clips, yielding all of them after the first frame, the key frames, and each round.

        `prompts`: of each key's caption, from `encode_prompts`. `previous_frames` (samples, K, frame_len), at the frame
        rate of the finished clips, are continued instead of drawing a first frame: the last `config.given_frames` of
        them, at the rate of key frames, are the first key frames of the new clips (by default only the last frame).
        Every output then starts with the previous frames, thinned to the stage's frame rate, and the first output
        follows the key frames.
        """
        model, start, given = self.sequential.config, 0, 1
        if previous_frames is None:
            first_frames = self.frame_sampler("first_frame", config).sample(
                torch.zeros(len(keys), 1, model.frame_len, dtype=torch.int64),
                [prompt.first_frame for prompt in prompts],
                sample_uniforms(keys, STAGE_1_ROUND, (0,), model.frame_len),
                clips_at_once=config.clips_at_once,
                name="first-frame",
                cache=cache,
                progress=progress,
            )
            yield StageOutput(first_frames, 1 / config.seconds)
            previous_frames = first_frames
        else:
            # random numbers are counted in key frames of the whole video, and do not repeat those of earlier frames
            start = -(-(previous_frames.shape[1] - 1) // 2**config.rounds)
            given = self.num_given(config, previous_frames.shape[1])

        spacing = 2**config.rounds  # previous frames per frame of the current stage
        first = start - given + 1
        known = previous_frames.new_zeros(len(keys), model.num_frames, model.frame_len)
        known[:, :given] = previous_frames[:, -1 - (given - 1) * spacing :: spacing]
        key_frames = self.frame_sampler("key_frames", config, given).sample(
            known,
            [prompt.key_frames for prompt in prompts],
            sample_uniforms(keys, STAGE_1_ROUND, range(first, first + model.num_frames), model.frame_len),
            clips_at_once=config.clips_at_once,
            name="key-frames",
            cache=cache,
            progress=progress,
        )[:, given - 1 :]
        yield StageOutput(prepend(previous_frames, key_frames, spacing), self.fps(config) / spacing)

        rounds = [prompt.rounds for prompt in prompts]
        for frames, _ in self.interpolate(
            key_frames, keys, rounds, config, start=start, cache=cache, progress=progress
        ):
            spacing //= 2
            yield StageOutput(prepend(previous_frames, frames, spacing), self.fps(config) / spacing)

    def interpolate(
        self,
        frames: Tensor,
        keys: Sequence[SampleKey],
        prompts: Sequence[Sequence[EncodedPrompt]],
        config: SampleConfig,
        *,
        rounds_before: int = 0,
        start: int = 0,
        cache: BatchCache | None = None,
        progress: Progress | None = None,
    ) -> Iterator[StageOutput]:
        """Stage 2 alone: interpolate frames (samples, K, frame_len) that span `config.seconds`, yielding every round.

        `prompts`: a list of rounds per sample, from `encode_interpolation_prompts`. The position of the frames in a
        longer video determines their random numbers: `rounds_before` rounds have produced them, and the first of them
        is key frame number `start`.
        Raises: ValueError for fewer than two frames.
        """
        for done in range(config.rounds):
            number = rounds_before + done + 1
            frames = interpolate_once(
                self.frame_sampler("interpolation", config),
                frames,
                keys,
                [rounds[done] for rounds in prompts],
                number,
                start=start * 2 ** (number - 1),
                clips_at_once=config.clips_at_once,
                cache=cache,
                progress=progress,
            )
            yield StageOutput(frames, (frames.shape[1] - 1) / config.seconds)

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Decode frames (..., frame_len) to pixels (..., height, width, 3) uint8."""
        return decode_frames(self.image_tokenizer, tokens)

    def frame_sampler(self, stage: StageName, config: SampleConfig, num_given: int = 1) -> FrameSampler:
        """The model, program and token sampler of a stage; programs and samplers are built once and kept.

        `num_given`: the number of key frames that are given.
        """
        model, draw = self._model(stage), config.draw_config(stage)
        engine = self.engines[id(model)]
        wrapped = config.published_prefill and stage == "interpolation"
        key = (stage, wrapped, config.schedule, num_given)
        if key not in self._programs:
            layout = model.config.layout
            given, drawn = layout.given_frames, layout.generation_order
            if stage == "first_frame":
                given, drawn = (), (0,)
            elif stage == "key_frames":
                given = tuple(range(num_given))
                drawn = tuple(frame for frame in layout.generation_order if frame >= num_given)
            schedule = SCHEDULES[config.schedule](layout, given, drawn, model.config.window_size)
            program = build_program(
                model.config,
                schedule,
                temporal=not (stage == "first_frame" and self._trunk_draws_first_frame),
                given_windows="wrapped" if wrapped else "cut",
                joined=model.is_joined,
            )
            self._programs[key] = program.to(engine.device)
        settings = draw.temperature, draw.top_k_clusters, draw.token_temperature
        sampler = self._samplers.get((config.num_clusters, settings))
        if sampler is None:
            sampler = ClusterSampler(self.labels(config.num_clusters), *settings).to(engine.device)
            self._samplers[config.num_clusters, settings] = sampler
            for oldest in list(self._samplers)[:-MAX_SAMPLERS]:
                self._samplers.pop(oldest, None)
        return FrameSampler(engine, self._programs[key], sampler, draw)

    def labels(self, num_clusters: int | None) -> np.ndarray:
        """The cluster of each image code: the bundle's own (None), or k-means of the codebook, computed once."""
        if num_clusters not in self._labels:
            codebook = self.image_tokenizer.codebook.detach().float().cpu().numpy()
            default = min(PUBLISHED_CLUSTERS, len(codebook))
            self._labels[num_clusters] = kmeans_labels(codebook, num_clusters or default)
        return self._labels[num_clusters]

    @property
    def _trunk_draws_first_frame(self) -> bool:
        """True as published; False if stage 1 was trained to draw first frames itself."""
        return 0 in self.sequential.config.layout.given_frames

    @property
    def _prompt_builder(self) -> PromptBuilder:
        return PromptBuilder(
            self.encode,
            self.prompt_format,
            trunk=self.trunk.config if self._trunk_draws_first_frame else None,
            sequential=self.sequential.config,
            interpolation=None if self.interpolation is None else self.interpolation.config,
        )

    def _model(self, stage: StageName) -> CogVideoTransformer:
        if stage == "first_frame":
            return self.trunk if self._trunk_draws_first_frame else self.sequential
        model = self.sequential if stage == "key_frames" else self.interpolation
        assert model is not None, "prompts are encoded first, which refuses rounds without a stage 2"
        return model


def interpolate_once(
    sampler: FrameSampler,
    frames: Tensor,
    keys: Sequence[SampleKey],
    prompts: Sequence[EncodedPrompt],
    round_number: int,
    *,
    start: int = 0,
    clips_at_once: int,
    cache: BatchCache | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """One round of interpolation: (samples, K, frame_len) -> (samples, 2 K - 1, frame_len).

    Each of the model's clips takes its given frames from neighbours in `frames` and shares the outer ones with the next
    clip (published: triplets 2i, 2i+1, 2i+2). The clips are independent of each other, so those of all samples are
    batched together. If the last clip lacks frames, the last frame is repeated and what is drawn beyond it is dropped.
    `round_number` counts from 1; `start` is the index of the first new frame in the whole video: both are part of the
    key of the random numbers.
    Raises: ValueError for fewer than two frames.
    """
    layout = sampler.engine.model.config.layout
    given, new = list(layout.given_frames), list(layout.supervised_frames)
    samples, count, frame_len = frames.shape
    if count < 2:
        raise ValueError(f"interpolation needs at least 2 frames, got {count}")
    clips = model_clips_per_round(layout, count)  # per sample
    stride = len(given) - 1
    padding = frames[:, -1:].expand(-1, 1 + clips * stride - count, -1)
    padded = torch.cat([frames, padding], dim=1)

    known = frames.new_zeros(samples * clips, layout.num_frames, frame_len)
    known[:, given] = rearrange(padded.unfold(1, len(given), stride), "s c n given -> (s c) given n")
    uniforms = torch.zeros(*known.shape, 2, dtype=torch.float64)
    numbers = sample_uniforms(keys, round_number, range(start, start + clips * len(new)), frame_len)
    uniforms[:, new] = rearrange(numbers, "s (c new) n two -> (s c) new n two", c=clips)
    drawn = sampler.sample(
        known,
        [prompt for prompt in prompts for _ in range(clips)],
        uniforms,
        clips_at_once=clips_at_once,
        name=f"round-{round_number}",
        cache=cache,
        progress=progress,
    )
    # each clip's last frame is the next one's first
    whole = torch.cat([rearrange(drawn[:, :-1], "(s c) f n -> s (c f) n", s=samples), padded[:, -1:]], dim=1)
    return whole[:, : 2 * count - 1]


def model_clips_per_round(layout: ClipLayout, num_frames: int) -> int:
    """Clips of the stage 2 model that cover `num_frames` frames; neighbouring clips share a frame."""
    return -(-(num_frames - 1) // (len(layout.given_frames) - 1))


def prepend(previous: Tensor, frames: Tensor, spacing: int) -> Tensor:
    """Put every `spacing`-th previous frame, counted back from the last one, before the frames that continue it.

    Shapes: previous (samples, K, frame_len), whose last frame is the first of frames (samples, N, frame_len).
    """
    earlier = previous[:, :-1].flip(1)[:, spacing - 1 :: spacing].flip(1)
    return torch.cat([earlier, frames], dim=1)


def decode_frames(tokenizer: ImageTokenizer, tokens: Tensor) -> np.ndarray:
    """Decode square frames (..., frame_len) to pixels (..., height, width, 3) uint8."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    images = with_kept_memory_released(
        tokenizer.codebook.device, lambda: tokenizer.decode(rows).mul(255).round().to(torch.uint8)
    )
    pixels = rearrange(images, "n c h w -> n h w c")
    return pixels.reshape(*tokens.shape[:-1], *pixels.shape[1:]).numpy(force=True)


def check_cached(batch: Tensor, name: str, shape: torch.Size | tuple[int, ...], num_codes: int) -> None:
    """Check a batch from a resumable run. Raises: ValueError."""
    elsewhere = "start again in another folder, or here with --overwrite"
    if batch.shape != shape:
        raise ValueError(
            f"the cached batch {name} has shape {tuple(batch.shape)}, expected {tuple(shape)}; {elsewhere}"
        )
    if not 0 <= int(batch.min()) <= int(batch.max()) < num_codes:
        raise ValueError(
            f"the cached batch {name} holds tokens {int(batch.min())}..{int(batch.max())}, expected "
            f"0..{num_codes - 1}; {elsewhere}"
        )
