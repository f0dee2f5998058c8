"""The whole model: against the dense reference, its losses, which parameters learn, and what changes no result."""

import pytest
import torch
from torch import Tensor

from cogvideo.inference.backends import install_kernels
from cogvideo.model import plan as plan_module
from cogvideo.model.config import Recompute
from cogvideo.model.transformer import CogVideoTransformer, is_temporal, mix_channels
from cogvideo.sequence.batch import Batch
from tests.helpers.models import VARIANTS, tiny_batch, tiny_config, tiny_model
from tests.reference import transformer as reference


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> CogVideoTransformer:
    return tiny_model(tiny_config(**VARIANTS[request.param]))


def reference_losses(model: CogVideoTransformer, batch: Batch) -> Tensor:
    logits, _ = reference.forward(dict(model.state_dict()), model.config, batch.text, batch.text_mask, batch.frames)
    layout = model.config.layout
    by_frame = logits.log_softmax(-1).unflatten(1, (layout.num_frames, layout.frame_len))
    losses = -by_frame.gather(-1, batch.frames[..., None])[..., 0]
    return losses[:, list(layout.supervised_frames)]


@pytest.mark.parametrize("smallest_tiled", [1, 1000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_token_losses_equal_the_dense_reference(
    variant: str, smallest_tiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_TILE_FROM_KEYS", smallest_tiled)
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    install_kernels(model)
    batch = tiny_batch(model.config)
    losses = model.double().token_losses(batch)
    assert losses.shape == (2, len(model.config.layout.supervised_frames), model.config.frame_len)
    torch.testing.assert_close(losses.double(), reference_losses(model, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trimmed", [False, True])
def test_padding_never_changes_a_result(model: CogVideoTransformer, trimmed: bool) -> None:
    batch, words = tiny_batch(model.config), model.config.vocabulary
    if trimmed:
        short = Batch(*(x[1:] for x in (batch.text, batch.text_mask, batch.frames, batch.seconds)))
        other = short.trim_text()
        assert other.text.shape[1] < short.text.shape[1]
        expected = model.token_losses(batch)[1:]
    else:
        pads = torch.full((2, 5), words.newline)  # any id: padding is masked
        text, mask = torch.cat([pads, batch.text], 1), torch.cat([pads < 0, batch.text_mask], 1)
        other = Batch(text, mask, batch.frames, batch.seconds)
        expected = model.token_losses(batch)
    torch.testing.assert_close(model.token_losses(other), expected, atol=1e-5, rtol=1e-5)


def test_clips_of_a_batch_are_independent(model: CogVideoTransformer) -> None:
    batch = tiny_batch(model.config, batch=3)
    one = Batch(*(x[1:2] for x in (batch.text, batch.text_mask, batch.frames, batch.seconds)))
    torch.testing.assert_close(model.token_losses(batch)[1:2], model.token_losses(one), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("variant", "frozen"), [("image", False), ("sequential", False), ("sequential", True), ("interpolation", True)]
)
def test_every_trainable_parameter_learns_and_frozen_ones_do_not(variant: str, frozen: bool) -> None:
    model = tiny_model(tiny_config(**VARIANTS[variant]))
    model.train().freeze_trunk(frozen)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.token_losses(tiny_batch(model.config)).mean().backward()
    for name, p in model.named_parameters():
        trainable = is_temporal(name) or not frozen
        assert p.requires_grad == trainable
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == trainable, name
    optimiser.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def test_parameters_are_either_trunk_or_temporal(model: CogVideoTransformer) -> None:
    temporal, trunk = (dict(part) for part in (model.extra_parameters(), model.trunk_parameters()))
    assert {*temporal, *trunk} == {name for name, _ in model.named_parameters()}
    image = tiny_config("image", frame_side=model.config.frame_side, num_positions=model.config.num_positions)
    assert {n: p.shape for n, p in trunk.items()} == {
        n: p.shape for n, p in CogVideoTransformer(image).named_parameters()
    }


def gradients(model: CogVideoTransformer, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    model.token_losses(batch).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("smallest_tiled", [1, 1000])
def test_gradients_equal_the_dense_references(
    variant: str, smallest_tiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_TILE_FROM_KEYS", smallest_tiled)
    model = tiny_model(tiny_config(**VARIANTS[variant])).double()
    install_kernels(model)
    batch = tiny_batch(model.config)
    mine = gradients(model, batch)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits, _ = reference.forward(leaves, model.config, batch.text, batch.text_mask, batch.frames)
    supervised = model.config.layout.slots_of(*model.config.layout.supervised_frames)
    labels = batch.frames.flatten(1)[:, supervised]
    torch.nn.functional.cross_entropy(logits[:, supervised].flatten(0, 1), labels.flatten()).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(mine[name], leaf.grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("what", ["mlp", "layer"])
def test_recomputing_activations_changes_no_gradient(frozen: bool, what: Recompute) -> None:
    model = tiny_model(tiny_config(window_size=2, dropout=0.2, attention_dropout=0.2)).train()
    model.freeze_trunk(frozen)
    batch = tiny_batch(model.config)
    expected = gradients(model, batch)
    model.recompute = what
    recomputed = gradients(model, batch)
    assert expected.keys() == recomputed.keys()
    for name in expected:
        torch.testing.assert_close(recomputed[name], expected[name], atol=1e-6, rtol=1e-5)


def test_freezing_the_trunk_changes_no_gradient_of_other_parameters() -> None:
    model = tiny_model(tiny_config("interpolation", window_size=2))
    batch = tiny_batch(model.config)
    all_learn, losses = gradients(model, batch), model.token_losses(batch)
    model.freeze_trunk()
    torch.testing.assert_close(model.token_losses(batch), losses)
    for name, grad in gradients(model, batch).items():
        torch.testing.assert_close(grad, all_learn[name], atol=1e-6, rtol=1e-5)


def test_dropout_is_on_in_training_only() -> None:
    model = tiny_model(tiny_config(dropout=0.3, attention_dropout=0.3))
    batch = tiny_batch(model.config)
    assert torch.equal(model.token_losses(batch), model.token_losses(batch))
    model.train()
    assert not torch.equal(model.token_losses(batch), model.token_losses(batch))


def test_bfloat16_is_close() -> None:
    model = tiny_model(tiny_config(window_size=2))
    batch = tiny_batch(model.config)
    exact = model.token_losses(batch).mean()
    rough = model.bfloat16().token_losses(batch)
    assert rough.dtype == torch.float32
    assert rough.mean().item() == pytest.approx(exact.item(), rel=0.02)


def test_given_frames_of_stage_two_do_not_depend_on_generated_ones() -> None:
    """So their keys can be cached while the frames between them are sampled."""
    model = tiny_model(tiny_config("interpolation", window_size=2))
    batch = tiny_batch(model.config)
    changed = batch.frames.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 20
    other = Batch(batch.text, batch.text_mask, changed, batch.seconds)
    assert torch.equal(model.token_losses(batch)[:, 0], model.token_losses(other)[:, 0])


def test_mixing_is_a_weighted_mean_by_channel() -> None:
    spatial, temporal = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double()
    logit = torch.tensor([-50.0, 0.0, 1.0, 50.0], dtype=torch.float64)
    alpha = logit.sigmoid()
    torch.testing.assert_close(mix_channels(spatial, temporal, logit), alpha * spatial + (1 - alpha) * temporal)


def test_a_plan_made_for_scoring_serves_training_too() -> None:
    """Plans are kept by the model; tensors made in inference mode could not be saved for a backward pass."""
    model = tiny_model(tiny_config("interpolation", window_size=2))
    batch = tiny_batch(model.config)
    with torch.inference_mode():
        losses = model.token_losses(batch)
    trained = model.token_losses(batch)
    assert torch.equal(losses, trained)
    trained.mean().backward()
