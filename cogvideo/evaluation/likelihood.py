"""Negative log-likelihood of given clips under a model, per token, and the file that stores it. Samples nothing.

Every frame is scored, including given frames, whose losses help to verify a checkpoint conversion. But a model learns
supervised frames only, and the given frames of stage 2 attend to each other without a causal mask, so their losses are
not likelihoods.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cogvideo.data.dataset import ClipDataset
from cogvideo.data.published_rows import PublishedRows
from cogvideo.files import atomic_write, parse_json
from cogvideo.inference.backends import install_kernels
from cogvideo.model.config import ModelConfig
from cogvideo.model.inputs import TextBias
from cogvideo.model.plan import Plan
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import TEXT_MULTIPLE, Batch, frame_inputs
from cogvideo.sequence.prompt import NO_LIMIT, PromptFormat, left_pad
from cogvideo.tensor_file import read_header
from cogvideo.tokenizers.records import TokenizerRecords
from cogvideo.tokenizers.text import open_text_tokenizer

CHUNK_ROWS = 2048
"""Rows whose logits are in memory at once: 160 MB at 20,000 image tokens."""

LEARNED_FRAMES = "learned_frames"
"""Key of the file's metadata: a JSON list of the frames whose losses are likelihoods."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ScoredClips:
    """`count` clips to score. `batch` reads some of them."""

    count: int
    batch: Callable[[range], Batch]


def open_published_rows(path: Path, config: ModelConfig) -> ScoredClips:
    """Clips from published training rows.

    Raises: OSError; ValueError if the file is not a whole number of rows of the model's sizes.
    """
    rows = PublishedRows(
        path,
        text_len=config.text_len,
        num_frames=config.num_frames,
        frame_len=config.frame_len,
        vocabulary=config.vocabulary,
    )
    return ScoredClips(len(rows), lambda indices: rows.batch(np.array(indices)))


def open_prepared_clips(
    path: Path,
    config: ModelConfig,
    text_tokenizer: Path,
    prompt: PromptFormat,
    *,
    suffix: bool = False,
    trained_with: TokenizerRecords | None = None,
) -> ScoredClips:
    """Clips from a folder written by `cogvideo prepare`. `suffix`: append the video suffix, as guided sampling does.

    `trained_with`: the tokenizers that the model was trained with, if it records them.

    Raises: OSError; ValueError if the clips, the tokenizer and the model do not match.
    """
    tokenizer, clips = open_text_tokenizer(text_tokenizer), ClipDataset(path)
    if tokenizer.vocabulary != config.vocabulary:
        raise ValueError(
            f"{text_tokenizer} has different token ids from those the model was trained with; give the model's own"
        )
    kind = (trained_with or TokenizerRecords()).differing(TokenizerRecords(clips.tokenizer_record, tokenizer.sha256))
    if kind is not None:
        given = path if kind == "image tokenizer" else text_tokenizer
        raise ValueError(f"the model was trained with another {kind} than that of {given}; use the model's own")
    if (clips.num_frames, clips.frame_len) != (config.num_frames, config.frame_len):
        raise ValueError(
            f"{path} holds clips of {clips.num_frames} frames of {clips.frame_len} tokens, the model reads "
            f"{config.num_frames} of {config.frame_len}; prepare them with the model's sizes"
        )
    if clips.num_tokens > config.vocabulary.num_image_tokens:
        raise ValueError(
            f"{path} holds tokens of an image tokenizer with {clips.num_tokens} codes, the model knows "
            f"{config.vocabulary.num_image_tokens}; prepare it with the model's own"
        )
    newline, pad, text_len = config.vocabulary.newline, config.vocabulary.pad, config.text_len
    ending = prompt.video_suffix if suffix else ""

    def batch(indices: range) -> Batch:
        lengths_and_captions = clips.texts(np.array(indices))
        texts = [  # long ones are truncated, as in training
            prompt.clip_text(tokenizer.encode, newline, seconds, caption, NO_LIMIT, suffix=ending)[:text_len]
            for seconds, caption in lengths_and_captions
        ]
        text, mask = (torch.from_numpy(a) for a in left_pad(texts, text_len, pad))
        seconds = torch.tensor([seconds for seconds, _ in lengths_and_captions])
        return Batch(text, mask, torch.from_numpy(clips.frames(np.array(indices))), seconds)

    return ScoredClips(len(clips), batch)


@torch.inference_mode()
def token_losses(
    model: CogVideoTransformer, plan: Plan, batch: Batch, logits_out: NDArray[np.float32] | None = None
) -> Floats:
    """Negative log-likelihood of every frame token, in nats: (batch, num_frames, frame_len).

    `plan` is `model.plan_clip(device)`. `logits_out` (batch, slots, image tokens) is filled if given.
    """
    assert not model.training, "dropout is on; call model.eval() first"
    device = model.word_embeddings.weight.device
    batch = batch.trim_text(TEXT_MULTIPLE if device.type == "cuda" else 1).to(device)
    inputs = frame_inputs(batch.frames, model.config.vocabulary.start_of_image)
    hidden = model(inputs, plan, TextBias.from_mask(batch.text_mask), text=batch.text).flatten(0, 1)
    losses = np.empty(len(hidden), np.float32)
    logit_rows = None if logits_out is None else logits_out.reshape(len(hidden), -1)
    for start in range(0, len(hidden), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits = model.logits(hidden[rows])
        losses[rows] = F.cross_entropy(logits, batch.frames.flatten()[rows], reduction="none").cpu().numpy()
        if logit_rows is not None:
            logit_rows[rows] = logits.cpu().numpy()
    return losses.reshape(batch.frames.shape)


class FrameMeans:
    """Running mean of each frame's losses, in float64."""

    def __init__(self, num_frames: int) -> None:
        self.sums = np.zeros(num_frames)
        self.clips = 0

    def add(self, losses: Floats) -> None:
        """losses: (clips, num_frames, frame_len)."""
        self.sums += losses.astype(np.float64).mean(2).sum(0)
        self.clips += len(losses)

    def summary(self, config: ModelConfig) -> str:
        """One line per frame, and the mean over supervised frames, which training minimises."""
        means = self.sums / max(self.clips, 1)
        supervised = list(config.layout.supervised_frames)
        lines = [f"{self.clips} clips; mean negative log-likelihood per token, in nats"]
        for frame, mean in enumerate(means):
            lines.append(f"  frame {frame}  {'learned' if frame in supervised else 'given':<8}{mean:.6f}")
        mean = float(means[supervised].mean())
        lines.append(f"  all learned       {mean:.6f}  (perplexity {math.exp(min(mean, 700)):.2f})")
        return "\n".join(lines)


def score_clips(
    model: CogVideoTransformer,
    source: ScoredClips,
    path: Path,
    *,
    count: int,
    batch_size: int,
    logits: bool = False,
    progress: Callable[[int], object] = lambda clips: None,
) -> FrameMeans:
    """Score the first `count` clips into a safetensors file: `losses`, and with `logits` also `logits`.

    Returns the means per frame; `progress` is called with the number of clips of each batch.
    """
    config = model.config
    learned = json.dumps(list(config.layout.supervised_frames))
    shapes: dict[str, tuple[int, ...]] = {"losses": (count, config.num_frames, config.frame_len)}
    if logits:
        shapes["logits"] = (count, config.layout.num_slots, config.vocabulary.num_image_tokens)
    install_kernels(model)
    plan = model.plan_clip(model.word_embeddings.weight.device)
    means = FrameMeans(config.num_frames)
    with open_score_file(path, shapes, {LEARNED_FRAMES: learned}) as arrays:
        for start in range(0, count, batch_size):
            rows = range(start, min(start + batch_size, count))
            logits_out = arrays["logits"][start : rows.stop] if logits else None
            losses = token_losses(model, plan, source.batch(rows), logits_out)
            arrays["losses"][start : rows.stop] = losses
            means.add(losses)
            progress(len(rows))
    return means


@dataclass(frozen=True)
class TokenScores:
    """The losses found by `cogvideo score`, per clip."""

    origin: str
    losses: NDArray[np.float64]
    """(clips,): mean negative log-likelihood per token of the learned frames, in nats."""


def read_scores(path: Path) -> TokenScores:
    """Raises: OSError; ValueError if `score_clips` did not write the file, or losses are negative or not finite."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected one that `cogvideo score` wrote")
    names = read_header(path)
    try:
        with safe_open(path, "numpy") as file:
            text = (file.metadata() or {}).get(LEARNED_FRAMES)
            losses = file.get_tensor("losses") if "losses" in names else None
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({str(error)[:200]}); score again") from None
    learned = None if text is None else parse_json(text.encode(), f"{path}, {LEARNED_FRAMES}")
    if learned is None or losses is None:
        raise ValueError(
            f"{path} does not say which frames are learned; rewrite it with this version of `cogvideo score`"
        )
    fits = losses.ndim == 3 and losses.size and isinstance(learned, list) and learned
    if not fits or not all(isinstance(frame, int) and 0 <= frame < losses.shape[1] for frame in learned):
        raise ValueError(f"{path} holds losses {list(losses.shape)} of frames {learned}; score again")
    values = losses[:, learned].astype(np.float64).mean(axis=(1, 2))
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"{path} holds values that are not likelihoods; score again")
    return TokenScores(str(path), values)


@contextmanager
def open_score_file(
    path: Path, shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None
) -> Iterator[dict[str, Floats]]:
    """Write a safetensors file of float32 arrays of these shapes: yields memory maps to fill.

    Memory is needed for one batch only, however many clips there are. The file appears when it is complete.
    """
    # Arrays lie end to end after the header; `spans` holds each one's begin and end offsets, as the format requires.
    ends = np.cumsum([4 * math.prod(shape) for shape in shapes.values()]).tolist()
    spans = dict(zip(shapes, zip([0, *ends], ends, strict=False), strict=True))
    header: dict[str, object] = {
        n: {"dtype": "F32", "shape": list(shapes[n]), "data_offsets": list(spans[n])} for n in shapes
    }
    header |= {} if metadata is None else {"__metadata__": metadata}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, 8 + len(text) + ends[-1])  # a full disk is an error here, not a SIGBUS
        begin = 8 + len(text)
        maps = {
            name: np.memmap(temporary, np.float32, "r+", begin + spans[name][0], shape)
            for name, shape in shapes.items()
        }
        yield {**maps}
        for array in maps.values():
            array.flush()
