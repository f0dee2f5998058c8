"""scripts/bench_decode.py: runs of a case share what an engine keeps, and weights have their type."""

import pytest
import torch

from tests.helpers.scripts import load_script

bench_decode = load_script("bench_decode")


@pytest.mark.parametrize("max_steps", [None, 3])
def test_a_second_run_finds_what_the_first_one_left(max_steps: int | None) -> None:
    bench = bench_decode.Bench(bench_decode.QUICK, "fp32", "sequential", max_steps=max_steps)
    stage = bench.key_frames
    again, elsewhere = (stage.pipeline.frame_sampler(name, bench.config) for name in ("key_frames", "first_frame"))
    assert again.program is stage.program and elsewhere.program is not stage.program
    assert len(stage.program.steps) == (max_steps or stage.program.tokens_per_clip)
    stage.engine.backend.keeps_batches = True
    for _ in range(2):
        bench.run("stage1")
    (kind,) = stage.engine._kept
    assert kind.program is stage.program


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_random_weights_have_their_type(dtype: str) -> None:
    model = bench_decode.random_model(bench_decode.QUICK, dtype)
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[dtype]
    assert {p.dtype for p in model.parameters()} == {torch.float32, stored}  # biases and norms stay float32 on a CPU
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
