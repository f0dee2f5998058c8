"""Super-resolution transformers: losses against a slow dense reference, gradients, dropout, full-size counts."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from cogvideo.config import load_config
from cogvideo.superres import transformer as module
from cogvideo.superres.batch import SuperresBatch
from cogvideo.superres.transformer import SuperresTransformer
from cogvideo.training.config import TrainConfig
from tests.helpers.superres import TINY_CONFIGS, tiny_superres, tiny_superres_batch

ROOT = Path(__file__).parents[3]


def slow_losses(model: SuperresTransformer, batch: SuperresBatch) -> Tensor:
    """Frame by frame in float64: all rows in one sequence, under a dense mask written from the definition."""
    c, w = model.config, {name: p.detach().double() for name, p in model.named_parameters()}
    side, low = c.high_res_side, c.low_res_side
    losses = []
    for frame in range(len(batch.text)):
        text, is_target = batch.text[frame][batch.text_mask[frame]], batch.target_mask[frame]
        n, context = len(text), len(text) + c.low_res_len
        ids = [*text.tolist(), *batch.low_res[frame].tolist()]
        high_res = batch.high_res[frame].tolist()
        ids += [42 if hidden else token for hidden, token in zip(is_target.tolist(), high_res, strict=True)]
        places = [*range(n), *range(c.low_res_position_start, c.low_res_position_start + c.low_res_len)]
        positions = torch.cat([w["position_embeddings.weight"][places], w["extra_position_embeddings.weight"]])
        x = w["word_embeddings.weight"][ids] + positions
        allowed = torch.zeros(len(ids), len(ids), dtype=torch.bool)
        allowed[:context, :n] = True
        allowed[n:context, n:context] = True
        for q in range(side * side):
            y, x_ = divmod(q, side)
            for k in range(side * side):
                allowed[context + q, context + k] = abs(k // side - y) <= 4 and abs(k % side - x_) <= 2
            if c.method == "iterative":
                allowed[context + q, :n] = True
            else:
                for k in range(low * low):
                    is_near = abs(k // low - y * low // side) <= 2 and abs(k % low - x_ * low // side) <= 2
                    allowed[context + q, n + k] = is_near

        def norm(x: Tensor, name: str) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

        for i in range(c.num_layers):
            grid_attention = "high_res_attention" if c.method == "direct" else "attention"

            def by_rows(
                x: Tensor, projection: str, i: int = i, grid_attention: str = grid_attention, context: int = context
            ) -> Tensor:
                of_context = linear(x[:context], f"layers.{i}.attention.{projection}")
                return torch.cat([of_context, linear(x[context:], f"layers.{i}.{grid_attention}.{projection}")])

            q, k, v = (
                part.unflatten(1, (c.num_heads, -1)).transpose(0, 1)
                for part in by_rows(norm(x, f"layers.{i}.input_layernorm"), "query_key_value").chunk(3, dim=1)
            )
            scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, float("-inf"))
            attended = by_rows((scores.softmax(-1) @ v).transpose(0, 1).flatten(1), "dense")
            x = x + norm(attended, f"layers.{i}.third_layernorm")
            inner = linear(norm(x, f"layers.{i}.post_attention_layernorm"), f"layers.{i}.mlp.dense_h_to_4h")
            outer = linear(F.gelu(inner, approximate="tanh"), f"layers.{i}.mlp.dense_4h_to_h")
            x = x + norm(outer, f"layers.{i}.fourth_layernorm")
        scores = norm(x, "final_layernorm")[context:] @ w["word_embeddings.weight"][:40].T
        losses.append(F.cross_entropy(scores[is_target], batch.high_res[frame][is_target]))
    return torch.stack(losses)


@pytest.mark.parametrize("method", TINY_CONFIGS)
@pytest.mark.parametrize("frozen", [False, True])
def test_losses_match_the_slow_reference(method: str, frozen: bool) -> None:
    model, batch = tiny_superres(TINY_CONFIGS[method]), tiny_superres_batch(TINY_CONFIGS[method])
    model.freeze_trunk(frozen)
    torch.testing.assert_close(model.frame_losses(batch).double(), slow_losses(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["mlp", "layer"])
@pytest.mark.parametrize("method", TINY_CONFIGS)
def test_recomputing_activations_changes_no_gradient(method: str, recompute: str) -> None:
    config = replace(TINY_CONFIGS[method], dropout=0.2, attention_dropout=0.2)
    gradients = []
    for recompute_option in ("nothing", recompute):
        model = tiny_superres(config).train()
        model.recompute = recompute_option  # type: ignore[assignment]
        torch.manual_seed(3)
        model.frame_losses(tiny_superres_batch(config)).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["nothing", "mlp", "layer"])
@pytest.mark.parametrize("method", TINY_CONFIGS)
def test_compiled_layers_change_no_gradient(method: str, recompute: str) -> None:
    """One graph for all layers but the last, which leaves the context as it is; scoring runs as before."""
    torch._dynamo.reset()
    config, counter = TINY_CONFIGS[method], CompileCounterWithBackend("eager")
    model = tiny_superres(replace(config, num_layers=4)).train()
    model.freeze_trunk(method == "direct")
    model.recompute = recompute  # type: ignore[assignment]
    gradients = []
    for compiled in (False, True):
        if compiled:
            model.compile_layers(counter)
        model.zero_grad()
        model.frame_losses(tiny_superres_batch(config)).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    assert counter.frame_count == 2
    model.eval().frame_losses(tiny_superres_batch(config))
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_attention_dropout_leaves_out_context_rows_of_the_iterative_model_only() -> None:
    for method, config in TINY_CONFIGS.items():
        model = tiny_superres(replace(config, attention_dropout=0.5)).train()
        seen = []
        model.layers[0].mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        batch = tiny_superres_batch(config)
        for seed in (0, 1):
            torch.manual_seed(seed)
            model.frame_losses(batch)
        context, grid, context_again, grid_again = seen
        assert not torch.equal(grid, grid_again)
        assert torch.equal(context, context_again) == (method == "iterative")


@pytest.mark.parametrize("method", TINY_CONFIGS)
def test_trainable_parameters_get_gradients_and_a_frozen_trunk_stays(method: str) -> None:
    model = tiny_superres(TINY_CONFIGS[method])
    model.freeze_trunk(method == "direct")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimiser.zero_grad()
        model.frame_losses(tiny_superres_batch(TINY_CONFIGS[method])).mean().backward()
        optimiser.step()
    for name, p in model.named_parameters():
        if method == "iterative" or model.is_extra(name):
            assert p.grad is not None and p.grad.abs().max() > 0, name
            assert not torch.equal(p, before[name]), name
        else:
            assert p.grad is None and torch.equal(p, before[name]), name


def test_published_parameter_counts() -> None:
    """The shipped configs have the published numbers of parameters, in all and trainable."""
    for name, total, trainable in (("dsr", 7_725_895_680, 1_823_588_352), ("itersr", 5_913_366_528, 5_913_366_528)):
        path = ROOT / f"configs/model/cogview2_{name}.yaml"
        config = load_config(TrainConfig, [path], ["task=superres"]).superres
        with torch.device("meta"):
            model = SuperresTransformer(config)
        model.freeze_trunk(config.method == "direct")
        assert sum(p.numel() for p in model.parameters()) == total
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("method", ["direct", "iterative"])
def test_a_cpu_draws_with_few_rows_at_once_and_trains_with_all(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hidden states are the same."""
    config = TINY_CONFIGS[method]
    model, batch = tiny_superres(config).eval(), tiny_superres_batch(config)
    rows: list[int] = []
    finish = module._Layer._finish_rows

    def counted(layer: module._Layer, x: Tensor, attended: Tensor) -> Tensor:
        rows.append(x.shape[0] * x.shape[1])
        return finish(layer, x, attended)

    monkeypatch.setattr(module._Layer, "_finish_rows", counted)
    inputs = batch.text, batch.text_mask, batch.low_res, batch.high_res
    with torch.no_grad():
        whole = model(*inputs)
        assert max(rows) == 4 * 144
        monkeypatch.setattr(module, "ROWS_PER_CHUNK", 202)
        rows.clear()
        torch.testing.assert_close(model(*inputs), whole, atol=1e-6, rtol=1e-6)
    assert max(rows) == 4 * 50
    rows.clear()
    model(*inputs)
    assert max(rows) == 4 * 144
