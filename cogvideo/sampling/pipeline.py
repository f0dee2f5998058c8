"""From captions to videos, both stages: what `cogvideo sample`, evaluation and previews call.

    pipeline = Pipeline.load()                                   # the bundled weights, or Pipeline.load(folder)
    config = replace(pipeline.config, seed=7)                    # what suits these weights, with a seed of yours
    tokens = pipeline.sample(["the red digit 3 moves left slowly"], config)     # (samples, 33, frame_len) int64
    frames = pipeline.decode(tokens)                             # (samples, 33, height, width, 3) uint8
    pipeline.fps(config)                                         # 8.0

Key frames alone, spanning two seconds: `replace(config, seconds=2.0, rounds=0)` gives (samples, 5, frame_len).
Any number of prompts may be given at once: `config.clips_at_once` bounds the memory. Samples come caption by caption.
Threads may sample with one pipeline at the same time: they share their forwards (together.py).

A sample is decided by (seed, its caption, the how-manieth sample of that caption it is): not by other captions, their
order, the batch size or later rounds. The same call on the same machine repeats to the last bit; another batch size
changes logits by float rounding only, which very rarely turns a token.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cogvideo.distributed import open_device
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.inference import schedules
from cogvideo.inference.batching import Together
from cogvideo.inference.clip_sampler import ClipSampler
from cogvideo.inference.clusters import PUBLISHED_CLUSTERS, kmeans_labels
from cogvideo.inference.engine import Program, Progress, compile_program
from cogvideo.inference.sampler import ClusterDraw
from cogvideo.inference.speculative import speculative
from cogvideo.inference.wavefront import wavefront
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.rng import SampleKey, sample_keys
from cogvideo.sampling.bundle import bundle_sample_config, open_bundle
from cogvideo.sampling.config import Part, SampleConfig
from cogvideo.sampling.interpolate import clips_a_round, sample_between
from cogvideo.sampling.kept import Keep, KeptSampler, keep_nothing
from cogvideo.sampling.prompts import Said, Texts, Wording
from cogvideo.sampling.stage1 import sample_first_frames, sample_key_frames
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.tokenizers.image import ImageTokenizer


class Pipeline:
    def __init__(
        self,
        *,
        encode: Callable[[str], list[int]],
        prompt: PromptFormat,
        image_tokenizer: ImageTokenizer,
        sequential: CogVideoTransformer,
        trunk: CogVideoTransformer | None = None,
        interpolation: CogVideoTransformer | None = None,
        labels: np.ndarray | None = None,
        config: SampleConfig | None = None,
    ) -> None:
        """From parts: what training has in hand for a preview. `trunk` None: stage 1's own."""
        self.encode, self.prompt, self.image_tokenizer = encode, prompt, image_tokenizer
        self.trunk, self.sequential, self.interpolation = trunk or sequential, sequential, interpolation
        self.config = config or SampleConfig()
        """Settings that suit these weights: the published ones where nothing else is known."""
        self._labels: dict[int | None, np.ndarray] = {} if labels is None else {None: labels}
        self._programs: dict[tuple[Part, bool, str], Program] = {}
        self.together = {id(m): Together(m) for m in (self.trunk, sequential, interpolation) if m is not None}

    @classmethod
    def load(cls, directory: Path | None = None, config: SampleConfig | None = None) -> "Pipeline":
        """A bundle's. Of `config` only what says how to load is read, `LOADING`.

        Raises: FileNotFoundError, ValueError as `bundle.open_bundle` and `device.open_device`.
        """
        directory, config = directory or BUNDLED_WEIGHTS, config or SampleConfig()
        device = open_device(config.device)
        if config.compile and device.type != "cuda":
            raise ValueError("compile=true is for a GPU; on a CPU a step is one call already, so leave it out")
        bundle = open_bundle(directory, config.weights, device, streamed=config.stream_layers)
        if config.compile:
            for model in (bundle.trunk, bundle.sequential, bundle.interpolation):
                if model is not None:
                    model.compile_decoding()
        return cls(
            encode=bundle.text_tokenizer.encode,
            prompt=bundle.config.prompt,
            image_tokenizer=bundle.image_tokenizer,
            sequential=bundle.sequential,
            trunk=bundle.trunk,
            interpolation=bundle.interpolation,
            labels=bundle.labels,
            config=bundle_sample_config(directory, [], []),
        )

    @property
    def _trunk_draws_first_frame(self) -> bool:
        """As published: a text-to-image model does. Else stage 1 has learned first frames itself."""
        return 0 in self.sequential.config.layout.given_frames

    def num_frames(self, config: SampleConfig) -> int:
        """Frames a sample: key frames, and as many between them as the rounds make."""
        return (self.sequential.config.num_frames - 1) * 2**config.rounds + 1

    def fps(self, config: SampleConfig) -> float:
        return (self.num_frames(config) - 1) / config.seconds

    def num_tokens(self, config: SampleConfig, num_prompts: int) -> int:
        """Tokens that `sample` will draw, for a progress bar."""
        frames = num_prompts * config.samples_per_prompt * self.num_frames(config)
        return frames * self.sequential.config.frame_len

    def num_tokens_between(self, config: SampleConfig, num_frames: int) -> int:
        """Tokens that `between` will draw for a sample of `num_frames` given frames."""
        clips = sum(self._clips_a_round(num_frames, done) for done in range(config.rounds))
        return clips * self._tokens_a_clip("interpolation")

    def sample(
        self, prompts: Sequence[str], config: SampleConfig | None = None, progress: Progress | None = None
    ) -> Tensor:
        """Tokens of a clip for each sample: (len(prompts) * samples_per_prompt, num_frames, frame_len) int64.

        `progress` is told the number of tokens just drawn. Raises: ValueError for a prompt that is empty or too long,
        before anything is drawn.
        """
        config = config or self.config
        self.texts(prompts, config)
        keys = sample_keys(config.seed, prompts, config.samples_per_prompt)
        *_, tokens = self.stages(keys, config, progress=progress)
        return tokens

    def stages(
        self,
        keys: Sequence[SampleKey],
        config: SampleConfig,
        *,
        first_frames: Tensor | None = None,
        start: int = 0,
        keep: Keep = keep_nothing,
        progress: Progress | None = None,
    ) -> Iterator[Tensor]:
        """What there is of each key's clip after each stage: (samples, frames so far, frame_len) int64.

        One frame, the key frames, then twice as many less one after every round. `first_frames` (samples, frame_len)
        are given rather than drawn; then the key frames are the first that is yielded. `start` is the number of the
        clip's first frame in a longer video, in key frames: where its random numbers begin. `keep` is handed every
        batch, see `kept.py`. Raises: as `sample`.
        """
        texts = self.texts([key.caption for key in keys], config)
        if first_frames is None:
            sampler = self._sampler("first frame", config, keep, "first-frame")
            said = texts.first_frame
            first_frames = sample_first_frames(sampler, said.texts, said.guide, keys, progress)
            yield first_frames[:, None]
        sampler = self._sampler("key frames", config, keep, "key-frames")
        said = texts.key_frames
        frames = sample_key_frames(sampler, first_frames, said.texts, said.guide, keys, progress, start=start)
        yield frames
        yield from self.between(frames, keys, config, start=start, keep=keep, progress=progress)

    def between(
        self,
        frames: Tensor,
        keys: Sequence[SampleKey],
        config: SampleConfig,
        *,
        rounds_before: int = 0,
        start: int = 0,
        keep: Keep = keep_nothing,
        progress: Progress | None = None,
    ) -> Iterator[Tensor]:
        """Stage 2 alone: frames (samples, K, frame_len) that span `config.seconds`, after each of `config.rounds`.

        `rounds_before`, and `start` as in `stages`, say where in a whole clip these frames stand, for their random
        numbers. Raises: ValueError for fewer than two frames, or as `texts`.
        """
        captions = [key.caption for key in keys]
        for number, said in enumerate(self.round_texts(config, captions, frames.shape[1]), rounds_before + 1):
            sampler = self._sampler("interpolation", config, keep, f"round-{number}")
            first = start * 2 ** (number - 1)
            frames = sample_between(sampler, frames, said.texts, said.guide, keys, number, progress, start=first)
            yield frames

    def decode(self, tokens: Tensor) -> np.ndarray:
        """Pictures (..., height, width, 3) uint8 of frames (..., frame_len)."""
        return pictures_of(self.image_tokenizer, tokens)

    @property
    def _wording(self) -> Wording:
        return Wording(
            self.encode,
            self.prompt,
            trunk=self.trunk.config if self._trunk_draws_first_frame else None,
            sequential=self.sequential.config,
            interpolation=None if self.interpolation is None else self.interpolation.config,
        )

    def texts(self, prompts: Sequence[str], config: SampleConfig) -> Texts:
        """Word and check everything that `sample` will say to the models. Raises: ValueError."""
        return self._wording.clips(prompts, config)

    def round_texts(self, config: SampleConfig, prompts: Sequence[str], num_frames: int) -> list[Said]:
        """The same for `between`, of `num_frames` frames."""
        return self._wording.rounds(prompts, config, num_frames)

    def _model(self, part: Part) -> CogVideoTransformer:
        if part == "first frame":
            return self.trunk if self._trunk_draws_first_frame else self.sequential
        model = self.sequential if part == "key frames" else self.interpolation
        assert model is not None, "asked for interpolation without a stage 2"
        return model

    def _frames(self, part: Part) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Frames of the model's clip that are given, and those it draws, in their order."""
        layout = self._model(part).config.layout
        if part == "first frame":
            return (), (0,)
        if part == "key frames":
            return (0,), tuple(frame for frame in layout.generation_order if frame != 0)
        return layout.given_frames, layout.generation_order

    def _tokens_a_clip(self, part: Part) -> int:
        return len(self._frames(part)[1]) * self._model(part).config.frame_len

    def _clips_a_round(self, num_frames: int, done: int) -> int:
        return clips_a_round(self._model("interpolation").config.layout, (num_frames - 1) * 2**done + 1)

    def _sampler(self, part: Part, config: SampleConfig, keep: Keep, name: str) -> KeptSampler:
        """Programs are planned once and reused."""
        model, draw = self._model(part), config.draw_of(part)
        device = model.final_layernorm.weight.device
        wrapped = config.published_prefill and part == "interpolation"
        key = (part, wrapped, config.schedule)
        if key not in self._programs:
            layout = model.config.layout
            schedule = schedules.sequential(layout, *self._frames(part))
            if config.schedule == "wavefront":
                schedule = wavefront(schedule, layout, model.config.window_size)
            elif config.schedule == "speculative":
                schedule = speculative(schedule, layout)
            self._programs[key] = compile_program(
                model.config,
                schedule,
                temporal=not (part == "first frame" and self._trunk_draws_first_frame),
                given_windows="wrapped" if wrapped else "cut",
            ).to(device)
        labels = self.labels(config.num_clusters)
        drawer = ClusterDraw(labels, draw.temperature, draw.top_k_clusters, draw.token_temperature).to(device)
        together = self.together[id(model)]
        sampler = ClipSampler(model, self._programs[key], drawer, draw, config.clips_at_once, together)
        return KeptSampler(sampler, config.clips_at_once, self._tokens_a_clip(part), name, keep)

    def labels(self, num_clusters: int | None) -> np.ndarray:
        """The cluster of each image code, made once: the bundle's own, or k-means of the codebook."""
        if num_clusters not in self._labels:
            codebook = self.image_tokenizer.codebook.detach().float().cpu().numpy()
            default = min(PUBLISHED_CLUSTERS, len(codebook))
            self._labels[num_clusters] = kmeans_labels(codebook, num_clusters or default)
        return self._labels[num_clusters]


def pictures_of(tokenizer: ImageTokenizer, tokens: Tensor) -> np.ndarray:
    """Pictures (..., height, width, 3) uint8 of square frames (..., frame_len)."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    pictures = tokenizer.decode(flat).mul(255).round().to(torch.uint8)
    pictures = rearrange(pictures, "n c h w -> n h w c")
    return pictures.reshape(*tokens.shape[:-1], *pictures.shape[1:]).numpy(force=True)
