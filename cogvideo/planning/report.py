"""A model's clip layout, attention masks and costs as text, for `cogvideo inspect` and the training log."""

import math
from dataclasses import replace

from cogvideo.checkpoint.parameters import TransformerConfig
from cogvideo.model.config import ModelConfig
from cogvideo.model.masks import Mask, channel_masks, render_mask, render_view
from cogvideo.planning.budgets import (
    ASSUMPTIONS,
    USABLE_MEMORY,
    TrainingSettings,
    sampling_budget,
    suggestions,
    trained_and_all_parameters,
    training_budget,
)
from cogvideo.planning.machines import Machine

MAX_COLUMNS = 200
"""Characters per line of a drawn mask."""


def describe_layout(config: ModelConfig) -> str:
    """One line per frame: its role, and what it attends to."""
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
            if other.order < frame.order or (other.order == frame.order and not frame.causal)
        ]
        visible = [f"all of frames {', '.join(whole)}"] if whole else []
        visible += ["its own slots up to the current one"] if frame.causal else []
        role = "generated" if frame.supervised else "given"
        lines.append(f"  frame {i}: {role:<9}  order {frame.order}  attends to {' and '.join(visible)}")
    if config.has_temporal_channel:
        window = config.window_size
        windows = "in full"
        if window:
            windows = f"in windows of {window}x{window}, shifted by {window // 2} on odd layers"
        lines.append(f"  spatial channel: the frame itself only; temporal channel: all of the above, {windows}")
    return "\n".join(lines)


def draw_masks(config: ModelConfig, side: int | None = None) -> str:
    """Draw every mask: the keys of one slot at full size or, given `side`, all slots of frames of side x side.

    Raises: ValueError if `side` makes the drawing too wide to read.
    """
    layout = config.layout
    if side is None:
        middle = layout.frame_side // 2 - 1 if layout.frame_side > 1 else 0
        slot = layout.generation_order[-1] * layout.frame_len + middle * (layout.frame_side + 1)
        numbers = " ".join(map(str, range(layout.num_frames)))
        return "\n\n".join(
            f"{title}: keys of slot @ in frames {numbers}\n{render_view(mask, slot)}"
            for title, mask in _named_masks(config, config.window_size)
        )
    columns = layout.num_frames * side * side
    if side < 1 or columns > MAX_COLUMNS:
        most = math.isqrt(MAX_COLUMNS // layout.num_frames)
        raise ValueError(
            f"cannot draw masks of {side}x{side} frames; choose a side from 1 to {most}, so that they fit on a screen"
        )
    window = config.window_size
    if window is not None:
        # in proportion, and a divisor of side
        window = math.gcd(side, max(1, round(side * window / layout.frame_side)))
    positions = config.frame_position_start + side * side
    small = replace(config, frame_side=side, window_size=window, num_positions=positions)
    windows = f", windows of {window}x{window}" if window else ""
    return "\n\n".join(
        f"{title}: queries down, keys across, frames of {side}x{side}{windows}\n{render_mask(mask)}"
        for title, mask in _named_masks(small, window)
    )


def _named_masks(config: ModelConfig, window: int | None) -> list[tuple[str, Mask]]:
    spatial, temporal = channel_masks(config.layout, window)
    named = [("spatial channel", spatial)]
    if config.has_temporal_channel:
        layers = ("even layers", "odd layers") if len(temporal) > 1 else ("all layers",)
        named += [(f"temporal channel, {name}", mask) for name, mask in zip(layers, temporal, strict=True)]
    return named


def describe_training(
    config: TransformerConfig, machine: Machine, settings: TrainingSettings, source: str = "the vendor's figures"
) -> str:
    """Memory under each ZeRO stage, and the time of a step. `source`: where the machine's figures come from."""
    quantized = "" if settings.trunk_weights == "full" else f", {settings.trunk_weights} trunk"
    lora = settings.lora
    adapters = f", adapters of rank {lora.rank} ({trained_and_all_parameters(config, settings)[0]:,} parameters)"
    quantized += adapters if lora.rank else ""
    offloaded = ", optimiser in CPU memory" if settings.offload_optimizer else ""
    lines = [
        f"{settings.count} x {machine.name}: {format_bytes(machine.memory_bytes)}, {machine.flops / 1e12:.3g} TFLOP/s "
        f"in bf16, {machine.bandwidth / 1e9:,.1f} GB/s ({source})",
        f"  training, per device, {settings.accumulation} x micro-batch {settings.micro_batch}, "
        f"recompute={settings.recompute}{quantized}{offloaded}; * marks deepspeed.stage",
    ]
    first = 1 if settings.offload_optimizer else 0
    # ZeRO 3 cannot partition quantized weights
    for stage in range(first, 4 if settings.trunk_weights == "full" else 3):
        budget = training_budget(config, machine, replace(settings, zero_stage=stage))
        parts = ("weights", "gradients", "optimiser", "activations", "working")
        sizes = [f"{name} {format_bytes(getattr(budget, name))}" for name in parts if getattr(budget, name)]
        host = f" and {format_bytes(budget.host)} of CPU memory" if budget.host else ""
        fits = "fits" if budget.fits(machine) else "DOES NOT FIT"
        lines.append(
            f"  {'*' if stage == settings.zero_stage else ' '} ZeRO {stage}: {', '.join(sizes)}: "
            f"{format_bytes(budget.total)}{host}, {fits}"
        )
    budget = training_budget(config, machine, settings)
    time = budget.time
    parts_of_step = [
        f"{name} {format_duration(seconds)}"
        for name, seconds in (
            ("forward and backward", time.forward_backward),
            ("recomputation", time.recomputation),
            ("communication", time.communication),
            ("optimiser", time.optimiser),
        )
        if seconds
    ]
    lines.append(
        f"    {format_duration(time.total)} per step of {settings.count * settings.accumulation * settings.micro_batch}"
        f" ({', '.join(parts_of_step)}), MFU {budget.flops / time.total / machine.flops:.0%}"
    )
    lines.append(f"    {ASSUMPTIONS}")
    return "\n".join(lines)


def describe_sampling(config: ModelConfig, machine: Machine) -> str:
    """Memory and time of sampling one clip."""
    sampling = sampling_budget(config, machine)
    guided = ", guided" if config.has_temporal_channel else ""
    fits = "fits" if sampling.total < machine.memory_bytes * USABLE_MEMORY else "DOES NOT FIT"
    return (
        f"  sampling one clip{guided}: weights {format_bytes(sampling.weights)}, KV cache "
        f"{format_bytes(sampling.cache)}: {format_bytes(sampling.total)}, {fits}\n"
        f"    {format_duration(sampling.seconds_per_token)} per token, "
        f"{format_duration(sampling.seconds_per_clip)} for {sampling.tokens_per_clip:,} tokens in sequence"
    )


def describe_suggestions(config: TransformerConfig, machine: Machine, settings: TrainingSettings, most: int = 5) -> str:
    """The fastest settings that fit, each with the `key=value` words that set it."""
    found = suggestions(config, machine, settings)
    if not found:
        return f"  nothing fits {settings.count} x {machine.name}; use more or larger devices"
    lines = [f"  the fastest settings that fit {settings.count} x {machine.name}, a batch of {found[0][0].batch_size}:"]
    for tried, budget in found[:most]:
        step, size = format_duration(budget.seconds_per_step), format_bytes(budget.total)
        lines.append(f"    {step:>7}  {size:>9}  {setting_words(tried)}")
    lines.append(f"    {ASSUMPTIONS}")
    return "\n".join(lines)


def setting_words(settings: TrainingSettings) -> str:
    """The `key=value` words for `cogvideo train` that set what the planner chooses."""
    words = [
        f"train.micro_batch_size={settings.micro_batch}",
        f"train.recompute={settings.recompute}",
        f"deepspeed.stage={settings.zero_stage}",
    ]
    words += ["deepspeed.offload_optimizer=true"] if settings.offload_optimizer else []
    words += [] if settings.trunk_weights == "full" else [f"init.trunk_weights={settings.trunk_weights}"]
    return " ".join(words)


def format_bytes(count: float) -> str:
    """A size in KiB, MiB or GiB, with one decimal."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


def format_duration(seconds: float) -> str:
    """A duration in the unit that reads best, from ms to days."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 3 * 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 180:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
