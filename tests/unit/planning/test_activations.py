"""The planner's activations are what autograd saves: the whole model's count on meta tensors, and real ones."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cogvideo.checkpoint.load import on_meta
from cogvideo.config import load_config
from cogvideo.model.config import ModelConfig
from cogvideo.model.inputs import TextBias
from cogvideo.model.loss import token_nll
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.planning.activations import (
    FusedAttention,
    Setting,
    TransformerConfig,
    count_activations,
    supervised_rows,
)
from cogvideo.planning.budgets import RECOMPUTE
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.training.config import TrainConfig
from tests.helpers.models import tiny_batch, tiny_config, tiny_model

CONFIGS = Path(__file__).parents[3] / "configs" / "model"
MODELS = {
    "stage1": ("cogvideo_stage1", True),
    "stage1_whole": ("cogvideo_stage1", False),
    "stage2": ("cogvideo_stage2", True),
    "trunk": ("cogview2", False),
    "direct": ("cogview2_dsr", True),
    "iterative": ("cogview2_itersr", False),
}
LAYERS = 7


class Saved:
    """A hook that adds up what autograd saves, each storage once, `model`'s own weights left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.own = {p.untyped_storage()._cdata for p in model.parameters()}
        self.storages: dict[int, Any] = {}

    def __enter__(self) -> "Saved":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in self.own:
            self.storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


def published(name: str) -> TransformerConfig:
    config = load_config(TrainConfig, [CONFIGS / f"{name}.yaml"])
    chosen: TransformerConfig = config.superres if "sr" in name else config.model
    return dataclasses.replace(chosen, num_layers=LAYERS)


def meta(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layer"])
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_is_what_a_hook_counts_over_a_whole_forward_pass(name: str, recompute: Any) -> None:
    """At full width, an odd number of layers and a batch of three: the plan extrapolates from two and four layers."""
    file, frozen = MODELS[name]
    config, batch = published(file), 3
    rows = supervised_rows(config) * batch
    model: Any
    if isinstance(config, ModelConfig):
        model = on_meta(lambda: CogVideoTransformer(config)).bfloat16()
        model.use_attention("counted")
        text, slots = meta(batch, config.text_len), meta(batch, config.layout.num_slots)
        bias = TextBias.from_mask(meta(batch, config.text_len, dtype=torch.bool))
        inputs: Any = ((slots, model.plan_clip(slots.device, supervised_only=True), bias), {"text": text})
    else:
        model = on_meta(lambda: SuperresTransformer(config)).bfloat16()
        text, mask = meta(batch, config.text_len), meta(batch, config.text_len, dtype=torch.bool)
        inputs = ((text, mask, meta(batch, config.low_res_len), meta(batch, config.high_res_len)), {})
    model.recompute = recompute
    if frozen:
        model.freeze_trunk()
    with FusedAttention(), Saved(model) as saved:
        hidden = model(*inputs[0], **inputs[1]).flatten(0, 1)
        if len(hidden) > rows:
            hidden = hidden.index_select(0, meta(rows))
        weight = model.word_embeddings.output_weight(hidden, config.vocabulary.num_image_tokens)
        token_nll(hidden, weight, meta(len(hidden)))
    planned = count_activations(config, batch, Setting(recompute, frozen))
    assert planned.kept == pytest.approx(saved.total, rel=0.05)


@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layer"])
@pytest.mark.parametrize(("task", "frozen"), [("sequential", True), ("interpolation", False)])
@pytest.mark.parametrize(
    ("arithmetic", "attention"), [("fp32", "cpu"), ("autocast", "cpu"), ("autocast", "dense"), ("autocast", "sdpa")]
)
def test_the_plan_is_what_a_real_forward_pass_saves(
    arithmetic: Any, attention: Any, task: Any, frozen: bool, recompute: Any
) -> None:
    """On a CPU, a batch of four in float32 or under autocast, where the hook counts copies of the weights as well."""
    if attention == "cpu":
        pytest.importorskip("cogvideo.kernels.tiled_attention")
    sizes = {"window_size": 2} if task == "interpolation" else {}
    config = tiny_config(task, num_layers=5, hidden_size=128, num_heads=4, **sizes)
    model = tiny_model(config).train()
    model.recompute = recompute
    model.use_attention(attention)
    model.freeze_trunk(frozen)
    batch = tiny_batch(config, 4)
    with Saved(model) as saved, torch.autocast("cpu", torch.bfloat16, enabled=arithmetic == "autocast"):
        model.token_losses(batch)
    setting = Setting(recompute, frozen, arithmetic, attention, is_gpu=False)
    assert count_activations(config, 4, setting).kept == pytest.approx(saved.total, rel=0.05)


def test_autocast_over_an_int8_trunk_keeps_no_copies_of_its_weights() -> None:
    config = tiny_config("sequential", num_layers=5, hidden_size=128, num_heads=4)
    model = tiny_model(config).train()
    model.freeze_trunk()
    model.quantize_trunk()
    batch = tiny_batch(config, 4)
    with Saved(model) as saved, torch.autocast("cpu", torch.bfloat16):
        model.token_losses(batch)
    own = {p.untyped_storage()._cdata: p.nbytes for p in model.buffers()}
    total = sum(storage.nbytes() for address, storage in saved.storages.items() if address not in own)
    full, int8 = (
        count_activations(config, 4, Setting("nothing", True, "autocast", "sdpa", quantized_trunk=int8, is_gpu=False))
        for int8 in (False, True)
    )
    assert int8.kept == pytest.approx(total, rel=0.05) and full.kept > 1.1 * int8.kept


def test_on_a_gpu_autocast_also_keeps_what_its_float32_norms_read() -> None:
    config = published("cogvideo_stage1")
    gpu, cpu = (Setting("nothing", True, "autocast", "sdpa", is_gpu=is_gpu) for is_gpu in (True, False))
    rows = config.text_len + config.layout.num_slots  # type: ignore[union-attr]
    two_norms = 2 * 4 * rows * config.hidden_size  # after attention and after the MLP, in place of bfloat16
    more = (count_activations(config, 1, gpu).kept - count_activations(config, 1, cpu).kept) / LAYERS
    assert 0.3 * two_norms < more < two_norms


def test_float32_weights_under_autocast_take_less_than_float32_products() -> None:
    config = published("cogvideo_stage1")
    bf16, autocast, fp32 = (
        count_activations(config, 4, Setting("nothing", True, arithmetic)).kept
        for arithmetic in ("bf16", "autocast", "fp32")
    )
    assert bf16 < autocast < 0.8 * fp32


def test_recomputing_is_a_trade_of_kept_for_working_memory() -> None:
    kept, mlp, layer = (count_activations(published("cogvideo_stage1"), 2, Setting(what, True)) for what in RECOMPUTE)
    assert kept.kept > mlp.kept > 5 * layer.kept
    assert kept.recomputed == 0 < mlp.recomputed < layer.recomputed
