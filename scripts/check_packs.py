"""Check this package against golden packs: numbers that the published code computed for seeded weights of any size.

    python scripts/check_packs.py DIR [--dtype float32] [--only NAME] [--device cuda]

DIR holds packs (NAME.json + NAME.safetensors; training packs have `rows`, decoding packs have `seq`) and SAT
checkpoint folders `sat-stage1`, `sat-stage2`, which are converted first. Prints one JSON line per pack; the exit code
is 1 if the error of a logit or loss, or the relative error of a gradient norm, exceeds 1e-4. Decoding is checked along
the pack's tokens, which equal ours if each is our greedy choice; where a pack gives the margins of its choices, one
that differs from ours is an error unless it was a tie. The default dtype is float64, so that only the published code's
rounding errors remain. Other packs (tokenizer, super-resolution) are ignored.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from device_timing import add_device_argument, device_argument
from safetensors.torch import load_file
from torch import Tensor

from cogvideo.checkpoint.load import load_model
from cogvideo.checkpoint.parameters import model_parameters
from cogvideo.checkpoint.sat.config import SatSettings, VocabularyIds
from cogvideo.checkpoint.sat.convert import from_sat
from cogvideo.cli.main import run_command
from cogvideo.data.published_rows import PublishedRows
from cogvideo.inference.backends import install_kernels
from cogvideo.inference.engine import Conditioning, Engine, build_program
from cogvideo.inference.schedules import Schedule
from cogvideo.model.inputs import TextBias
from cogvideo.model.plan import plan_forward
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.batch import frame_inputs

LIMIT = 1e-4
"""Largest allowed error of logits and losses, and relative error of gradient norms."""
SMALL_GRADIENT = 1e-3
"""Fraction of the largest norm. Errors of smaller norms are relative to it, as these gradients are mostly rounding."""


@dataclass
class Pack:
    """A pack and its converted checkpoint."""

    path: Path
    """Its .json."""
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    @cached_property
    def about(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        loaded = load_file(self.path.with_suffix(".safetensors"))
        return {name: t.long() if t.dtype == torch.int32 else t for name, t in loaded.items()}

    @property
    def stage(self) -> int:
        if "stage" in self.about:
            return self.about["stage"]
        return 1 if self.about["mode_stage1"] else 2

    @property
    def frame_side(self) -> int | None:
        """None: as in the checkpoint."""
        if "layout" in self.about:
            text_end, frame_end = self.about["layout"][:2]
            return math.isqrt(frame_end - text_end)
        return self.about.get("frame_side")

    def load_model(self) -> CogVideoTransformer:
        """Convert the checkpoint and load it, as a user would, with the pack's own window size."""
        special = self.about["special"]
        ids = VocabularyIds(
            self.about["num_image_tokens"], special["<pad>"], special["<n>"], special["<start_of_image>"]
        )
        settings = SatSettings(
            vocab=ids,
            task="sequential" if self.stage == 1 else "interpolation",
            num_heads=self.about["num_attention_heads"],
            frame_side=self.frame_side,
            window_size=max(self.about["window_size"], 0) if "window_size" in self.about else None,
        )
        source = self.path.parent / self.about.get("sat_checkpoint", f"sat-stage{self.stage}")
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / "model"
            from_sat(source, converted, settings).run(lambda: None)
            # no dropout in training mode either: packs were made without
            config = dataclasses.replace(load_model(converted).config, dropout=0.0, attention_dropout=0.0)
            model = load_model(converted, config=config).to(self.device, self.dtype)
            if self.device.type == "cuda":
                install_kernels(model, self.device, "auto" if self.dtype == torch.float32 else "dense")
            return model


def check_training(pack: Pack) -> dict[str, Any]:
    """Check logits of every frame row, the loss, and every parameter's gradient norm."""
    model = pack.load_model().train()
    config, tensors, about = model.config, pack.tensors, pack.about
    text_len = tensors["rows"].shape[1] - config.layout.num_slots
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.bin"
        tensors["rows"].int().numpy().tofile(file)
        rows = PublishedRows(
            file,
            text_len=text_len,
            num_frames=config.num_frames,
            frame_len=config.frame_len,
            vocabulary=config.vocabulary,
        )
        batch = rows.batch(range(len(rows))).to(pack.device)

    inputs = frame_inputs(batch.frames, config.vocabulary.start_of_image)
    with torch.no_grad():
        plan = plan_forward(config, joined=model.is_joined).to(pack.device)
        hidden = model(inputs, plan, TextBias.from_mask(batch.text_mask), text=batch.text)
        hidden = hidden[:, tensors["logits_at"]] if "logits_at" in tensors else hidden  # packs with only some rows
        logit_error = largest(model.logits(hidden).cpu() - tensors["logits"])
    loss = model.token_losses(batch).mean()
    loss.backward()
    ours = dict(model.named_parameters())
    names = {parameter.sat_name: parameter.name for parameter in model_parameters("video", config.num_layers)}
    norms = about["grad_norms"]
    least = max(max(norms.values()) * SMALL_GRADIENT, 1e-12)
    errors = [abs(gradient_norm(ours[names[name]]).item() - norm) / max(norm, least) for name, norm in norms.items()]
    return {
        "max_logit_error": logit_error,
        "loss_error": abs(loss.item() - about["loss"]),
        "max_gradient_norm_error": max(errors),
        "tokens_equal": None,
    }


def gradient_norm(parameter: Tensor) -> Tensor:
    """Norm of a parameter's gradient, zero if it has none."""
    return torch.zeros(()) if parameter.grad is None else parameter.grad.norm()


@dataclass
class FollowPack:
    """A sampler that returns the pack's tokens and records greedy choices and, at some steps, logits."""

    tokens: Tensor
    """(clips, steps)."""
    recorded_steps: set[int]
    logits: list[Tensor] = field(default_factory=list)
    greedy: list[Tensor] = field(default_factory=list)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        step = len(self.greedy)
        of_row = logits[:, 0].cpu()
        self.greedy.append(of_row.argmax(-1))
        if step in self.recorded_steps:
            self.logits.append(of_row)
        return self.tokens[:, step, None].to(logits.device)


def check_decoding(pack: Pack) -> dict[str, Any]:
    """Check guided logits at the pack's steps, and whether each of its tokens is our greedy choice."""
    model, tensors, about = pack.load_model(), pack.tensors, pack.about
    layout, n = model.config.layout, model.config.frame_len
    frames_first = [*layout.given_frames, *layout.generation_order] if pack.stage == 2 else range(layout.num_frames)

    text_len = about["text_len"]
    sequence = tensors["tokens"][:, text_len + 1 :]  # after text and the first BOI
    num_frames = sequence.shape[1] // n
    slots = layout.slots_of(*list(frames_first)[:num_frames])
    known = int((tensors["seq"][0, text_len + 1 :] >= 0).sum())

    clip = torch.zeros(len(sequence), layout.num_slots, dtype=torch.int64)
    clip[:, torch.from_numpy(slots)] = sequence
    guides = []
    if "guider_seq" in tensors:
        guides = tensors["guider_seq"][:, : about["guider_text_len"]].expand(len(sequence), -1).tolist()
    conditioning = Conditioning.from_tokens(
        tensors["tokens"][:, :text_len].tolist(),
        guides,
        model.config.vocabulary.pad,
        guidance_scale=float(about["guidance_alpha"]) if guides else None,
        text_bonus=float(about.get("log_text_attention_weights", 0)),
    )
    program = build_program(
        model.config,
        Schedule(slots[:known], tuple(slots[known:, None])),
        temporal=num_frames > 1,  # a first frame alone comes from the trunk
        given_windows="wrapped" if pack.stage == 2 else "cut",  # packs come from the published prefill
        joined=model.is_joined,
    ).to(pack.device)
    sampler = FollowPack(sequence[:, known:], set(tensors["kept_steps"].tolist()))
    uniforms = torch.zeros(*clip.shape, 2, dtype=torch.float64)
    Engine(model).generate(program, clip, conditioning, sampler, uniforms)
    other = torch.stack(sampler.greedy) != sequence[:, known:].T
    return {
        "max_logit_error": largest(torch.stack(sampler.logits) - tensors["guided_logits"]),
        "loss_error": None,
        "max_gradient_norm_error": None,
        "tokens_equal": not bool(other.any()),
        "tokens_other_than_ties": int((other & (tensors["margin"] > 2 * LIMIT)).sum()) if "margin" in tensors else 0,
    }


def largest(difference: Tensor) -> float:
    """Largest absolute value; infinity if any is NaN."""
    return float(difference.abs().nan_to_num(nan=float("inf")).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--dtype", choices=["float64", "float32"], default="float64")
    parser.add_argument("--only", metavar="NAME", help="check this pack only")
    add_device_argument(parser)
    args = parser.parse_args()
    device = device_argument(parser, args)
    if not args.directory.is_dir():
        print(f"check_packs: no folder at {args.directory}", file=sys.stderr)
        return 2
    found, good = 0, True
    for path in sorted(args.directory.glob("*.json")):
        file = path.with_suffix(".safetensors")
        if not file.is_file() or (args.only and path.stem != args.only):
            continue
        pack = Pack(path, getattr(torch, args.dtype), device)
        if {"rows", "grad_norms"} <= {*pack.tensors, *pack.about}:
            check = check_training
        elif {"seq", "guided_logits", "kept_steps"} <= pack.tensors.keys():
            check = check_decoding
        else:
            continue
        start = time.perf_counter()
        line: dict[str, Any] = {"pack": path.stem}
        try:
            line |= check(pack)
            errors = (line["max_logit_error"], line["loss_error"] or 0.0, line["max_gradient_norm_error"] or 0.0)
            within = all(e <= LIMIT for e in errors) and not line.get("tokens_other_than_ties")
        except Exception as error:  # the other packs are still checked
            line["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            within = False
        print(json.dumps({**line, "ok": within, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
        found, good = found + 1, good and within
    if not found:
        print(f"check_packs: {args.directory} holds no training or decoding packs", file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(run_command(main, "check_packs"))
