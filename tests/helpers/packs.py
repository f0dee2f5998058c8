"""Golden packs: numbers that the published code gave for seeded random weights. Here they are opened, not judged."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvideo.model.config import ModelConfig, ModelTask
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.layout import Vocabulary

GOLDEN = Path(__file__).parents[1] / "golden"

_NAMES = (
    (r"transformer\.(.*)", r"\1"),
    (r"mixins\.extra_position_embedding\.position_embeddings\.weight", "extra_position_embeddings.weight"),
    (r"mixins\.attention_plus\.(query_key_value|dense)\.(\d+)\.(weight|bias)", r"layers.\2.temporal_attention.\1.\3"),
    (r"mixins\.attention_plus\.attn_distribution\.(\d+)", r"layers.\1.mix_logit"),
)


def our_name(published: str) -> str:
    """A published parameter's name in this package."""
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, published):
            return re.sub(pattern, replacement, published)
    raise KeyError(published)


@dataclass(frozen=True)
class Pack:
    """One pack: arrays as the published code held them (integers as int64), and its settings and single numbers."""

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


@cache
def open_pack(name: str) -> Pack:
    about = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return Pack({k: v.long() if v.dtype == torch.int32 else v for k, v in tensors.items()}, about)


@cache
def published_weights(stage: int) -> dict[str, Tensor]:
    """The golden checkpoint of a stage, in our names."""
    folder = GOLDEN / f"sat-stage{stage}"
    iteration = (folder / "latest").read_text().strip()
    loaded = torch.load(folder / iteration / "mp_rank_00_model_states.pt", weights_only=True)
    return {our_name(name): tensor.float() for name, tensor in loaded["module"].items()}


def published_config(task: ModelTask, window_size: int | None = None) -> ModelConfig:
    """The model that made all transformer packs, without dropout."""
    sizes = json.loads((GOLDEN / "sat-stage1" / "model_config.json").read_text(encoding="utf-8"))
    return ModelConfig(
        task=task,
        num_layers=sizes["num_layers"],
        hidden_size=sizes["hidden_size"],
        num_heads=sizes["num_attention_heads"],
        window_size=window_size,
        dropout=0.0,
        attention_dropout=0.0,
        vocabulary=Vocabulary(sizes["vocab_size"], num_image_tokens=200, pad=200, newline=201, start_of_image=202),
    )


def published_model(stage: int, window_size: int | None = None) -> CogVideoTransformer:
    """A stage with the golden weights, ready to be evaluated; None is full attention."""
    model = CogVideoTransformer(published_config("sequential" if stage == 1 else "interpolation", window_size))
    model.load_state_dict(published_weights(stage))
    return model.eval()
