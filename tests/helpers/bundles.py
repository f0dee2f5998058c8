"""A bundle of small random weights, quick to write and to sample from, and interruptions of sampling."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cogvideo.checkpoint.load import save_model
from cogvideo.model.config import ModelConfig, ModelTask
from cogvideo.model.initialise import initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sampling.runner import GroupBatchCache
from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from cogvideo.tokenizers.text import TextTokenizer
from cogvideo.tokenizers.vqvae import VQVAEConfig

CAPTIONS = ["the red digit 3 moves left slowly", "红色的数字3向左缓慢移动", "a green one turns right, quickly"] * 20
NUM_CODES = 32
TASKS: dict[str, ModelTask] = {"trunk": "image", "sequential": "sequential", "interpolation": "interpolation"}


def write_image_tokenizer(folder: Path, seed: int = 0, num_codes: int = NUM_CODES) -> Path:
    """An image tokenizer of random weights, one token per 8x8 pixels."""
    torch.manual_seed(seed)
    vqvae = VQVAEConfig(
        channels=4,
        channel_multipliers=(1, 1, 1),
        encoder_num_res_blocks=1,
        z_channels=4,
        embedding_dim=4,
        num_codes=num_codes,
        levels=(1,),
        norm_groups=4,
        mid_attention=False,
        attention_resolutions=(),
    )
    ImageTokenizer(ImageTokenizerConfig(vqvae=vqvae)).save(folder)
    return folder


def write_bundle(
    folder: Path, frame_side: int = 2, num_layers: int = 2, *, text_len: int = 32, shared_trunk: bool = False
) -> Path:
    """Frames have frame_side x frame_side tokens of 8x8 pixels; the digits benchmark needs 5 x 5, bodies 8 x 8.

    `shared_trunk`: the stages are stored without the trunk's weights, as where they were trained with it frozen.
    """
    folder.mkdir(parents=True)
    text = TextTokenizer.train(CAPTIONS, folder / "text.model", num_pieces=400, num_image_tokens=NUM_CODES)
    write_image_tokenizer(folder / "image_tokenizer")
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=16,
        num_heads=2,
        text_len=text_len,
        frame_side=frame_side,
        num_positions=max(64, text_len + frame_side**2),
        frame_position_start=text_len,
        vocabulary=text.vocabulary,
    )
    models = {name: CogVideoTransformer(replace(config, task=task)) for name, task in TASKS.items()}
    for name, model in models.items():
        initialise(model, torch.Generator().manual_seed(1))
        shares = shared_trunk and name != "trunk"
        if shares:
            model.load_state_dict(models["trunk"].state_dict(), strict=False)
        save_model(folder / name, model, trunk=folder / "trunk" if shares else None)
    (folder / "sampling.yaml").write_text("first_frame: {text_bonus: 0.0}\n", encoding="utf-8")
    return folder


def stop_at_batches(monkeypatch: pytest.MonkeyPatch, every: int) -> list[str]:
    """Interrupt sampling whenever it has drawn so many batches more; returns the list that their names go into."""
    drawn: list[str] = []
    store = GroupBatchCache.store

    def store_and_stop(cache: GroupBatchCache, name: str, tokens: torch.Tensor) -> None:
        store(cache, name, tokens)
        drawn.append(f"{cache.group} {name}")
        if len(drawn) % every == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(GroupBatchCache, "store", store_and_stop)
    return drawn
