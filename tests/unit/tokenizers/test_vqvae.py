"""Shapes, levels, errors and the training loss of the VQ-VAE; its values are checked in tests/parity/test_vqvae.py."""

from dataclasses import replace

import pytest
import torch

from cogvideo.tokenizers.quantise import (
    TokenizerLossConfig,
    edge_loss,
    initialise_codebook,
    revive_dead_codes,
    tokenizer_loss,
    update_codebook,
)
from cogvideo.tokenizers.vqvae import VQVAE, VQVAEConfig

SMALL = VQVAEConfig(
    channels=8,
    channel_multipliers=(1, 2),
    encoder_num_res_blocks=1,
    z_channels=8,
    embedding_dim=4,
    num_codes=32,
    levels=(0, 2),
    norm_groups=4,
    nominal_resolution=16,
    attention_resolutions=(4,),
)


def build(config: VQVAEConfig = SMALL) -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(config).eval()


def test_a_batch_decodes_as_its_images_do_alone():
    model = build()
    ids = torch.randint(0, 32, (3, 2, 4), generator=torch.Generator().manual_seed(1))
    together = model.decode(ids, 2)
    assert together.shape == (3, 3, 2 * 8, 4 * 8)
    alone = torch.cat([model.decode(one[None], 2) for one in ids])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_only_the_levels_asked_for_exist():
    names = {name.split(".")[0] + "." + name.split(".")[1] for name in build().state_dict()}
    assert {"decs.0", "decs.2", "down_samplers.0", "down_samplers.1"} <= names and "decs.1" not in names
    top = build(replace(SMALL, levels=(0,)))
    assert not [name for name in top.state_dict() if name.startswith(("down_samplers", "decs.0", "decs.1"))]
    with pytest.raises(ValueError, match=r"level 1 is not built; choose one of \[0, 2\]"):
        build().encode(torch.zeros(1, 3, 8, 8), 1)


def test_rates():
    assert [VQVAEConfig().compress_rate(level) for level in range(3)] == [4, 8, 16]
    assert VQVAEConfig().level_of_rate(8) == 1
    with pytest.raises(ValueError, match=r"compress rate 7; choose one of \[4, 8, 16\]"):
        VQVAEConfig().level_of_rate(7)


def test_pixel_norm_keeps_codes_local():
    """A change in one corner reaches no code far from it, as it would through image-wide statistics."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    changed = image.clone()
    changed[:, :, :4, :4] += 3
    far = (slice(None), slice(None), slice(-4, None), slice(-4, None))
    for scope, equal in (("pixel", True), ("image", False)):
        model = build(replace(SMALL, levels=(0,), norm_scope=scope, mid_attention=False))
        before, after = (model.features(x, 0)[far] for x in (image, changed))
        assert torch.allclose(before, after, atol=1e-6) is equal


def test_nearest_code_is_nearest_in_every_chunk():
    quantizer = build().quantize
    vectors = torch.randn(37, 4, generator=torch.Generator().manual_seed(3))
    expected = torch.cdist(vectors, quantizer.embed.weight).argmin(1)
    assert torch.equal(quantizer.nearest(vectors, chunk=5), expected)


def test_every_trainable_parameter_gets_a_gradient():
    model = build(replace(SMALL, levels=(2,))).train()
    model.decode_codes(model.features(torch.rand(2, 3, 16, 16), 2), 2).square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == [] and not model.quantize.embed.weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": (3,)}, r"vqvae.levels=\(3,\); expected some of 0..2"),
        ({"levels": ()}, r"vqvae.levels=\(\)"),
        ({"norm_groups": 0}, "vqvae.norm_groups=0; expected 1 to 65536"),
        ({"num_codes": -1}, "vqvae.num_codes=-1; expected 1"),
        ({"num_levels": 1 << 30, "levels": ((1 << 30) - 1,)}, "vqvae.num_levels=1073741824; expected 1 to 16"),
        ({"encoder_num_res_blocks": 1 << 30}, "vqvae.encoder_num_res_blocks=1073741824; expected 0 to 64"),
        ({"channel_multipliers": ()}, r"vqvae.channel_multipliers=\(\); expected 1 to 16"),
        ({"norm_groups": 3}, "vqvae.norm_groups=3 does not divide a width of 8"),
    ],
)
def test_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 1, 16, 16), (1, 3, 16, 12)])
def test_images_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="sides divisible by 8"):
        build().encode(torch.zeros(shape), 2)


def test_ids_outside_the_codebook():
    with pytest.raises(ValueError, match=r"ids span 0\.\.32, expected 0\.\.31"):
        build().decode(torch.tensor([[[0, 32]]]), 0)


TINY = VQVAEConfig(
    channels=8, channel_multipliers=(1, 2), encoder_num_res_blocks=1, z_channels=8, embedding_dim=8, num_codes=32,
    levels=(0,), norm_groups=4, mid_attention=False, attention_resolutions=(),
)  # fmt: skip


def test_edge_loss_by_hand():
    error = torch.zeros(1, 1, 4, 4)
    error[..., 2:] = 1.0  # one vertical edge: 4 of 12 horizontal differences are 1; halved, 2 of 2
    assert edge_loss(error, torch.zeros_like(error), scales=1) == pytest.approx(4 / 12)
    assert edge_loss(error, torch.zeros_like(error), scales=2) == pytest.approx((4 / 12 + 1) / 2)
    assert edge_loss(error + 5, error, scales=2) == 0


def test_loss_is_the_weighted_sum_of_its_metrics():
    torch.manual_seed(0)
    config = TokenizerLossConfig(l1=0.5, l2=2.0, edge=3.0, commitment=0.25)
    step = tokenizer_loss(VQVAE(TINY), torch.randn(2, 3, 8, 8), 0, config)
    m = {name: value.item() for name, value in step.metrics.items()}
    expected = 0.5 * m["l1"] + 2 * m["l2"] + 3 * m["edge"] + 0.25 * m["commitment"]
    assert m["loss"] == pytest.approx(expected, rel=1e-5) and step.loss.item() == pytest.approx(expected, rel=1e-5)
    assert step.features.shape == (32, 8) and step.ids.shape == (32,) and not step.features.requires_grad
    assert 0 < m["codebook_used"] <= 1 <= m["perplexity"]


@pytest.mark.parametrize(("relative", "factor"), [(True, 1), (False, 100)])
def test_relative_commitment_does_not_depend_on_the_scale_of_features(relative, factor):
    torch.manual_seed(0)
    model, images = VQVAE(TINY), torch.randn(2, 3, 8, 8)
    config = TokenizerLossConfig(relative_commitment=relative)
    before = tokenizer_loss(model, images, 0, config).metrics["commitment"]
    with torch.no_grad():
        for parameter in (*model.quantize.proj.parameters(), model.quantize.embed.weight):
            parameter.mul_(10)
    after = tokenizer_loss(model, images, 0, config).metrics["commitment"]
    assert before > 0 and after.item() == pytest.approx(factor * before.item(), rel=1e-3)


def test_training_lowers_the_loss_and_keeps_codes_in_use():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, config = VQVAE(TINY), TokenizerLossConfig()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    images = torch.rand(8, 3, 8, 8, generator=generator).round() * 2 - 1
    losses, rows = [], []
    for index in range(50):
        step = tokenizer_loss(model, images, 0, config, use_codes=index >= 15)
        optimiser.zero_grad()
        step.loss.backward()
        optimiser.step()
        losses.append(step.metrics["l1"].item())
        if step.ids is None:
            rows.append(step.features)
            if index == 14:
                initialise_codebook(model.quantize, torch.cat(rows[-5:]), generator)
        else:
            update_codebook(model.quantize, step.features, step.ids)
            revive_dead_codes(model.quantize, step.features, generator)
    assert losses[-1] < 0.8 * losses[0]
    assert step.metrics["codebook_used"] > 0.5
