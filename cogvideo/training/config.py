"""Settings of a training run, grouped by the code that reads them. Plain data: nothing here imports torch."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cogvideo.config import MAX_SEED, leaves, to_dict
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
    """A folder written by `cogvideo prepare`, or a list of folders that are read as one data set: frames (`--frames`)
    for task=tokenizer, pairs (`low_res_pixels=`) for task=superres, clips of tokens for all other tasks."""
    weights: list[float] | None = None
    """Relative sampling weights of the folders in path, one per folder: `[3,1]` draws three clips from the first for
    each one from the second. null: in proportion to their numbers of rows."""
    embedded_clips: int | None = None
    """Number of moving-digit clips to render and encode at the start and train on, for quick trials without a path."""
    validation: list[Path] | None = None
    """Held-out data: one or more folders as in path, never trained on. Their loss is logged, and sample sheets show
    them instead of the training data."""
    clip_seconds: list[float] | None = None
    """Use only clips of these lengths, in seconds; null: all clips."""
    balance_lengths: bool = True
    """Whether every clip length is seen equally often."""
    guidance_dropout: float = 0.0
    """Probability that a caption is replaced by the unconditional one, for classifier-free guidance. Validation always
    uses the real captions."""
    suffix_probability: float = 1.0
    """Probability that the video suffix (prompt.video_suffix) is appended to a clip's caption."""
    text_tokenizer: Path | None = None
    """The sentencepiece model, which also determines the model's vocabulary; null: that of the bundled weights. This
    key, the image tokenizers and init.checkpoint also accept USER/REPO[/FOLDER][@REVISION] on the Hugging Face hub."""
    image_tokenizer: Path | None = None
    """The image tokenizer that decodes tokens for sample sheets and encodes embedded_clips; null: that of the bundled
    weights."""
    high_res_tokenizer: Path | None = None
    """For superres: the image tokenizer of the large frames in sample sheets; null: the same as image_tokenizer."""
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
        if self.embedded_clips is not None and self.path is not None:
            raise ValueError(
                f"data.embedded_clips={self.embedded_clips} is for training without data.path, which is set too; leave "
                "out one of them (data.embedded_clips=null)"
            )


@dataclass(frozen=True)
class InitConfig:
    """Initial weights."""

    checkpoint: Path | None = None
    """A checkpoint, in this package's format, to start from: all of its weights if it is of the same task, else its
    trunk only (but see temporal). null: random weights."""
    codebook: bool = False
    """Without a checkpoint: initialise the embeddings of image tokens as random projections of the image tokenizer's
    codes, so that similar codes have similar embeddings, instead of as random numbers."""
    temporal: Literal["qkv", "qkv_and_dense", "copy"] = "qkv_and_dense"
    """How the temporal channel is initialised from the checkpoint. `qkv`: with the query, key and value projections of
    the trunk's spatial channel, as published; `qkv_and_dense`: with its output layer too; `copy`: with the checkpoint's
    own temporal channel."""
    mix_logit: float = 0.0
    """Initial mixing logit of the spatial and temporal channels: 0 mixes them evenly, as published; with a large value
    the model starts as the trunk alone."""
    freeze_trunk: bool = False
    """Whether to freeze the trunk and train only the parameters that the model adds to it."""
    trunk_weights: TrunkWeights = "full"
    """How the matrices of a frozen trunk are stored. `full`: in the type of all other weights; `int8`: with a float32
    scale per row, dequantized at each use; `float8`: in as many bytes as `int8`, and multiplied directly by GPUs since
    Ada, with inputs and gradients rounded to float8 too."""


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
    """The learning rate after the warmup. `cosine`: decays from lr until the end of train.steps; `constant`: stays at
    lr; `wsd` (warmup, stable, decay): stays at lr, then decays linearly at the end."""
    min_lr_ratio: float = 0.1
    """`cosine` and `wsd` end at this fraction of lr."""
    decay_fraction: float = 0.2
    """`wsd`: the fraction of train.steps, at the end, over which the learning rate decays."""

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
    """Number of training steps, and length of the learning-rate schedule."""
    stop_at: int | None = None
    """Save and stop at this step, without changing the learning-rate schedule; null: train for all steps."""
    batch_size: int = 32
    """Clips (or frames) per step, over all processes."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Clips per forward pass; gradients are accumulated over the micro-batches of a step. null: a process's whole share
    of the batch; `auto`: the fastest size that fits the device, chosen by the planner."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of matrix products; softmax, norms and loss are computed in float32."""
    weights: Literal["fp32", "dtype"] = "fp32"
    """`dtype`: hold weights in train.dtype too, with float32 copies in the optimiser only (for large models)."""
    gradients: Literal["fp32", "dtype"] = "dtype"
    """`fp32`: with train.weights=dtype, accumulate the gradients of a step's micro-batches in float32."""
    recompute: Recompute | Literal["auto"] = "nothing"
    """Activations that the backward pass recomputes instead of storing them. `mlp`: those between attention and the
    MLP's output; `layer`: all but each layer's input; `auto`: the fastest of these that fits the device, chosen by
    the planner. docs/results.md lists savings and cost."""
    attention: AttentionName = "auto"
    """How attention is computed. `auto`: `cpu` on a CPU, `flex` on a GPU. `sdpa`: in blocks of rows that share keys;
    `cpu`: in tiles where they are faster, else in such blocks; `flex`: by one FlexAttention call per channel; `dense`:
    all pairs of rows in one call, to which `flex` falls back where model.attention_dropout is above 0. Models of
    task=superres compute it in blocks of their own, whatever this says."""
    compile: bool = False
    """Whether to compile the transformer's layers with torch.compile, which fuses each layer into a few kernels. Each
    shape of batch and text is compiled once, which can take minutes. Needs deepspeed.stage=0, 1 or 2."""
    text_multiple: int | None = None
    """Pad the texts of a micro-batch to a multiple of this many tokens, which does not change the loss; null: 16 on a
    GPU or with train.compile, to keep the number of shapes small, else 1."""
    seed: int = 0
    """Seed of all random numbers."""
    num_threads: int | None = None
    """CPU threads per process; null: OMP_NUM_THREADS if it is set, else PyTorch's default."""
    time_limit_minutes: float | None = None
    """Save and stop after this many minutes; null: no limit."""
    max_bad_steps: int = 10
    """Steps with a NaN or infinite loss or gradient are skipped; this many in a row end the run."""
    skip_spikes: float | None = None
    """Skip steps whose gradient norm, before clipping, exceeds this many times the median norm of the last 64 steps,
    from the 17th step on; null: skip none. Norms of skipped steps count too, so that a lasting rise is accepted in the
    end."""
    ema_decay: float | None = None
    """Decay of an exponential moving average (EMA) of the weights, for example 0.999, which validation, sample sheets
    and exports (see export.weights) then use; null: no average. After n updates the decay is at most
    (1 + n) / (10 + n)."""

    def __post_init__(self) -> None:
        counts = ("steps", "stop_at", "batch_size", "micro_batch_size", "text_multiple", "num_threads", "max_bad_steps")
        for name in counts:
            if getattr(self, name) not in (None, "auto") and getattr(self, name) < 1:
                raise ValueError(f"train.{name}={getattr(self, name)}; expected at least 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"train.seed={self.seed}; expected 0 to {MAX_SEED}")
        if self.time_limit_minutes is not None and self.time_limit_minutes <= 0:
            raise ValueError(f"train.time_limit_minutes={self.time_limit_minutes}; expected above 0, or null for none")
        if self.skip_spikes is not None and not 1 < self.skip_spikes < math.inf:
            raise ValueError(f"train.skip_spikes={self.skip_spikes}; expected above 1, 4 say, or null for none")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay={self.ema_decay}; expected 0 or more, and below 1, or null for none")
        if self.dtype == "fp16" and self.weights == "fp32":
            raise ValueError("train.dtype=fp16 needs train.weights=dtype, because only that enables loss scaling")

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

        Raises: ValueError if the batch cannot be divided evenly, or micro_batch_size is `auto`.
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
    """Further breakdowns of the loss of clips, besides those by frame and by clip length. `source`: by folder, numbered
    from 0 in the order of data.path or data.validation; `language`: by the caption's language."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Number of checkpoints to keep."""
    preview_every: int = 1000
    """Steps between sample sheets; 0: none. With deepspeed.stage=3 there are none."""
    preview_share: float = 0.05
    """With several processes, all of which wait while one draws a sample sheet or measures distances: the largest
    fraction of the run's time that these may take. They are skipped while they have taken more than that so far."""
    validate_every: int = 500
    """Steps between validations."""
    validation_batches: int = 8
    """Batches per validation."""
    distances_every: int = 0
    """Steps between measurements of appearance and motion distance between generated clips and the real clips whose
    texts and given frames they start from (validation data if there is any, else training data), with the distance
    between two halves of the real clips as a floor; 0: none. Needs the extra `[distances]`, task sequential or
    interpolation, and deepspeed.stage=0, 1 or 2."""
    distances_clips: int = 64
    """Number of real clips, and of generated clips, in a distance. Two distances are comparable only if these numbers
    are the same."""
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
    """With train.ema_decay: export the average of the weights (`ema`), or the weights of the last step (`last`)."""


@dataclass(frozen=True)
class DeepSpeedConfig:
    """How weights, gradients and the optimiser state are partitioned."""

    stage: int = 0
    """ZeRO stage. 0: nothing is partitioned; 1: the optimiser state is; 2: gradients too; 3: weights too. With
    train.weights=dtype, 0 is treated as 1."""
    offload_optimizer: bool = False
    """Keep the optimiser state and its float32 weights in CPU memory; needs stage 1, 2 or 3."""
    timeout_minutes: float = 30.0
    """How long a process waits in a collective for others that are alive before it fails. A process without a heartbeat
    counts as lost after a minute, or after this time if it is shorter."""
    file: Path | None = None
    """A JSON file of DeepSpeed settings, merged over those that follow from this config."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.stage={self.stage}; expected 0, 1, 2 or 3")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("deepspeed.offload_optimizer=true needs deepspeed.stage=1, 2 or 3")
        if self.timeout_minutes <= 0:
            raise ValueError(f"deepspeed.timeout_minutes={self.timeout_minutes}; expected above 0")


@dataclass(frozen=True)
class MachineConfig:
    """The machine that a machine file is for: `cogvideo inspect` plans for it; training uses the devices it finds."""

    gpu: str | None = None
    """The GPU, by its name in `cogvideo inspect`, such as `h100-80`; null: measure this machine."""
    count: int = 1
    """Number of processes, one per GPU."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"machine.count={self.count}; expected at least 1")


@dataclass(frozen=True)
class TokenizerTraining:
    """Settings of the task `tokenizer` only; the network's structure is the published one.

    With `init.checkpoint` the sizes are those of the checkpoint; values here must be equal to them, or the defaults.
    """

    channels: int = 32
    """Channels at full resolution."""
    channel_multipliers: tuple[int, ...] = (1, 2, 4)
    """Multipliers of channels, one per resolution, from full resolution down."""
    encoder_num_res_blocks: int = 1
    """Residual blocks per resolution in the encoder."""
    decoder_num_res_blocks: int = 0
    """Residual blocks per resolution in the decoder, besides one that it always has."""
    z_channels: int = 64
    """Channels of the encoder's output."""
    embedding_dim: int = 32
    """Dimension of the codes."""
    norm_groups: int = 8
    """Groups of each GroupNorm."""
    norm_scope: Literal["image", "pixel"] = "image"
    """Whether norms average over the image or per pixel. `pixel` keeps codes local, so that plain background needs few
    of them; with init.checkpoint it replaces the checkpoint's norms."""
    mid_attention: bool = True
    """Whether there is attention at the lowest resolution."""
    num_codes: int = 1024
    """Codebook size."""
    level: int = 1
    """Compression level: with three channel_multipliers, a token covers `4 * 2**level` pixels along each side; each
    further multiplier doubles that."""
    pixel_mean: tuple[float, float, float] | None = None
    """Mean of the pixels, 0 to 1, per channel, for normalization; null: measured on the data."""
    pixel_std: tuple[float, float, float] | None = None
    """Standard deviation of the pixels, per channel; null: measured on the data."""
    continuous_steps: int = 200
    """Steps to train as a plain autoencoder before k-means initialises the codebook."""
    new_codebook: bool = False
    """With init.checkpoint: start from its network, but make a new codebook of num_codes after continuous_steps."""
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
    """Divide the commitment loss by the variance of the encoder's outputs. Otherwise the encoder can lower the loss by
    shrinking its outputs, and does so if they are large when the codebook is made, which leaves few codes in use."""

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
    `interpolation`: stage 2; `superres`: the model selected by superres.method."""
    run_dir: Path = Path("runs/default")
    """The folder for everything that the run writes."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer; its task and vocabulary follow from `task` and the text tokenizer."""
    superres: SuperresConfig = field(default_factory=SuperresConfig)
    """The model of the task `superres`, used instead of `model`; its vocabulary follows from the text tokenizer."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation data."""
    init: InitConfig = field(default_factory=InitConfig)
    """Initial weights."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters: with a rank above 0, only they are trained, and they are exported instead of the model."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """AdamW and its learning-rate schedule."""
    train: LoopConfig = field(default_factory=LoopConfig)
    """Length, batch size and precision."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is logged and saved, and how often."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """What run_dir/export holds."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """How weights, gradients and the optimiser state are partitioned."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """The machine that `cogvideo inspect` plans for; training uses the devices that it finds."""
    tokenizer: TokenizerTraining = field(default_factory=TokenizerTraining)
    """Settings of the task `tokenizer` only."""

    def __post_init__(self) -> None:
        if self.train.compile and self.task == "tokenizer":
            raise ValueError("train.compile=true compiles a transformer's layers; leave it out for task=tokenizer")
        if self.init.trunk_weights != "full" and not (self.init.freeze_trunk or self.lora.rank):
            raise ValueError(
                f"init.trunk_weights={self.init.trunk_weights} cannot be trained, and init.freeze_trunk=false; "
                "set init.freeze_trunk=true, or lora.rank, or init.trunk_weights=full"
            )
        if self.init.codebook and self.task == "tokenizer":
            raise ValueError("init.codebook initialises a transformer's embeddings; leave it out for task=tokenizer")
        if self.init.codebook and self.init.checkpoint is not None:
            raise ValueError("init.checkpoint has embeddings of its own; leave out init.codebook=true")
        if self.init.codebook and self.data.image_tokenizer is None:
            raise ValueError(
                "init.codebook=true needs the codes; set data.image_tokenizer to the one that made the tokens"
            )
        if self.train.ema_decay is not None and self.task == "tokenizer":
            raise ValueError(
                "train.ema_decay averages a transformer's weights, and the tokenizer's codebook is a moving average "
                "itself; leave it out for task=tokenizer"
            )
        if self.data.high_res_tokenizer is not None and self.task != "superres":
            raise ValueError(f"data.high_res_tokenizer is for task=superres; leave it out for task={self.task}")
        if self.log.loss_by and self.task in ("tokenizer", "superres"):
            raise ValueError(f"log.loss_by applies only to clips with captions; leave it out for task={self.task}")
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
            raise ValueError(
                "lora.rank trains adapters for weights that stay fixed; set init.checkpoint to these weights"
            )
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
"""(group, name) of the settings that are paths of weights, or names of weights on the Hugging Face hub."""


def fetch_weights(config: TrainConfig) -> TrainConfig:
    """Fetch weights named on the hub; returns the config with local paths. Raises: OSError, ValueError as `resolve`."""

    def fetched(key: str, path: Path) -> Path:
        with errors_name_key(key):
            return resolve(path)

    return _with_weights(config, fetched)


def with_weights_named(config: TrainConfig) -> TrainConfig:
    """The inverse of `fetch_weights`; each name includes the commit that was fetched."""
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
    r"task|(model|superres)\.(?!dropout$|attention_dropout$|text_len$).*|lora\.(?!dropout$).*"
    r"|tokenizer\.(channels|channel_multipliers|(en|de)coder_num_res_blocks|z_channels|embedding_dim|norm_groups"
    r"|norm_scope|mid_attention|num_codes|level|new_codebook)"
)
"""Keys that a resumed run must not change: the trained weights would be used as those of a different function."""
NETWORKS = frozenset({"model", "superres", "tokenizer"})
"""Groups of settings of a network. A task trains that of its own name, or else `model`."""


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, old value, new value) of the settings that differ, except those that are FREE_TO_CHANGE.

    Settings of a network that the task does not train, from a config file that several runs share, are left out too.
    Keys that `before` lacks, because an older version wrote it, get their defaults, which do what that version did.
    """
    old, new = (dict(leaves(values)) for values in (before, now))
    defaults = dict(leaves(to_dict(TrainConfig())))
    task = now.get("task", defaults["task"])
    unused = NETWORKS - {task if task in NETWORKS else "model"}
    for key in sorted(old.keys() | new.keys()):
        was, will_be = old.get(key, defaults.get(key)), new.get(key)
        if was != will_be and not FREE_TO_CHANGE.fullmatch(key) and key.partition(".")[0] not in unused:
            yield key, was, will_be


def check_resumable(changes: Iterable[tuple[str, Any, Any]], run_dir: Path) -> None:
    """Raises: ValueError if any of the changed keys is FIXED."""
    wrong = [f"{key}={new} (it was {old})" for key, old, new in changes if FIXED.fullmatch(key)]
    if wrong:
        raise ValueError(
            f"{run_dir} cannot be resumed with {', '.join(wrong)}: its weights were trained with the old settings; "
            "resume it with those, or use another run_dir"
        )


@contextlib.contextmanager
def errors_name_key(key: str) -> Iterator[None]:
    """Begin errors about what the user gave for `key` with that key, unless they mention it already."""
    try:
        yield
    except (ValueError, OSError) as error:
        if key in str(error):
            raise
        raise ValueError(f"{key}: {one_line(error)}") from error
