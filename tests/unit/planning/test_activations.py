"""The planner's activations are what autograd saves: the whole model's count on meta tensors, and a real one."""

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
from cogvideo.planning.activations import FusedAttention, TransformerConfig, count_activations, supervised_rows
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
    planned = count_activations(config, batch, recompute, frozen_trunk=frozen)
    assert planned.kept == pytest.approx(saved.total, rel=0.05)


@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layer"])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_plan_is_what_a_real_forward_pass_saves(frozen: bool, recompute: Any) -> None:
    """In float32 on a CPU; its dense attention keeps a bias as well, which FlexAttention does not."""
    config = tiny_config("sequential", num_layers=5, hidden_size=128, num_heads=4)
    model = tiny_model(config).train()
    model.recompute = recompute
    model.use_attention("dense")
    model.freeze_trunk(frozen)
    batch = tiny_batch(config, 4)
    with Saved(model) as saved:
        model.token_losses(batch)
    rows = config.text_len + config.layout.num_slots
    biases = sum(storage.nbytes() for storage in saved.storages.values() if storage.nbytes() == 4 * 4 * rows * rows)
    planned = count_activations(config, 4, recompute, frozen_trunk=frozen, dtype=torch.float32)
    assert planned.kept == pytest.approx(saved.total - biases, rel=0.1)


def test_recomputing_is_a_trade_of_kept_for_working_memory() -> None:
    kept, mlp, layer = (
        count_activations(published("cogvideo_stage1"), 2, what, frozen_trunk=True)
        for what in ("nothing", "mlp", "layer")
    )
    assert kept.kept > mlp.kept > 5 * layer.kept
    assert kept.recomputed == 0 < mlp.recomputed < layer.recomputed
