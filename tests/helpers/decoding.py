"""A pipeline of random weights, small enough to sample in a second. Its text tokenizer spells letters."""

from dataclasses import replace

import torch

from cogvideo.model.config import ModelConfig, ModelTask
from cogvideo.model.initialise import initialise
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.sequence.vocabulary import Vocabulary
from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from cogvideo.tokenizers.vqvae import VQVAEConfig

NUM_CODES = 48
VOCABULARY = Vocabulary(size=160, num_image_tokens=NUM_CODES, pad=48, newline=49, start_of_image=50)
CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=2,
    text_len=40,
    frame_side=4,  # the pipeline's frames are smaller still
    num_frames=5,
    num_positions=64,
    frame_position_start=40,
    dropout=0.0,
    attention_dropout=0.0,
    vocabulary=VOCABULARY,
)


def encode(text: str) -> list[int]:
    """A letter an id."""
    return [51 + ord(letter) % 100 for letter in text]


def model(
    task: ModelTask,
    window_size: int | None = None,
    seed: int = 0,
    frame_side: int = 4,
    learn_first_frame: bool = False,
) -> CogVideoTransformer:
    """Random weights, wide enough apart that tokens depend on everything."""
    sizes = {"window_size": window_size, "frame_side": frame_side, "learn_first_frame": learn_first_frame}
    made = CogVideoTransformer(replace(CONFIG, task=task, **sizes))
    initialise(made, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else None
    return made.eval()


def image_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    vqvae = VQVAEConfig(
        channels=8,
        channel_multipliers=(1, 1, 1),
        encoder_num_res_blocks=1,
        z_channels=8,
        embedding_dim=8,
        num_codes=NUM_CODES,
        levels=(1,),
        norm_groups=4,
        mid_attention=False,
        attention_resolutions=(),
    )
    return ImageTokenizer(ImageTokenizerConfig(vqvae=vqvae, level=1))


def pipeline(config: SampleConfig | None = None, *, learn_first_frame: bool = False) -> Pipeline:
    return Pipeline(
        encode=encode,
        prompt_format=PromptFormat(),
        image_tokenizer=image_tokenizer(),
        trunk=model("image", seed=1, frame_side=2),
        sequential=model("sequential", seed=2, frame_side=2, learn_first_frame=learn_first_frame),
        interpolation=model("interpolation", window_size=1, seed=3, frame_side=2),
        config=config or SampleConfig(num_clusters=8),
    )
