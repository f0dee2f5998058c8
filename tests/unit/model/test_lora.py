"""Adapters in a model: their targets, and that computed beside a matrix they are what is added to it."""

import copy
from typing import Any

import pytest
import torch

from cogvideo.dtypes import WeightName
from cogvideo.kernels import cpu, decode_cpu
from cogvideo.model.config import LoraConfig
from cogvideo.model.decode import DecodeLayer, decode_layers
from cogvideo.model.lora import (
    adapted_layer,
    adapter_parameters,
    add_adapters,
    draw_adapter,
    has_adapters,
    matrices,
    set_weight,
    target_names,
    update,
)
from cogvideo.model.quantize import Embedding, convert_weights
from cogvideo.superres.transformer import SuperresTransformer
from tests.helpers.adapters import randomise
from tests.helpers.models import VARIANTS, tiny_batch, tiny_config, tiny_model
from tests.helpers.superres import TINY_CONFIGS, tiny_superres, tiny_superres_batch

ALL = LoraConfig(rank=2, alpha=4.0, targets=("spatial", "temporal", "mlp", "embeddings"))


def merged(model: Any) -> Any:
    """A copy of a model with its adapters added to the matrices."""
    model = copy.deepcopy(model)
    for layer in matrices(model).values():
        if layer.lora is not None:
            is_table = isinstance(layer, Embedding)
            change = update(layer.lora.A, layer.lora.B, layer.lora.scale, is_table)
            layer.lora = None
            set_weight(layer, layer.weight.detach().float() + change.detach())
    return model


@pytest.mark.parametrize("task", ["image", "sequential", "interpolation"])
def test_losses_and_gradients_beside_the_weights_are_those_of_merged_weights(task: str) -> None:
    config = tiny_config(**VARIANTS[task])
    model = tiny_model(config)
    lora = ALL if task != "image" else LoraConfig(rank=2, targets=("spatial", "mlp", "embeddings"))
    before = model.token_losses(tiny_batch(config))
    add_adapters(model, lora)
    randomise(model)
    losses, expected = (m.token_losses(tiny_batch(config)) for m in (model, merged(model)))
    assert torch.allclose(losses, expected, atol=1e-4)
    assert not torch.allclose(losses, before, atol=1e-2)
    losses.mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == dict(adapter_parameters(model)).keys()


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_superres_adapters_beside_the_weights_are_those_of_merged_weights(method: str) -> None:
    config = TINY_CONFIGS[method]
    model: SuperresTransformer = tiny_superres(config)
    add_adapters(model, LoraConfig(rank=3))
    randomise(model)
    losses, expected = (m.frame_losses(tiny_superres_batch(config)) for m in (model, merged(model)))
    assert torch.allclose(losses, expected, atol=1e-4)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4"])
def test_products_of_few_bits_with_adapters_beside_them(weights: WeightName) -> None:
    """The update is exact, whatever the matrix is rounded to."""
    config = tiny_config()
    model = tiny_model(config)
    add_adapters(model, ALL)
    randomise(model)
    convert_weights(model, weights)
    ids = torch.arange(5)
    for layer in matrices(model).values():
        is_table, lora = isinstance(layer, Embedding), layer.lora
        assert lora is not None
        change = update(lora.A, lora.B, lora.scale, is_table).detach()
        x = torch.randn(3, change.shape[1])
        with torch.no_grad():
            found = layer(ids if is_table else x)
            logits = layer.logits(x, 20) if isinstance(layer, Embedding) else None
            layer.lora = None
            expected = layer(ids) + change[ids] if is_table else layer(x) + x @ change.T
            assert torch.allclose(found, expected, atol=1e-4)
            if isinstance(layer, Embedding):
                assert torch.allclose(logits, layer.logits(x, 20) + x @ change[:20].T, atol=1e-4)


def test_a_step_moves_word_embeddings_as_far_as_other_matrices() -> None:
    """A step of Adam changes every number of the factor that begins with zeros by the learning rate."""
    model, rate = tiny_model(tiny_config()), 1e-3
    add_adapters(model, ALL)
    generator, moved = torch.Generator().manual_seed(0), {}
    for name, layer in matrices(model).items():
        assert layer.lora is not None
        first = [draw_adapter(f"{name}.lora.{part}", p.shape, generator) for part, p in layer.lora.named_parameters()]
        assert sum(bool(factor.any()) for factor in first) == 1, "the update begins with zeros"
        step = rate * torch.randn(max(p.numel() for p in first), generator=generator).sign()
        a, b = (factor if factor.any() else step[: factor.numel()].view(factor.shape) for factor in first)
        moved[name] = float(update(a, b, layer.lora.scale, isinstance(layer, Embedding)).square().mean().sqrt())
    others = [change for name, change in moved.items() if name != "word_embeddings"]
    assert min(others) / 2 < moved["word_embeddings"] < 2 * max(others)


def test_what_reads_weights_past_a_layer_leaves_adapted_models_alone() -> None:
    model = tiny_model(tiny_config())
    assert all(isinstance(layer, DecodeLayer) for layer in decode_layers(copy.deepcopy(model)))
    assert not has_adapters(model)
    with torch.inference_mode():  # with gradients, the kernels leave every model alone
        assert decode_cpu.is_supported(model, []) == (cpu.library() is not None)
    add_adapters(model, LoraConfig(rank=1, targets=("layers.2.mlp.*",)))
    assert has_adapters(model)
    assert not any(isinstance(layer, DecodeLayer) for layer in decode_layers(model))
    with torch.inference_mode():
        assert not decode_cpu.is_supported(model, [])


def test_a_frozen_trunk_does_not_freeze_the_adapters_beside_it() -> None:
    model = tiny_model(tiny_config())
    add_adapters(model, ALL)
    model.freeze_trunk()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == dict(adapter_parameters(model)).keys()
    assert any(".attention." in name for name in trained)


def test_targets() -> None:
    names = list(matrices(tiny_model(tiny_config())))
    everything = set(target_names(names, LoraConfig(rank=1)))
    assert everything == set(names) - {"word_embeddings"}

    def count(*targets: str) -> int:
        return len(target_names(names, LoraConfig(rank=1, targets=targets)))

    assert [count(part) for part in ("spatial", "temporal", "mlp", "embeddings")] == [6, 6, 6, 1]
    assert count("layers.1.*", "layers.1.mlp.*") == 6
    assert count("*.attention.dense") == 3
    with pytest.raises(ValueError, match="no matrix 'high_res'"):
        count("high_res")


def test_a_stand_in_leaves_the_original_as_it_is() -> None:
    for layer in matrices(tiny_model(tiny_config())).values():
        before = layer.weight.clone()
        stand_in = adapted_layer(layer)
        set_weight(stand_in, before + 1)
        assert torch.equal(layer.weight, before) and torch.equal(stand_in.weight, before + 1)
