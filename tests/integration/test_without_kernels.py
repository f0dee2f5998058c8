"""Without `cogvideo.kernels` the model trains and decodes as with it, only slower.

It runs without them in a process of its own, as modules that are imported already cannot be hidden.
"""

import subprocess
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


class Hidden(MetaPathFinder):
    """Makes `cogvideo.kernels` a package that does not exist."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name.partition("cogvideo.kernels")[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@mock.patch("cogvideo.model.plan._TILE_FROM_KEYS", 1)  # so that small clips are tiled where a kernel computes tiles
def run_all() -> dict[str, Tensor]:
    """Losses and gradients, weights after a training step, losses without gradients, tokens of every schedule."""
    from cogvideo.inference.backends import install_kernels
    from cogvideo.inference.engine import Conditioning, Engine, build_program
    from cogvideo.inference.sampler import ClusterSampler
    from cogvideo.inference.schedules import SCHEDULES
    from tests.helpers import decoding as tiny
    from tests.helpers.models import tiny_batch, tiny_config, tiny_model

    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(tiny_config("interpolation", window_size=2)).to(dtype).train()
        install_kernels(model)
        model.freeze_trunk()
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = model.token_losses(tiny_batch(model.config))
        losses.mean().backward()
        results[f"losses {dtype}"] = losses.detach()
        results |= {f"gradient {dtype} {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        optimiser.step()
        with torch.no_grad():
            results[f"losses after a step {dtype}"] = model.eval().token_losses(tiny_batch(model.config))

    model = tiny.model("interpolation", window_size=2)
    layout, rng = model.config.layout, np.random.default_rng(0)
    known = torch.from_numpy(rng.integers(tiny.NUM_CODES, size=(2, layout.num_slots)))
    uniforms = torch.from_numpy(rng.random((2, layout.num_slots, 2)))
    texts, guides = [tiny.encode("left"), tiny.encode("quickly right")], [tiny.encode("any")] * 2
    conditioning = Conditioning.from_tokens(texts, guides, tiny.VOCABULARY.pad, guidance_scale=3.0, text_bonus=0.5)
    sampler = ClusterSampler(np.arange(tiny.NUM_CODES) % 12, 1.0, 8, 0.9)
    engine = Engine(model)
    for name, schedule in SCHEDULES.items():
        steps = schedule(layout, layout.given_frames, layout.generation_order, model.config.window_size)
        program = build_program(model.config, steps)
        results[f"tokens {name}"] = engine.generate(program, known, conditioning, sampler, uniforms)
    results["has kernels"] = torch.tensor(any(name.startswith("cogvideo.kernels") for name in sys.modules))
    return results


def run_all_without(folder: Path) -> dict[str, Tensor]:
    file = folder / "results.pt"
    code = "import sys, torch; from tests.integration import test_without_kernels as test; "
    code += f"sys.meta_path.insert(0, test.Hidden()); torch.save(test.run_all(), {str(file)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return torch.load(file, weights_only=True)


def test_training_and_decoding_without_kernels(tmp_path: Path) -> None:
    with_kernels, without = run_all(), run_all_without(tmp_path)
    assert with_kernels.pop("has kernels").item() and not without.pop("has kernels").item()
    assert with_kernels.keys() == without.keys() and len(with_kernels) > 30
    for name, expected in with_kernels.items():
        if name.startswith("tokens"):
            assert torch.equal(without[name], expected), name
        else:
            close = {"atol": 1e-5, "rtol": 1e-4} if "float32" in name else {"atol": 0.05, "rtol": 0.05}
            torch.testing.assert_close(without[name], expected, **close, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(without["tokens sequential"], without["tokens wavefront"])
    assert torch.equal(without["tokens sequential"], without["tokens speculative"])
