"""Draw the diagrams of the documentation as SVG, the masks from the model's own mask functions.

    python docs/pictures/make_diagrams.py

The files go beside this one and are committed, so that building the site needs no model. Run it when masks change.
"""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from cogvideo.model.config import ModelConfig
from cogvideo.model.masks import channel_masks

HERE = Path(__file__).parent
INK, FAINT, PAPER = "#333a45", "#d5dae2", "#ffffff"
TEXT, GIVEN, LEARNED, SEEN = "#9aa5b8", "#f0b860", "#5b7fd6", "#5b7fd6"
TEXT_ROWS = 4
Step = tuple[str, str, str]
"""A box of a walk: function, file, and what it returns."""
TRAINING_WALK: tuple[Step, ...] = (
    ("Preparation.run", "data/prepare.py", "videos to shards"),
    ("TokenEncoder", "data/encode.py", "token ids (N, n)"),
    ("ClipLoader.batch", "data/loader.py", "text, frames (B, F, n)"),
    ("Trainer.train_step", "training/trainer.py", "micro-batches"),
    ("ClipObjective", "training/tasks/clips.py", "mean loss, metrics"),
    ("token_losses", "model/transformer.py", "(B, S, n)"),
    ("forward", "model/transformer.py", "hidden (B, S n, h)"),
    ("token_nll", "model/loss.py", "(B S n,)"),
)
SAMPLING_WALK: tuple[Step, ...] = (
    ("run", "cli/sample.py", "settings, weights"),
    ("clip_job", "sampling/jobs.py", "keys, token ids"),
    ("write_clips", "sampling/runner.py", "groups of clips"),
    ("Pipeline.stages", "sampling/pipeline.py", "1, 5, 9, 17, 33 frames"),
    ("FrameSampler.sample", "sampling/pipeline.py", "batches of C clips"),
    ("Engine.generate", "inference/engine.py", "tokens (C, F n)"),
    ("Backend.decode", "inference/backends.py", "logits (R, s, V)"),
    ("ClusterSampler", "inference/sampler.py", "tokens (C, s)"),
    ("decode_frames", "sampling/pipeline.py", "(33, H, W, 3) uint8"),
    ("write_clip", "sampling/outputs.py", ".mp4, .gif, .png"),
)

matplotlib.rcParams.update({"svg.hashsalt": "cogvideo", "font.size": 9, "text.color": INK, "font.family": "sans-serif"})


def main() -> None:
    sequence()
    masks("masks_stage1", ModelConfig(task="sequential", **small(3)), "queries: slots of frames 0 to 4")
    masks("masks_stage2", ModelConfig(task="interpolation", **small(3)), "queries: slots of frames 0 to 4")
    windows()
    rounds()
    pipeline()
    walk("walk_training", TRAINING_WALK, "#dfe6f6")
    walk("walk_sampling", SAMPLING_WALK, "#fbe8c9")


def small(side: int) -> dict[str, int]:
    """Settings of a model with frames of side x side tokens."""
    return {
        "num_layers": 1,
        "hidden_size": 8,
        "num_heads": 1,
        "text_len": TEXT_ROWS,
        "frame_side": side,
        "frame_position_start": TEXT_ROWS,
        "num_positions": TEXT_ROWS + side * side,
    }


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_facecolor(PAPER)
    return figure


def save(figure: Figure, name: str) -> None:
    path = HERE / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None}, format="svg")
    print(path)


def blank(axes: Axes, width: float, height: float) -> None:
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.axis("off")


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "", size: float = 8
) -> None:
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="white", linewidth=1)
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 0.8, "mutation_scale": 8})


def sequence() -> None:
    """Inputs and outputs of a clip: text, then two frames of four tokens."""
    figure = new_figure(9, 2.5)
    axes = figure.add_subplot()
    blank(axes, 18.6, 4.3)
    axes.text(0.95, 1.5, "input", ha="right", va="center")
    axes.text(0.95, 3.3, "predicts", ha="right", va="center")
    x = 1.2
    for word in ("length", "line\nbreak", "caption", "caption"):
        box(axes, x, 1.0, 1.15, 1.0, TEXT, word, 7)
        x += 1.2
    axes.text(3.6, 0.6, "text: padded on the left", ha="center")
    for frame, colour in ((0, GIVEN), (1, LEARNED)):
        x += 0.3
        axes.text(x + 2.4, 0.6, f"frame {frame}: 4 slots", ha="center")
        for slot in range(4):
            box(
                axes,
                x,
                1.0,
                1.15,
                1.0,
                "#e8ebf0" if slot == 0 else colour,
                "BOI" if slot == 0 else f"token {slot - 1}",
                7,
            )
            box(axes, x, 2.8, 1.15, 1.0, colour, f"token {slot}", 7)
            arrow(axes, (x + 0.575, 2.1), (x + 0.575, 2.75))
            x += 1.2
    axes.text(16.9, 1.5, "then frames\n2, 3, 4", ha="left", va="center", color=INK)
    save(figure, "sequence")


def runs(row: np.ndarray) -> Iterable[tuple[int, int]]:
    """Start and length of each run of True."""
    position = 0
    for seen, group in groupby(row.tolist()):
        length = len(list(group))
        if seen:
            yield position, length
        position += length


def draw_mask(axes: Axes, allowed: np.ndarray, frame_len: int, title: str) -> None:
    """A mask with the text columns, which every frame row attends to, on its left."""
    rows, columns = allowed.shape
    full = np.concatenate([np.ones((rows, TEXT_ROWS), bool), allowed], axis=1)
    for y, row in enumerate(full):
        for start, length in runs(row[:TEXT_ROWS]):
            axes.add_patch(Rectangle((start, y), length, 1, facecolor=TEXT, linewidth=0, antialiased=False))
        for start, length in runs(row[TEXT_ROWS:]):
            axes.add_patch(Rectangle((start + TEXT_ROWS, y), length, 1, facecolor=SEEN, linewidth=0, antialiased=False))
    for edge in range(0, rows + 1, frame_len):
        axes.plot([0, TEXT_ROWS + columns], [edge, edge], color=FAINT, linewidth=0.8)
        axes.plot([TEXT_ROWS + edge] * 2, [0, rows], color=FAINT, linewidth=0.8)
    axes.set_xlim(0, TEXT_ROWS + columns)
    axes.set_ylim(rows, 0)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=9, color=INK)
    middle = frame_len / 2
    frames = range(rows // frame_len)
    axes.set_xticks([TEXT_ROWS / 2, *(TEXT_ROWS + f * frame_len + middle for f in frames)], ["text", *map(str, frames)])
    axes.set_yticks([f * frame_len + middle for f in frames], [str(f) for f in frames])
    axes.tick_params(length=0, colors=INK)
    axes.set_xlabel("keys", color=INK)
    for spine in axes.spines.values():
        spine.set_color(FAINT)


def masks(name: str, config: ModelConfig, ylabel: str) -> None:
    """The spatial and the temporal mask of a small model, every slot against every slot."""
    layout = config.layout
    spatial, (temporal, *_) = channel_masks(layout, None)
    slots = np.arange(layout.num_slots)
    figure = new_figure(8, 4.1)
    for axes, mask, title in zip(
        figure.subplots(1, 2), (spatial, temporal), ("spatial channel", "temporal channel"), strict=True
    ):
        draw_mask(axes, mask.allowed(slots[:, None], slots[None, :]), layout.frame_len, title)
    figure.axes[0].set_ylabel(ylabel, color=INK)
    save(figure, name)


def windows() -> None:
    """What one slot of stage 2 attends to in the temporal channel: even and odd layers."""
    config = ModelConfig(task="interpolation", window_size=4, **small(8))
    layout = config.layout
    _, temporal = channel_masks(layout, 4)
    slots = np.arange(layout.num_slots)
    query = 3 * layout.frame_len + 3 * 8 + 4
    figure = new_figure(8, 3.6)
    for axes, mask, which in zip(figure.subplots(2, 1), temporal, ("even layers", "odd layers"), strict=True):
        seen = mask.allowed(np.array(query), slots).reshape(5, 8, 8)
        blank(axes, 5 * 9, 9)
        axes.text(-0.4, 4, which, ha="right", va="center")
        for frame, grid in enumerate(seen):
            left = frame * 9
            for (y, x), on in np.ndenumerate(grid):
                own = frame == 3 and (y, x) == (3, 4)
                colour = "#d1495b" if own else SEEN if on else "#eef0f4"
                axes.add_patch(Rectangle((left + x, y), 0.92, 0.92, facecolor=colour, linewidth=0))
            axes.text(left + 4, 8.7, f"frame {frame}", ha="center", va="center", fontsize=7)
    save(figure, "windows")


def rounds() -> None:
    """Key frames and three rounds of interpolation on a time axis."""
    figure = new_figure(8, 2.3)
    axes = figure.add_subplot()
    axes.set_xlim(-0.75, 4.2)
    axes.set_ylim(3.6, -0.6)
    axes.axis("off")
    names = ("stage 1: 5 key frames", "round 1: 9 frames", "round 2: 17 frames", "round 3: 33 frames")
    for level, name in enumerate(names):
        count = 4 * 2**level + 1
        times = np.linspace(0, 4, count)
        new = np.arange(count) % 2 == 1 if level else np.ones(count, bool)
        axes.plot([0, 4], [level, level], color=FAINT, linewidth=1, zorder=0)
        axes.scatter(times[~new], [level] * int((~new).sum()), s=26, color=GIVEN)
        axes.scatter(times[new], [level] * int(new.sum()), s=26, color=LEARNED)
        axes.text(-0.08, level, name, ha="right", va="center", fontsize=8)
    axes.text(0, 3.5, "0 s", ha="center", va="center", fontsize=8)
    axes.text(4, 3.5, "4 s", ha="center", va="center", fontsize=8)
    save(figure, "rounds")


def pipeline() -> None:
    """Training data on the upper row, sampling on the lower one."""
    figure = new_figure(9, 3.0)
    axes = figure.add_subplot()
    blank(axes, 18, 6)
    upper = (
        "videos +\ncaptions",
        "clips of\nimage tokens",
        "cross-entropy\nof supervised frames",
        "checkpoints,\nexport/",
        "bundle",
    )
    lower = (
        "caption",
        "first frame\n(trunk)",
        "key frames\n(stage 1)",
        "interpolation\n(stage 2)",
        ".mp4, .gif, .png,\ntokens",
    )
    steps = (("prepare", "train", "", "bundle"), ("", "", "3 rounds", "decode"))
    for y, words, names, title in ((0.9, upper, steps[0], "training"), (4.0, lower, steps[1], "sampling")):
        axes.text(0, y - 0.4, title, ha="left", va="center", fontsize=9, fontweight="bold")
        for i, word in enumerate(words):
            x = i * 3.75
            box(axes, x, y, 2.7, 1.3, "#dfe6f6" if y < 2 else "#fbe8c9", word, 7.5)
            if i < 4:
                arrow(axes, (x + 2.75, y + 0.65), (x + 3.7, y + 0.65))
                axes.text(x + 3.2, y + 0.35, names[i], ha="center", va="center", fontsize=6.5)
    axes.plot([16.35, 16.35], [2.3, 3.0], color=INK, linewidth=0.8)
    axes.plot([5.1, 16.35], [3.0, 3.0], color=INK, linewidth=0.8)
    arrow(axes, (5.1, 3.0), (5.1, 3.95))
    axes.text(10.5, 2.75, "weights, tokenizers, settings", ha="center", va="center", fontsize=7)
    save(figure, "pipeline")


def walk(name: str, steps: tuple[Step, ...], colour: str) -> None:
    """A chain of calls in two rows: function and file in a box, what it returns below."""
    figure = new_figure(9, 2.25)
    axes = figure.add_subplot()
    columns, width, pitch = len(steps) // 2, 3.0, 3.6
    blank(axes, columns * pitch - 0.6, 4.4)
    for i, (function, file, shape) in enumerate(steps):
        row, column = divmod(i, columns)
        x, y = column * pitch, row * 2.6
        box(axes, x, y, width, 1.2, colour)
        axes.text(x + width / 2, y + 0.42, function, ha="center", va="center", fontsize=7.5, fontweight="bold")
        axes.text(x + width / 2, y + 0.85, file, ha="center", va="center", fontsize=6.5)
        axes.text(x + width / 2, y + 1.5, shape, ha="center", va="center", fontsize=7)
        if column < columns - 1:
            arrow(axes, (x + width + 0.05, y + 0.6), (x + pitch - 0.05, y + 0.6))
    # from the end of the first row to the start of the second
    right, left = (columns - 1) * pitch + width / 2, width / 2
    axes.plot([right, right, left], [1.8, 2.15, 2.15], color=INK, linewidth=0.8)
    arrow(axes, (left, 2.15), (left, 2.6))
    save(figure, name)


if __name__ == "__main__":
    main()
