"""A pipeline of random weights, small enough to sample in a second."""

import torch

from cogvideo.sampling.config import SampleConfig
from cogvideo.sampling.pipeline import Pipeline
from cogvideo.sequence.prompt import PromptFormat
from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig
from cogvideo.tokenizers.vqvae import VQVAEConfig
from tests.helpers import decoding


def image_tokenizer() -> ImageTokenizer:
    torch.manual_seed(0)
    vqvae = VQVAEConfig(
        channels=8,
        channel_multipliers=(1, 1, 1),
        encoder_num_res_blocks=1,
        z_channels=8,
        embedding_dim=8,
        num_codes=decoding.NUM_CODES,
        levels=(1,),
        norm_groups=4,
        mid_attention=False,
        attention_resolutions=(),
    )
    return ImageTokenizer(ImageTokenizerConfig(vqvae=vqvae, level=1))


def pipeline(config: SampleConfig | None = None, *, learn_first_frame: bool = False) -> Pipeline:
    return Pipeline(
        encode=decoding.encode,
        prompt_format=PromptFormat(),
        image_tokenizer=image_tokenizer(),
        trunk=decoding.model("image", seed=1, frame_side=2),
        sequential=decoding.model("sequential", seed=2, frame_side=2, learn_first_frame=learn_first_frame),
        interpolation=decoding.model("interpolation", window_size=1, seed=3, frame_side=2),
        config=config or SampleConfig(num_clusters=8),
    )
