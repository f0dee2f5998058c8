"""The worked examples of CONTRIBUTING.md, executed: each adds what it says, and that does what it says."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cogvideo.data.captions import Caption
from cogvideo.data.readers import READERS, open_captions
from cogvideo.evaluation.statistics import Mean
from cogvideo.inference.backends import BACKENDS
from cogvideo.inference.engine import Conditioning, Engine, build_program
from cogvideo.inference.sampler import ClusterSampler
from cogvideo.inference.schedules import SCHEDULES
from cogvideo.model.attention import ATTENTION
from cogvideo.model.transformer import CogVideoTransformer
from tests.helpers.models import tiny_batch, tiny_config, tiny_model
from tests.helpers.training import prepare_data, settings

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (\w+) -->\n```python\n(.*?)```", TEXT, re.DOTALL))


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """Restore the tables that examples add to."""
    importlib.import_module("cogvideo.kernels.tiled_attention")  # adds itself to ATTENTION, once per process
    saved = [(table, dict(table)) for table in (SCHEDULES, BACKENDS, ATTENTION, READERS)]
    yield
    for table, before in saved:
        table.clear()
        table.update(before)  # type: ignore[arg-type]


def execute(name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {}
    exec(compile(EXAMPLES[name], f"CONTRIBUTING.md: {name}", "exec"), namespace)
    return namespace


def generate(model: CogVideoTransformer, schedule: str, backend: str) -> torch.Tensor:
    """Tokens (2, num_slots) of two clips whose first frame is given."""
    config, layout = model.config, model.config.layout
    steps = SCHEDULES[schedule](layout, layout.given_frames, layout.generation_order, config.window_size)
    batch = tiny_batch(config)
    conditioning = Conditioning(batch.text, batch.text_mask)
    sampler = ClusterSampler(np.arange(config.vocabulary.num_image_tokens), 1.0, 8, 1.0)
    uniforms = torch.rand(2, layout.num_slots, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    known = batch.frames.flatten(1)
    return Engine(model, backend).generate(build_program(config, steps), known, conditioning, sampler, uniforms)


def test_every_example_is_tested_here() -> None:
    assert set(EXAMPLES) == {"schedule", "backend", "attention", "reader", "metric", "task"}
    assert TEXT.count("```python") == len(EXAMPLES)


def test_schedule_draws_the_tokens_of_sequential() -> None:
    execute("schedule")
    model = tiny_model(tiny_config())
    assert torch.equal(generate(model, "draft_from_above", "eager"), generate(model, "sequential", "eager"))


def test_backend_decodes() -> None:
    execute("backend")
    model = tiny_model(tiny_config())
    tokens, expected = (generate(model, "sequential", backend) for backend in ("autocast", "eager"))
    given = model.config.frame_len
    assert torch.equal(tokens[:, :given], expected[:, :given])
    assert (tokens == expected)[:, given:].double().mean() > 0.3  # rounding changes some, and what follows them


def test_attention_gives_the_same_losses() -> None:
    execute("attention")
    model = tiny_model(tiny_config("interpolation", window_size=2))
    batch = tiny_batch(model.config)
    expected = model.token_losses(batch)
    model.use_attention("float64")
    torch.testing.assert_close(model.token_losses(batch), expected, rtol=1e-4, atol=1e-4)


def test_reader_reads_and_refuses(tmp_path: Path) -> None:
    execute("reader")
    file = tmp_path / "captions.list"
    file.write_text("a.mp4|a dog runs\nb.mp4|red, then blue\n")
    assert list(open_captions(file)) == [Caption("a.mp4", "a dog runs"), Caption("b.mp4", "red, then blue")]
    file.write_text("a.mp4\n")
    with pytest.raises(ValueError, match=r"line 1: 1 fields; expected video\|caption"):
        open_captions(file)


def test_metric_and_probe() -> None:
    example = execute("metric")
    losses = torch.zeros(3, 2, 4)
    losses[:, :, :2] = 1.5
    assert example["first_row_loss"](losses, 2) == (4.5, 3.0)
    frames = np.zeros((2, 3, 4, 4, 3), np.uint8)
    frames[0, 1:] = 200
    change = example["pixel_change"](frames)
    assert isinstance(change, Mean) and (change.value, change.total) == (50.0, 2)


def test_task_trains_with_its_own_loss(tmp_path: Path) -> None:
    config = settings(prepare_data(tmp_path), tmp_path / "run")
    task = execute("task")["LateFramesTask"](config, torch.device("cpu"))
    batch = task.micro_batch(next(task.batches(0)), 0, 2)
    task.objective.eval()
    loss, metrics = task.objective(batch)
    loss.backward()
    by_frame = task.model.token_losses(batch).mean((0, 2))
    torch.testing.assert_close(loss, by_frame @ torch.tensor([0.1, 0.2, 0.3, 0.4]))
    assert metrics["loss"] == (pytest.approx(float(loss.detach()) * 4), 4.0)
