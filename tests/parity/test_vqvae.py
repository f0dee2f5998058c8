"""The image tokenizer compared with the published code's values for seeded weights (tests/golden/vqvae*)."""

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from cogvideo.tokenizers.vqvae import VQVAE, VQVAEConfig

GOLDEN = Path(__file__).parents[1] / "golden"
# pack, key in vqvae.json, step between the stored rows and columns of the decoded images
PACKS = [("vqvae_small_64", "small", 2), ("vqvae_default_32", "default", 1)]


def described(key: str) -> dict:
    return json.loads((GOLDEN / "vqvae.json").read_text())[key]


def config_of(pack: dict) -> VQVAEConfig:
    return VQVAEConfig(
        channels=pack["channels"],
        channel_multipliers=tuple(pack["encoder_channel_multipliers"]),
        encoder_num_res_blocks=pack["encoder_num_res_blocks"],
        decoder_num_res_blocks=pack["decoder_num_res_blocks"],
        z_channels=pack["z_channels"],
        embedding_dim=pack["embedding_dim"],
        num_codes=pack["num_codes"],
    )


@torch.no_grad()
def fill_by_recipe(model: VQVAE) -> VQVAE:
    """The weights of the packs: one generator over the sorted names."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in sorted(model.named_parameters()):
        r = torch.randn(parameter.shape, generator=generator)
        if name == "quantize.embed.weight":
            parameter.copy_(0.5 * r)
        elif parameter.ndim == 4:
            parameter.copy_(r / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(1 + 0.2 * r if name.endswith("weight") else 0.1 * r)
    return model


@pytest.mark.parametrize(("file", "key", "step"), PACKS)
def test_names_shapes_ids_and_pixels(file, key, step):
    pack = described(key)
    config = config_of(pack)
    model = VQVAE(config)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == pack["state_dict"]
    assert [list(config.decoder_multipliers(level)) for level in (2, 1, 0)] == pack["decoder_channel_multipliers"]

    golden = load_file(GOLDEN / f"{file}.safetensors")
    side = pack["image_size"]
    image = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(6))
    fill_by_recipe(model)
    for level in range(3):
        tokenizer = ImageTokenizer(ImageTokenizerConfig(config, level=level), model)
        ids = golden[f"ids_l{level}"].long()
        flat = rearrange(ids, "b h w -> b (h w)")
        # closer second choices may win in float32
        sure = golden[f"gap_l{level}"].reshape(flat.shape) > 1e-3
        assert torch.equal(tokenizer.encode(image)[sure], flat[sure])

        expected = golden[f"decode_raw_l{level}"]
        decoded = model.decode(ids, level)
        assert decoded.shape == image.shape
        torch.testing.assert_close(decoded[:, :, ::step, ::step], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(  # flat ids of a batch, denormalised and clamped
            tokenizer.decode(flat)[:, :, ::step, ::step], tokenizer.denormalise(expected).clamp(0, 1), atol=1e-4, rtol=0
        )


def test_full_size_parameter_count():
    pack = described("default")
    with torch.device("meta"):
        model = VQVAE(VQVAEConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == pack["num_parameters"]
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == pack["state_dict"]
