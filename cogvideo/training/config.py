"""Settings of a training run, grouped by the code that reads them. Plain data: nothing here imports torch."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cogvideo.config import leaves, to_dict
from cogvideo.hub import describe, resolve
from cogvideo.logs import one_line
from cogvideo.model.config import AttentionName, LoraConfig, ModelConfig, Recompute, TrunkWeights
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.superres.config import SuperresConfig

TaskName = Literal["tokenizer", "image", "sequential", "interpolation", "superres"]


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data."""

    path: list[Path] | None = None
    """A folder that `cogvideo prepare` wrote, or a list of them, read as one: frames (`--frames`) for the tokenizer,
    pairs (`low_res_pixels=`) for superres, clips of tokens for all other tasks."""
    weights: list[float] | None = None
    """With several folders in path: how often clips of each are seen, in proportion; null: as often as they have
    rows."""
    embedded_clips: int | None = None
    """Instead of path, for trying things out: the number of moving-digit clips to generate and encode at the start."""
    validation: list[Path] | None = None
    """One or more such folders, never trained on; their loss is logged."""
    clip_seconds: list[float] | None = None
    """Use only clips of these lengths; null: all."""
    balance_lengths: bool = True
    """Whether every clip length is seen equally often."""
    guidance_dropout: float = 0.0
    """Probability that a caption is replaced by the unconditional one, for classifier-free guidance. In validation all
    clips have theirs."""
    suffix_probability: float = 1.0
    """Probability that a clip's caption gets the video suffix."""
    text_tokenizer: Path | None = None
    """The sentencepiece model, which also determines the model's vocabulary; null: that of the bundled weights. This,
    the image tokenizers and init.checkpoint may also name USER/REPO[/FOLDER][@REVISION] of the Hugging Face hub."""
    image_tokenizer: Path | None = None
    """Decodes tokens for sample sheets, and encodes embedded_clips; null: that of the bundled weights."""
    high_res_tokenizer: Path | None = None
    """For superres, decodes the large frames of sample sheets; null: image_tokenizer does."""
    prompt: PromptFormat = field(default_factory=PromptFormat)
    """How captions become text tokens."""

    def __post_init__(self) -> None:
        if self.weights is not None:
            if not self.weights or len(self.weights) != len(self.path or []):
                raise ValueError(
                    f"data.weights has {len(self.weights)} numbers, and data.path {len(self.path or [])} folders; give "
                    "one number per folder"
                )
            if not all(0 < weight < math.inf for weight in self.weights):
                raise ValueError(f"data.weights={self.weights}; expected numbers above 0, one per folder of data.path")
        if self.embedded_clips is not None and self.embedded_clips < 1:
            raise ValueError(f"data.embedded_clips={self.embedded_clips}; expected at least 1, or null for data.path")


@dataclass(frozen=True)
class InitConfig:
    """Initial weights."""

    checkpoint: Path | None = None
    """A checkpoint in our format. Of the same task: all weights are loaded; of another: its trunk. null: random."""
    codebook: bool = False
    """Without a checkpoint: start embeddings of image tokens as random projections of the image tokenizer's codes, so
    that those of similar codes are similar, instead of random numbers."""
    temporal: Literal["qkv", "qkv_and_dense", "copy"] = "qkv_and_dense"
    """How the temporal channel starts: as the trunk's spatial one (`qkv`, as published, or `qkv_and_dense`, with the
    output layer), or as the checkpoint's own temporal channel (`copy`)."""
    mix_logit: float = 0.0
    """Initial mixing logit of the two channels: 0 mixes evenly, as published; a large one starts as the trunk alone."""
    freeze_trunk: bool = False
    """Whether to train only the parameters that CogVideo adds to the trunk."""
    trunk_weights: TrunkWeights = "full"
    """`int8`: hold a frozen trunk's matrices in int8 with a float32 scale per row, dequantized where they are used.
    `float8`: in as many bytes; GPUs since Ada multiply it as it is, with inputs and gradients rounded to it."""


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 2e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.01
    """Applied to matrices and embeddings; not to LayerNorms, biases and mixing logits."""
    grad_clip: float = 1.0
    """Maximum norm of the gradients; 0: no clipping."""
    warmup_steps: int = 500
    """Steps of linear warmup."""
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    """The learning rate after the warmup: `cosine` falls from lr to the end of train.steps; `constant` stays lr; `wsd`
    (warmup, stable, decay) stays lr and falls linearly at the end."""
    min_lr_ratio: float = 0.1
    """`cosine` and `wsd` end at this fraction of lr."""
    decay_fraction: float = 0.2
    """`wsd`: the fraction of train.steps, at the end, in which the rate falls."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimiser.lr={self.lr}; expected above 0")
        if self.eps <= 0:
            raise ValueError(f"optimiser.eps={self.eps}; expected above 0")
        for name in ("weight_decay", "grad_clip", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimiser.{name}={getattr(self, name)}; expected 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimiser.betas={list(self.betas)}; expected two numbers from 0 to below 1")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optimiser.min_lr_ratio={self.min_lr_ratio}; expected 0 to 1")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"optimiser.decay_fraction={self.decay_fraction}; expected 0 to 1")


@dataclass(frozen=True)
class LoopConfig:
    """Length, batch size and precision."""

    steps: int = 1000
    """Length of the learning-rate schedule."""
    stop_at: int | None = None
    """Save and stop at this step; the schedule stays the same."""
    batch_size: int = 32
    """Clips (or frames) per step, over all processes."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Clips per forward pass; gradients of a step are accumulated over them. null: a process's whole share; `auto`: as
    the planner finds fastest of what fits the device."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products; softmax, norms and loss are computed in float32."""
    weights: Literal["fp32", "dtype"] = "fp32"
    """`dtype`: hold weights in `dtype` too, and float32 copies only in the optimiser (for large models)."""
    gradients: Literal["fp32", "dtype"] = "dtype"
    """`fp32`: with weights in `dtype`, sum the gradients of a step's micro-batches in float32."""
    recompute: Recompute | Literal["auto"] = "nothing"
    """Activations recomputed in the backward pass instead of stored: `mlp`, those of each MLP; `layer`, all but each
    layer's input; `auto`: as little as fits the device, by the planner. docs/results.md has savings and cost."""
    attention: AttentionName = "auto"
    """How attention is computed. `auto`: on a CPU `cpu`, in tiles and blocks of rows that share keys; on a GPU `flex`,
    one call of FlexAttention per channel. `dense` computes all pairs of rows in one call, as `flex` does where
    model.attention_dropout is above 0; `sdpa`: blocks."""
    compile: bool = False
    """Whether to compile the transformer's layers by torch.compile, which makes a layer of few kernels. Each shape of
    batch and text is compiled once, which takes up to minutes. Needs deepspeed.stage=0, 1 or 2."""
    text_multiple: int | None = None
    """Pad the texts of a micro-batch to a multiple of so many tokens, which changes no loss; null: 16 on a GPU and
    with train.compile, so that there are few shapes, else 1."""
    seed: int = 0
    """Seed of all random numbers."""
    num_threads: int | None = None
    """CPU threads per process; null: as OMP_NUM_THREADS or torch decides."""
    time_limit_minutes: float | None = None
    """Save and stop after this time."""
    max_bad_steps: int = 10
    """Steps with a NaN or infinite loss or gradient are skipped; this many in a row end the run."""
    skip_spikes: float | None = None
    """Skip steps whose gradient norm, before clipping, is above so many times the median of the last 64 steps' (skipped
    ones too, so that a lasting rise passes in the end), from the 17th step on; null: none."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights (EMA), 0.999 say, which validation and sample sheets then use, and
    exports, see export.weights; null: none. After n updates it is at most (1 + n) / (10 + n)."""

    def __post_init__(self) -> None:
        counts = ("steps", "stop_at", "batch_size", "micro_batch_size", "text_multiple", "num_threads", "max_bad_steps")
        for name in counts:
            if getattr(self, name) not in (None, "auto") and getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}; expected at least 1")
        if self.seed < 0:
            raise ValueError(f"train.seed={self.seed}; expected 0 or more")
        if self.time_limit_minutes is not None and self.time_limit_minutes <= 0:
            raise ValueError(f"train.time_limit_minutes={self.time_limit_minutes}; expected above 0, or null for none")
        if self.skip_spikes is not None and not 1 < self.skip_spikes < math.inf:
            raise ValueError(f"train.skip_spikes={self.skip_spikes}; expected above 1, 4 say, or null for none")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay={self.ema_decay}; expected 0 or more, and below 1, or null for none")
        if self.dtype == "fp16" and self.weights == "fp32":
            raise ValueError("train.dtype=fp16 needs train.weights=dtype, which scales the loss")

    @property
    def last_step(self) -> int:
        """The number of steps after which the run ends."""
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)

    @property
    def resolved_recompute(self) -> Recompute:
        """`recompute` once `auto` is resolved."""
        if self.recompute == "auto":
            raise ValueError("train.recompute=auto is not resolved yet")
        return self.recompute

    def accumulation(self, world_size: int) -> int:
        """Micro-batches per step in each of `world_size` processes.

        Raises: ValueError if the batch does not divide.
        """
        if self.micro_batch_size == "auto":
            raise ValueError("train.micro_batch_size=auto is not resolved yet")
        micro = self.micro_batch_size or self.batch_size // world_size
        if micro < 1 or self.batch_size % (world_size * micro):
            raise ValueError(
                f"train.batch_size={self.batch_size} cannot be divided among {world_size} processes with "
                f"train.micro_batch_size={self.micro_batch_size}; choose a multiple"
            )
        return self.batch_size // (world_size * micro)


@dataclass(frozen=True)
class LogConfig:
    """What is logged and saved, and how often (in steps)."""

    every: int = 20
    """Steps per line of metrics.jsonl; each line has means over these steps."""
    loss_by: list[Literal["source", "language"]] = field(default_factory=list)
    """What the loss of clips is logged by, besides frames and clip lengths: `source`, the folder, numbered from 0 as in
    data.path or data.validation; `language`, that of the caption."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Number of checkpoints to keep."""
    preview_every: int = 1000
    """Steps between sample sheets; 0: none. With deepspeed.stage=3 there are none."""
    preview_share: float = 0.05
    """With several processes, which wait while one draws a sample sheet or measures distances: the largest part of the
    run's time that these may take. They are left out where they took more so far."""
    validate_every: int = 500
    """Steps between validations."""
    validation_batches: int = 8
    """Batches per validation."""
    distances_every: int = 0
    """Steps between measurements of appearance and motion distance: of clips that the model generates from real clips,
    of the validation data if there are some, and of two halves of these as the floor; 0: none. Needs the extra
    `[distances]`; for the tasks sequential and interpolation, and deepspeed.stage=0, 1 or 2."""
    distances_clips: int = 64
    """Real clips, and as many generated ones, of a distance. Two distances can be compared only if they are of equally
    many."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Whether to log to Weights & Biases."""
    tensorboard: bool = False
    """Whether to log to run_dir/tensorboard; needs the extra `[tensorboard]`."""
    peak_tflops: float | None = None
    """Peak TFLOPS of one process's device in train.dtype, for MFU; null: measured at the start."""

    def __post_init__(self) -> None:
        for name in ("every", "save_every", "keep_last", "validate_every", "validation_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"log.{name}={getattr(self, name)}; expected at least 1")
        for name in ("preview_every", "distances_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"log.{name}={getattr(self, name)}; expected 0 or more")
        if self.distances_clips < 4:
            raise ValueError(f"log.distances_clips={self.distances_clips}; expected 4 or more")
        if not 0 <= self.preview_share <= 1:
            raise ValueError(f"log.preview_share={self.preview_share}; expected 0 to 1")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"log.peak_tflops={self.peak_tflops}; expected above 0, or null to measure it")


@dataclass(frozen=True)
class ExportConfig:
    """What run_dir/export holds."""

    weights: Literal["ema", "last"] = "ema"
    """With train.ema_decay: the average of the weights, or the weights of the last step."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """How weights, gradients and the optimiser are partitioned."""

    stage: int = 0
    """ZeRO stage. 0: nothing is partitioned; 1: the optimiser; 2: gradients too; 3: weights too. With
    train.weights=dtype, 0 means 1."""
    offload_optimizer: bool = False
    """Keep the optimiser and its float32 weights in CPU memory; needs stage 1, 2 or 3."""
    timeout_minutes: float = 30.0
    """How long a process waits in a collective for others that are alive before it fails. One without a heartbeat is
    lost after a minute, or after this time if that is shorter."""
    file: Path | None = None
    """A DeepSpeed JSON file, merged over the settings that follow from this config."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.stage={self.stage}; expected 0, 1, 2 or 3")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("deepspeed.offload_optimizer=true needs deepspeed.stage=1, 2 or 3")
        if self.timeout_minutes <= 0:
            raise ValueError(f"deepspeed.timeout_minutes={self.timeout_minutes}; expected above 0")


@dataclass(frozen=True)
class MachineConfig:
    """What a machine file is for, which `cogvideo inspect` plans with. Training reads the devices that it finds."""

    gpu: str | None = None
    """The GPU, by a name that `cogvideo inspect` knows; null: this machine is measured."""
    count: int = 1
    """Processes, one per GPU."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"machine.count={self.count}; expected at least 1")


@dataclass(frozen=True)
class TokenizerTraining:
    """Settings of the task `tokenizer` alone; the network's structure is the published one.

    With `init.checkpoint` the sizes are the checkpoint's; other values than the defaults here must agree with it.
    """

    channels: int = 32
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    """Multiplier of channels per resolution."""
    encoder_num_res_blocks: int = 1
    """Residual blocks per resolution of the encoder."""
    decoder_num_res_blocks: int = 0
    """The decoder has one residual block per resolution more than this."""
    z_channels: int = 64
    """Channels of the encoder's output."""
    embedding_dim: int = 32
    """Dimension of the codes."""
    norm_groups: int = 8
    """Groups of each GroupNorm."""
    norm_scope: Literal["image", "pixel"] = "image"
    """Whether norms average over the image or per pixel. `pixel` keeps codes local, so that plain background takes few
    of them; with init.checkpoint it replaces the checkpoint's norms."""
    mid_attention: bool = True
    """Whether there is attention at the lowest resolution."""
    num_codes: int = 1024
    """Codebook size."""
    level: int = 1
    """Compression rate: 4 * 2**level pixels per token side."""
    pixel_mean: tuple[float, float, float] | None = None
    """Mean of the pixels, 0 to 1, per channel, for normalization; null: measured on the data."""
    pixel_std: tuple[float, float, float] | None = None
    """Standard deviation of the pixels, per channel; null: measured on the data."""
    continuous_steps: int = 200
    """Steps as a plain autoencoder before k-means initialises the codebook."""
    new_codebook: bool = False
    """With init.checkpoint: take its network, and make a new codebook of num_codes after continuous_steps."""
    ema_decay: float = 0.99
    """Decay of the moving averages that update the codebook."""
    revive_every: int = 20
    """Steps between revivals of unused codes."""
    revive_below: float = 0.03
    """A code used less often than this per step, on average, counts as unused."""
    revive_until: float = 0.8
    """Fraction of the run after which no code is revived, so that the codebook settles."""
    edge_weight: float = 1.0
    """Weight of the edge loss, on differences of neighbouring pixels."""
    commitment: float = 1.0
    """Weight of the commitment loss."""
    relative_commitment: bool = False
    """Divide the commitment loss by the variance of the encoder's outputs. Otherwise the encoder can lower it by
    shrinking its outputs, and does if they are large when the codebook is made: then few codes remain in use."""

    def __post_init__(self) -> None:
        sizes = ("channels", "encoder_num_res_blocks", "z_channels", "embedding_dim", "norm_groups", "num_codes")
        for name in (*sizes, "continuous_steps", "revive_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"tokenizer.{name}={getattr(self, name)}; expected at least 1")
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise ValueError(f"tokenizer.channel_multipliers={list(self.channel_multipliers)}; expected 1 or more each")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"tokenizer.ema_decay={self.ema_decay}; expected 0 or more, and below 1")


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    task: TaskName = "sequential"
    """What to train. `tokenizer`: the image tokenizer; `image`: the text-to-image trunk; `sequential`: stage 1;
    `interpolation`: stage 2; `superres`: the model that superres.method chooses."""
    run_dir: Path = Path("runs/default")
    """The folder for everything that the run writes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer; its task and vocabulary follow from `task` and the text tokenizer."""
    superres: SuperresConfig = field(default_factory=SuperresConfig)
    """Used instead of `model` by the task `superres`; its vocabulary follows from the text tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation data."""
    init: InitConfig = field(default_factory=InitConfig)
    """Initial weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters: with a rank above 0 they alone are trained, and exported instead of the model."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """AdamW and its learning-rate schedule."""
    train: LoopConfig = field(default_factory=LoopConfig)
    """Length, batch size and precision."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is logged and saved, and how often."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """What run_dir/export holds."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """How weights, gradients and the optimiser are partitioned."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """What `cogvideo inspect` plans with."""
    tokenizer: TokenizerTraining = field(default_factory=TokenizerTraining)
    """Settings of the task `tokenizer` alone."""

    def __post_init__(self) -> None:
        if self.train.compile and self.task == "tokenizer":
            raise ValueError("train.compile=true compiles a transformer's layers; leave it out for task=tokenizer")
        if self.init.trunk_weights != "full" and not (self.init.freeze_trunk or self.lora.rank):
            raise ValueError(
                f"init.trunk_weights={self.init.trunk_weights} cannot be trained, and init.freeze_trunk=false; "
                "set init.freeze_trunk=true, or lora.rank, or init.trunk_weights=full"
            )
        if self.init.codebook and self.task == "tokenizer":
            raise ValueError("init.codebook is of a transformer's embeddings; leave it out for task=tokenizer")
        if self.init.codebook and self.init.checkpoint is not None:
            raise ValueError("init.checkpoint has embeddings of its own; leave out init.codebook=true")
        if self.init.codebook and self.data.image_tokenizer is None:
            raise ValueError("init.codebook=true needs the codes; set data.image_tokenizer to what made the tokens")
        if self.train.ema_decay is not None and self.task == "tokenizer":
            raise ValueError(
                "train.ema_decay averages a transformer's weights, and the tokenizer's codebook is a moving average "
                "itself; leave it out for task=tokenizer"
            )
        if self.data.high_res_tokenizer is not None and self.task != "superres":
            raise ValueError(f"data.high_res_tokenizer is for task=superres; leave it out for task={self.task}")
        if self.log.loss_by and self.task in ("tokenizer", "superres"):
            raise ValueError(f"log.loss_by is of clips and their captions; leave it out for task={self.task}")
        if self.log.distances_every and self.task not in ("sequential", "interpolation"):
            raise ValueError(f"task={self.task} has no clips to measure distances of; set log.distances_every=0")
        if self.log.distances_every and self.deepspeed.stage == 3:
            raise ValueError(
                "log.distances_every samples, which needs whole weights, and deepspeed.stage=3 partitions them; set "
                "log.distances_every=0, or deepspeed.stage=0, 1 or 2"
            )
        if self.lora.rank and self.task == "tokenizer":
            raise ValueError("lora.rank is for a transformer's matrices; leave it out for task=tokenizer")
        if self.lora.rank and self.init.checkpoint is None:
            raise ValueError("lora.rank trains adapters of weights that stay as they are; set init.checkpoint to them")
        if self.train.compile and self.deepspeed.stage == 3:
            raise ValueError(
                "train.compile=true cannot compile layers whose weights deepspeed.stage=3 gathers; use "
                "deepspeed.stage=0, 1 or 2"
            )


WEIGHTS = (
    ("data", "text_tokenizer"),
    ("data", "image_tokenizer"),
    ("data", "high_res_tokenizer"),
    ("init", "checkpoint"),
)
"""The settings, by group and name, that are paths of weights or names of the hub."""


def fetch_weights(config: TrainConfig) -> TrainConfig:
    """The config with local paths for what it names of the hub. Raises: OSError, ValueError as `hub.resolve`."""

    def fetched(key: str, path: Path) -> Path:
        with errors_name_key(key):
            return resolve(path)

    return _with_weights(config, fetched)


def with_weights_named(config: TrainConfig) -> TrainConfig:
    """The inverse of `fetch_weights`, each name with the commit that was fetched."""
    return _with_weights(config, lambda key, path: Path(describe(path)))


def _with_weights(config: TrainConfig, change: Callable[[str, Path], Path]) -> TrainConfig:
    for group, name in WEIGHTS:
        settings = getattr(config, group)
        path = getattr(settings, name)
        if path is not None:
            changed = {name: change(f"{group}.{name}", path)}
            config = replace(config, **{group: replace(settings, **changed)})
    return config


FREE_TO_CHANGE = re.compile(
    r"run_dir|log\..*|export\..*|deepspeed\..*|machine\..*"
    r"|train\.(steps|stop_at|time_limit_minutes|micro_batch_size|recompute|attention|compile|text_multiple)"
)
"""Keys that a resumed run may change without a warning: they do not change what is learned, or only extend the run."""


FIXED = re.compile(
    r"task|model\.(?!dropout$|attention_dropout$|text_len$).*|superres\.(?!text_len$).*|lora\.(?!dropout$).*"
    r"|tokenizer\.(channels|channel_multipliers|(en|de)coder_num_res_blocks|z_channels|embedding_dim|norm_groups"
    r"|norm_scope|mid_attention|num_codes|level|new_codebook)"
)
"""Keys that a resumed run must not change: trained weights would be taken for those of another function."""


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of the settings that differ, except those that are FREE_TO_CHANGE.

    Keys that `before`, an older version's, lacks have their defaults, which do what that version did.
    """
    old, new = (dict(leaves(values)) for values in (before, now))
    defaults = dict(leaves(to_dict(TrainConfig())))
    for key in sorted(old.keys() | new.keys()):
        was, will_be = old.get(key, defaults.get(key)), new.get(key)
        if was != will_be and not FREE_TO_CHANGE.fullmatch(key):
            yield key, was, will_be


def check_resumable(changes: Iterable[tuple[str, Any, Any]], run_dir: Path) -> None:
    """Raises: ValueError if any of the changes is of a key that is FIXED."""
    wrong = [f"{key}={new} (it was {old})" for key, old, new in changes if FIXED.fullmatch(key)]
    if wrong:
        raise ValueError(
            f"{run_dir} cannot be resumed with {', '.join(wrong)}: its weights are of the old settings; resume it with "
            "those, or begin another run_dir"
        )


@contextlib.contextmanager
def errors_name_key(key: str) -> Iterator[None]:
    """Let errors of reading what the user gave with a key begin with that key, unless they name it anyway."""
    try:
        yield
    except (ValueError, OSError) as error:
        if key in str(error):
            raise
        raise ValueError(f"{key}: {one_line(error)}") from error
