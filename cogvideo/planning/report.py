"""A model's clip layout, masks and costs as text for people. Of checkpoints: `cogvideo.checkpoint.report`."""

import math
from dataclasses import replace

from cogvideo.model.config import ModelConfig
from cogvideo.model.masks import Mask, channel_masks, picture, view_from
from cogvideo.planning.budgets import SAFETY, Machine, TrainingSettings, sampling_budget, training_budget

MAX_COLUMNS = 200
"""Of a mask's picture."""


def describe_layout(config: ModelConfig) -> str:
    """One line a frame: its role, and what it sees."""
    layout = config.layout
    frames = layout.frames
    rows = layout.text_len + layout.num_slots
    lines = [
        f"clip: {layout.text_len} text rows, then {len(frames)} frames of {layout.frame_side}x{layout.frame_side} = "
        f"{layout.frame_len} slots: {rows:,} rows"
    ]
    for i, frame in enumerate(frames):
        whole = [
            str(j)
            for j, other in enumerate(frames)
            if other.rank < frame.rank or (other.rank == frame.rank and not frame.causal)
        ]
        sees = [f"frames {', '.join(whole)} whole"] if whole else []
        sees += ["itself up to the slot"] if frame.causal else []
        role = "generated" if frame.supervised else "given"
        lines.append(f"  frame {i}: {role:<9}  rank {frame.rank}  sees {' and '.join(sees)}")
    if config.has_temporal_channel:
        window = config.window_size
        cut = f"in windows of {window}x{window}, on odd layers cut at {window // 2}" if window else "in full"
        lines.append(f"  the spatial channel sees its own frame only; the temporal channel all of the above, {cut}")
    return "\n".join(lines)


def draw_masks(config: ModelConfig, side: int | None = None) -> str:
    """Every mask: what one slot sees at the true size, or all slots for small frames of side x side.

    Raises: ValueError if `side` gives pictures too wide to read.
    """
    layout = config.layout
    if side is None:
        middle = layout.frame_side // 2 - 1 if layout.frame_side > 1 else 0
        slot = layout.generation_order[-1] * layout.frame_len + middle * (layout.frame_side + 1)
        numbers = " ".join(map(str, range(layout.num_frames)))
        return "\n\n".join(
            f"{title}: what slot @ sees in frames {numbers}\n{view_from(mask, slot)}"
            for title, mask in _named_masks(config, config.window_size)
        )
    columns = layout.num_frames * side * side
    if side < 1 or columns > MAX_COLUMNS:
        most = math.isqrt(MAX_COLUMNS // layout.num_frames)
        raise ValueError(f"masks of {side}x{side} frames; expected a side of 1 to {most}, to be read on a screen")
    window = config.window_size
    if window is not None:
        window = math.gcd(side, max(1, round(side * window / layout.frame_side)))
    positions = config.frame_position_start + side * side
    small = replace(config, frame_side=side, window_size=window, num_positions=positions)
    cells = f", windows of {window}x{window}" if window else ""
    return "\n\n".join(
        f"{title}: queries down, keys across, frames of {side}x{side}{cells}\n{picture(mask)}"
        for title, mask in _named_masks(small, window)
    )


def _named_masks(config: ModelConfig, window: int | None) -> list[tuple[str, Mask]]:
    spatial, temporal = channel_masks(config.layout, window)
    named = [("spatial channel", spatial)]
    if config.has_temporal_channel:
        layers = ("even layers", "odd layers") if len(temporal) > 1 else ("all layers",)
        named += [(f"temporal channel, {which}", mask) for which, mask in zip(layers, temporal, strict=True)]
    return named


def describe_costs(config: ModelConfig, machine: Machine, settings: TrainingSettings, source: str) -> str:
    """Memory and time to train under each ZeRO stage, and to sample. `source`: where the machine's figures are from."""
    room = machine.memory_bytes * SAFETY

    def fits(needed: float) -> str:
        return f"{in_bytes(needed)}, {'fits' if needed < room else 'DOES NOT FIT'}"

    lines = [
        f"{settings.count} x {machine.name}: {in_bytes(machine.memory_bytes)}, {machine.flops / 1e12:.3g} TFLOP/s in "
        f"bf16, {machine.bandwidth / 1e9:,.1f} GB/s ({source}); all below is an estimate",
        f"  training, a device with a micro batch of {settings.micro_batch}, "
        f"{settings.recompute} recomputed; * marks zero_stage",
    ]
    for stage in range(4 if settings.trunk_weights == "full" else 3):  # ZeRO 3 takes no int8
        budget = training_budget(config, machine, replace(settings, zero_stage=stage))
        lines.append(
            f"  {'*' if stage == settings.zero_stage else ' '} ZeRO {stage}: weights {in_bytes(budget.weights)}, "
            f"gradients {in_bytes(budget.gradients)}, optimiser {in_bytes(budget.optimiser)}, "
            f"activations {in_bytes(budget.activations)}: {fits(budget.total)}"
        )
    lines.append(f"    {in_time(budget.seconds_a_step)} a step")
    sampling = sampling_budget(config, machine)
    guided = ", guided" if config.has_temporal_channel else ""
    lines += [
        f"  sampling one clip{guided}: weights {in_bytes(sampling.weights)}, KV cache {in_bytes(sampling.cache)}: "
        f"{fits(sampling.total)}",
        f"    {in_time(sampling.seconds_a_token)} a token, {in_time(sampling.seconds_a_clip)} for "
        f"{sampling.tokens:,} tokens one by one",
    ]
    return "\n".join(lines)


def in_bytes(count: float) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def in_time(seconds: float) -> str:
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 3 * 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 180:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
