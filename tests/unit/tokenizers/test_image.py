"""ImageTokenizer: shapes, ranges, saving, and damaged folders."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig, image_tokenizer_files
from cogvideo.tokenizers.vqvae import VQVAEConfig

CONFIG = ImageTokenizerConfig(
    vqvae=VQVAEConfig(
        channels=8, channel_multipliers=(1, 2), encoder_num_res_blocks=1, z_channels=8, embedding_dim=4, num_codes=16,
        levels=(1,), norm_groups=4, norm_scope="pixel", mid_attention=False, attention_resolutions=(),
    ),
    level=1,
    pixel_mean=(0.1, 0.2, 0.3),
    pixel_std=(0.5, 0.4, 0.3),
)  # fmt: skip


def make_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    return ImageTokenizer(CONFIG)


def pictures(count: int = 5, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_shapes_and_ranges():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(pictures())
    assert ids.shape == (5, 4) and ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < tokenizer.num_tokens
    images = tokenizer.decode(ids)
    assert images.shape == (5, 3, 8, 8) and images.min() >= 0 and images.max() <= 1
    assert tokenizer.codebook.shape == (16, 4) and tokenizer.compress_rate == 4


def test_batches_do_not_matter():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(pictures(), batch_size=2)
    assert torch.equal(ids, tokenizer.encode(pictures(), batch_size=64))
    torch.testing.assert_close(tokenizer.decode(ids, batch_size=2), tokenizer.decode(ids), atol=1e-5, rtol=0)


def test_no_images():
    with pytest.raises(ValueError, match="no images to encode"):
        make_tokenizer().encode(pictures(0))


def test_images_that_are_not_square():
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(pictures(2, 8, 12))
    assert ids.shape == (2, 6)
    assert tokenizer.decode(ids, rows=2).shape == (2, 3, 8, 12)
    with pytest.raises(ValueError, match="6 ids per image do not fill 2 rows; give `rows`"):
        tokenizer.decode(ids)


def test_normalisation_round_trip():
    tokenizer = make_tokenizer()
    x = tokenizer.normalise(pictures())
    torch.testing.assert_close(x[:, 1], (pictures()[:, 1] - 0.2) / 0.4)
    torch.testing.assert_close(tokenizer.denormalise(x), pictures())


def test_save_and_load_round_trip(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save(tmp_path / "t")
    loaded = ImageTokenizer.load(tmp_path / "t")
    assert loaded.config == CONFIG
    for name, tensor in tokenizer.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert torch.equal(loaded.encode(pictures()), tokenizer.encode(pictures()))
    with pytest.raises(FileExistsError):
        tokenizer.save(tmp_path / "t")
    tokenizer.save(tmp_path / "t", replace=True, dtype=torch.bfloat16)
    assert ImageTokenizer.load(tmp_path / "t").codebook.dtype == torch.float32


def _edit(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("enc.conv_in.bias"), "tensor enc.conv_in.bias is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "tensor extra is not part"),
        (
            lambda w: w.update({"enc.conv_in.bias": torch.zeros(9)}),
            r"enc.conv_in.bias is torch.float32 \(9,\), expected",
        ),
        (lambda w: w.update({"enc.conv_in.bias": torch.zeros(8).long()}), "enc.conv_in.bias is torch.int64"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, message):
    make_tokenizer().save(tmp_path / "t")
    _edit(tmp_path / "t", change)
    with pytest.raises(ValueError, match=message):
        ImageTokenizer.load(tmp_path / "t")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        ImageTokenizer.load(tmp_path)
    make_tokenizer().save(tmp_path / "t")
    (tmp_path / "t" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        ImageTokenizer.load(tmp_path / "t")


def test_bad_config(tmp_path):
    make_tokenizer().save(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"levl": 1}))
    with pytest.raises(ValueError, match="levl"):
        ImageTokenizer.load(tmp_path / "t")
    file.write_text(json.dumps(config | {"level": 2}))
    with pytest.raises(ValueError, match="level=2"):
        ImageTokenizer.load(tmp_path / "t")


def test_files_to_hash_are_config_and_weights(tmp_path):
    assert [path.name for path in image_tokenizer_files(tmp_path)] == ["config.json", "model.safetensors"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "t"
    make_tokenizer().save(folder)
    return folder, (folder / "model.safetensors").read_bytes()


@settings(max_examples=25)
@given(cut=st.floats(0, 0.999), flip=st.integers(0, 200))
def test_damaged_weights_are_an_error_of_one_line(saved, cut, flip):
    folder, complete = saved
    data = bytearray(complete)
    data[flip] ^= 0xFF  # the header's length or its text
    (folder / "model.safetensors").write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(ValueError) as error:
        ImageTokenizer.load(folder)
    assert "\n" not in str(error.value)
