"""What super-resolution learns: losses against a slow dense page of spec, gradients, starting values, full size."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideo.config import load_config
from cogvideo.model.config import ModelConfig
from cogvideo.model.initialise import initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.vocabulary import Vocabulary
from cogvideo.superres.batch import SuperresBatch, text_rows
from cogvideo.superres.config import SuperresConfig
from cogvideo.superres.initialise import inherit_trunk
from cogvideo.superres.rounds import PATTERN, all_rounds
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.training.config import TrainConfig

ROOT = Path(__file__).parents[3]
WORDS = Vocabulary(size=60, num_image_tokens=40, pad=40, newline=41, start_of_image=42)
DIRECT = SuperresConfig(
    num_layers=2,
    hidden_size=16,
    num_heads=2,
    text_len=5,
    low_res_side=4,
    high_res_side=12,
    num_positions=32,
    low_res_position_start=7,
    dropout=0.0,
    attention_dropout=0.0,
    vocabulary=WORDS,
)
CONFIGS = {"direct": DIRECT, "iterative": replace(DIRECT, method="iterative")}


def model_of(config: SuperresConfig) -> SuperresTransformer:
    model = SuperresTransformer(config)
    initialise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():  # everything takes part, biases too
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return model


def batch_of(config: SuperresConfig, frames: int = 4) -> SuperresBatch:
    generator = torch.Generator().manual_seed(1)
    text, mask = text_rows([[50, 51, 52][: 1 + i % 3] for i in range(frames)], config)
    low = torch.randint(40, (frames, config.low_res_len), generator=generator)
    high = torch.randint(40, (frames, config.high_res_len), generator=generator)
    rounds = torch.arange(frames) * 5 % len(all_rounds(config))
    return SuperresBatch(text, mask, low, high, all_rounds(config)[rounds], rounds + 1)


def slow_losses(model: SuperresTransformer, batch: SuperresBatch) -> Tensor:
    """Frame by frame, all rows in one sequence, under a dense mask written from the definition; float64."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    side, low = c.high_res_side, c.low_res_side
    losses = []
    for frame in range(len(batch.text)):
        text, asked = batch.text[frame][batch.text_mask[frame]], batch.asked[frame]
        n, context = len(text), len(text) + c.low_res_len
        ids = [*text.tolist(), *batch.low_res[frame].tolist()]
        ids += [42 if ask else token for ask, token in zip(asked.tolist(), batch.high_res[frame].tolist(), strict=True)]
        places = [*range(n), *range(c.low_res_position_start, c.low_res_position_start + c.low_res_len)]
        positions = torch.cat([w["position_embeddings.weight"][places], w["extra_position_embeddings.weight"]])
        x = w["word_embeddings.weight"][ids] + positions
        sees = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        sees[:context, :n] = True
        sees[n:context, n:context] = True
        for q in range(side * side):
            y, x_ = divmod(q, side)
            for k in range(side * side):
                sees[context + q, context + k] = abs(k // side - y) <= 4 and abs(k % side - x_) <= 2
            if c.method == "iterative":
                sees[context + q, :n] = True
            else:
                for k in range(low * low):
                    near = abs(k // low - y * low // side) <= 2 and abs(k % low - x_ * low // side) <= 2
                    sees[context + q, n + k] = near

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        for i in range(c.num_layers):
            of_grid = "high_res_attention" if c.method == "direct" else "attention"

            def by_rows(x: Tensor, part: str, i: int = i, of_grid: str = of_grid, context: int = context) -> Tensor:
                first = linear(x[:context], f"layers.{i}.attention.{part}")
                return torch.cat([first, linear(x[context:], f"layers.{i}.{of_grid}.{part}")])

            q, k, v = (
                part.unflatten(1, (c.num_heads, -1)).transpose(0, 1)
                for part in by_rows(norm(x, f"layers.{i}.input_layernorm"), "query_key_value").chunk(3, dim=1)
            )
            scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~sees, float("-inf"))
            attended = by_rows((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), "dense")
            x = x + norm(attended, f"layers.{i}.third_layernorm")
            wide = linear(norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp.dense_h_to_4h")
            made = linear(F.gelu(wide, approximate="tanh"), f"layers.{i}.mlp.dense_4h_to_h")
            x = x + norm(made, f"layers.{i}.fourth_layernorm")
        scores = norm(x, "final_layernorm")[context:] @ w["word_embeddings.weight"][:40].T
        losses.append(F.cross_entropy(scores[asked], batch.high_res[frame][asked]))
    return torch.stack(losses)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("frozen", [False, True])
def test_losses_are_those_of_a_slow_page(method: str, frozen: bool) -> None:
    model, batch = model_of(CONFIGS[method]), batch_of(CONFIGS[method])
    model.freeze_trunk(frozen)
    torch.testing.assert_close(model.frame_losses(batch).double(), slow_losses(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["mlp", "layer"])
@pytest.mark.parametrize("method", CONFIGS)
def test_gradients_are_the_same_recomputed_and_with_dropout_come_from_the_same_masks(
    method: str, recompute: str
) -> None:
    config = replace(CONFIGS[method], dropout=0.2, attention_dropout=0.2)
    found = []
    for how in ("nothing", recompute):
        model = model_of(config).train()
        model.recompute = how  # type: ignore[assignment]
        torch.manual_seed(3)
        model.frame_losses(batch_of(config)).mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_dropout_is_on_all_rows_of_the_direct_model_and_off_text_rows_of_the_iterative() -> None:
    for method, config in CONFIGS.items():
        model = model_of(replace(config, attention_dropout=0.5)).train()
        seen = []
        model.layers[0].mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        batch = batch_of(config)
        for seed in (0, 1):
            torch.manual_seed(seed)
            model.frame_losses(batch)
        context, grid, context_again, grid_again = seen
        assert not torch.equal(grid, grid_again)
        assert torch.equal(context, context_again) == (method == "iterative")


@pytest.mark.parametrize("method", CONFIGS)
def test_what_learns_gets_a_gradient_and_a_frozen_trunk_stays(method: str) -> None:
    model = model_of(CONFIGS[method])
    model.freeze_trunk(method == "direct")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learned = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimiser.zero_grad()
        model.frame_losses(batch_of(CONFIGS[method])).mean().backward()
        optimiser.step()
    for name, p in model.named_parameters():
        if method == "iterative" or model.is_added(name):
            assert p.grad is not None and p.grad.abs().max() > 0, name
            assert not torch.equal(p, before[name]), name
        else:
            assert p.grad is None and torch.equal(p, before[name]), name


@pytest.mark.parametrize("method", CONFIGS)
def test_starting_from_a_trunk(method: str) -> None:
    image = ModelConfig(
        task="image", num_layers=2, hidden_size=16, num_heads=2, text_len=5, frame_side=4, num_frames=1,
        num_positions=32, frame_position_start=6, vocabulary=WORDS,
    )  # fmt: skip
    trunk = CogVideoTransformer(image)
    initialise(trunk, torch.Generator().manual_seed(5))
    tensors = dict(trunk.named_parameters())
    model = SuperresTransformer(CONFIGS[method])
    inherit_trunk(model, tensors)
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        assert torch.equal(own[name], tensor)
    for y in range(12):
        for x in range(12):
            expected = tensors["position_embeddings.weight"][6 + y % 4 * 4 + x % 4]
            assert torch.equal(own["extra_position_embeddings.weight"][12 * y + x], expected)
    if method == "direct":
        for part in ("query_key_value.weight", "query_key_value.bias", "dense.weight", "dense.bias"):
            assert torch.equal(own[f"layers.1.high_res_attention.{part}"], tensors[f"layers.1.attention.{part}"])
    kept = own["final_layernorm.weight"].detach().clone()
    with pytest.raises(ValueError, match=r"layers.1.mlp.* no such tensor"):
        inherit_trunk(model, {name: t + 1 for name, t in tensors.items() if "layers.1.mlp" not in name})
    assert torch.equal(own["final_layernorm.weight"], kept)


def test_rounds_as_masks() -> None:
    assert all_rounds(DIRECT).all() and len(all_rounds(DIRECT)) == 1
    rounds = all_rounds(CONFIGS["iterative"])
    assert rounds.shape == (6, 144)
    for number, places in enumerate(rounds, 1):
        assert places.view(12, 12)[6:, :6].tolist() == (number <= PATTERN).tolist()


def test_full_size_without_memory() -> None:
    """Parameters as published, and a plan that a config file of the trainer's makes."""
    for name, total, learned in (("dsr", 7_725_895_680, 1_823_588_352), ("itersr", 5_913_366_528, 5_913_366_528)):
        file = ROOT / f"configs/model/cogview2_{name}.yaml"
        config = load_config(TrainConfig, [file], ["task=superres"]).superres
        with torch.device("meta"):
            model = SuperresTransformer(config)
        model.freeze_trunk(config.method == "direct")
        assert sum(p.numel() for p in model.parameters()) == total
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == learned


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_tiny_configs(method: str) -> None:
    config = load_config(TrainConfig, [ROOT / f"configs/train/tiny_superres_{method}.yaml"])
    assert (config.task, config.superres.method) == ("superres", method)
    assert config.init.freeze_trunk == (method == "direct")
    base = config.model
    assert config.superres.low_res_position_start == base.frame_position_start + 1
    for name in ("num_layers", "hidden_size", "num_heads", "num_positions"):
        assert getattr(config.superres, name) == getattr(base, name)


def test_every_round_asks_for_something() -> None:
    """A round without places would divide by none."""
    with pytest.raises(ValueError, match=r"high_res_side=5 leaves some rounds .* nothing to redraw; give at least 6"):
        SuperresConfig(method="iterative", high_res_side=5)
    assert all_rounds(SuperresConfig(method="iterative", high_res_side=6)).any(1).all()
