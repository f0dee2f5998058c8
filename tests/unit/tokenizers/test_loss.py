"""The image tokenizer's training loss, and that a few steps of the whole recipe lower it."""

import pytest
import torch

from cogvideo.tokenizers.loss import TokenizerLossConfig, edge_loss, tokenizer_step
from cogvideo.tokenizers.quantise import revive_dead_codes, start_codebook, update_codebook
from cogvideo.tokenizers.vqvae import VQVAE, VQVAEConfig

TINY = VQVAEConfig(
    channels=8, channel_multipliers=(1, 2), encoder_num_res_blocks=1, z_channels=8, embedding_dim=8, num_codes=32,
    levels=(0,), norm_groups=4, mid_attention=False, attention_resolutions=(),
)  # fmt: skip


def test_edges_by_hand():
    error = torch.zeros(1, 1, 4, 4)
    error[..., 2:] = 1.0  # one vertical edge: 4 of 12 horizontal differences are 1; halved, 2 of 2
    assert edge_loss(error, torch.zeros_like(error), scales=1) == pytest.approx(4 / 12)
    assert edge_loss(error, torch.zeros_like(error), scales=2) == pytest.approx((4 / 12 + 1) / 2)
    assert edge_loss(error + 5, error, scales=2) == 0


def test_loss_is_the_weighted_sum_of_its_metrics():
    torch.manual_seed(0)
    config = TokenizerLossConfig(l1=0.5, l2=2.0, edge=3.0, commitment=0.25)
    step = tokenizer_step(VQVAE(TINY), torch.randn(2, 3, 8, 8), 0, config)
    m = step.metrics
    expected = 0.5 * m["l1"] + 2 * m["l2"] + 3 * m["edge"] + 0.25 * m["commitment"]
    assert m["loss"] == pytest.approx(expected, rel=1e-5) and step.loss.item() == pytest.approx(expected, rel=1e-5)
    assert step.features.shape == (32, 8) and step.ids.shape == (32,) and not step.features.requires_grad
    assert 0 < m["codebook_used"] <= 1 <= m["perplexity"]


def test_training_lowers_the_loss_and_keeps_codes_in_use():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model, config = VQVAE(TINY), TokenizerLossConfig()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    images = torch.rand(8, 3, 8, 8, generator=generator).round() * 2 - 1
    losses, rows = [], []
    for index in range(50):
        step = tokenizer_step(model, images, 0, config, use_codes=index >= 15)
        optimiser.zero_grad()
        step.loss.backward()
        optimiser.step()
        losses.append(step.metrics["l1"])
        if step.ids is None:
            rows.append(step.features)
            if index == 14:
                start_codebook(model.quantize, torch.cat(rows[-5:]), generator)
        else:
            update_codebook(model.quantize, step.features, step.ids)
            revive_dead_codes(model.quantize, step.features, generator)
    assert losses[-1] < 0.8 * losses[0]
    assert step.metrics["codebook_used"] > 0.5
