"""Codebook training, compared with plain loops."""

import pytest
import torch

from cogvideo.tokenizers.quantise import (
    Quantizer,
    codebook_usage,
    initialise_codebook,
    quantise,
    revive_dead_codes,
    update_codebook,
)


def make_quantizer(num_codes: int = 6, dim: int = 3) -> Quantizer:
    torch.manual_seed(0)
    return Quantizer(z_channels=dim, embedding_dim=dim, num_codes=num_codes)


def test_update_equals_a_slow_moving_average():
    quantizer = make_quantizer()
    decay, eps = 0.9, 1e-5
    size = [0.0] * 6
    total = [row.clone() for row in quantizer.embed.weight.detach()]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        features = torch.randn(50, 3, generator=generator)
        ids = quantizer.nearest(features)
        update_codebook(quantizer, features, ids, decay, eps)
        for code in range(6):
            chosen = [feature for feature, id in zip(features, ids, strict=True) if id == code]
            size[code] = decay * size[code] + (1 - decay) * len(chosen)
            total[code] = decay * total[code] + (1 - decay) * sum(chosen, torch.zeros(3))
        for code in range(6):
            smoothed = (size[code] + eps) / (sum(size) + 6 * eps) * sum(size)
            expected = total[code] / smoothed
            torch.testing.assert_close(quantizer.embed.weight.data[code], expected, rtol=1e-4, atol=1e-4)


def test_gradient_passes_straight_through_and_commitment_pulls_to_the_code():
    quantizer = make_quantizer()
    features = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2), requires_grad=True)
    codes, ids, commitment = quantise(quantizer, features)
    assert torch.allclose(codes, quantizer.embed(ids).permute(0, 3, 1, 2), atol=1e-6)
    (codes * 3).sum().backward(retain_graph=True)
    assert torch.equal(features.grad, torch.full_like(features, 3.0))
    features.grad = None
    commitment.backward()
    expected = 2 * (features.detach() - codes.detach()) / features.numel()
    torch.testing.assert_close(features.grad, expected, atol=1e-6, rtol=1e-4)


def test_dead_codes_move_onto_features_and_live_ones_stay():
    quantizer = make_quantizer()
    quantizer.cluster_size.copy_(torch.tensor([5.0, 0.0, 5.0, 0.01, 5.0, 5.0]))
    before = quantizer.embed.weight.clone()
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
    assert revive_dead_codes(quantizer, features, torch.Generator().manual_seed(4)) == 2
    after = quantizer.embed.weight
    for code in (1, 3):
        assert (features == after[code]).all(1).any()
        assert quantizer.cluster_size[code] >= 0.03  # counted as alive until it has had its chance
        assert torch.allclose(quantizer.embed_avg[code], after[code] * quantizer.cluster_size[code])
    assert not torch.equal(after[1], after[3])
    assert torch.equal(after[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
    assert revive_dead_codes(quantizer, features, torch.Generator().manual_seed(4)) == 0


def test_k_means_start_finds_clusters_however_unequal():
    """Nine tenths of the features are one plain ground; it must not take most of the codes."""
    generator = torch.Generator().manual_seed(5)
    centres = 10 * torch.eye(3)
    rare = (centres[:, None] + 0.01 * torch.randn(3, 30, 3, generator=generator)).reshape(-1, 3)
    ground = 0.01 * torch.randn(900, 3, generator=generator)
    quantizer = make_quantizer(num_codes=8)
    initialise_codebook(quantizer, torch.cat([ground, rare]), generator)
    distance = torch.cdist(torch.cat([centres, torch.zeros(1, 3)]), quantizer.embed.weight)
    assert (distance.amin(1) < 0.5).all()
    assert torch.equal(quantizer.embed_avg, quantizer.embed.weight)


def test_k_means_start_needs_little_memory(monkeypatch):
    sizes, plain = [], torch.cdist

    def cdist(a, b):
        sizes.append(len(a) * len(b))
        return plain(a, b)

    monkeypatch.setattr(torch, "cdist", cdist)
    generator = torch.Generator().manual_seed(6)
    features = torch.randn(9000, 3, generator=generator)
    initialise_codebook(make_quantizer(num_codes=64), features, generator, iterations=1)
    assert max(sizes) <= 4096 * 4  # a sixteenth of the codes at a time


@pytest.mark.gpu
def test_codes_are_drawn_on_a_gpu_as_without_one():
    """Generators of a run are the processor's wherever the features are."""
    found = []
    for device in ("cpu", "cuda"):
        quantizer = make_quantizer(num_codes=8).to(device)
        features = torch.randn(500, 3, generator=torch.Generator().manual_seed(7)).to(device)
        initialise_codebook(quantizer, features, torch.Generator().manual_seed(8))
        quantizer.cluster_size[2] = 0.0
        assert revive_dead_codes(quantizer, features, torch.Generator().manual_seed(9)) == 1
        found.append(quantizer.embed.weight.cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_usage():
    used, perplexity = codebook_usage(torch.tensor([[0, 0], [1, 1]]), num_codes=8)
    assert used == pytest.approx(0.25) and perplexity == pytest.approx(2.0)
