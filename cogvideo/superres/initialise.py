"""Initial values of a super-resolution model from a text-to-image trunk. Random ones: `cogvideo.model.initialise`.

| parameter                     | inherited from a trunk                                                             |
|-------------------------------|------------------------------------------------------------------------------------|
| all that a trunk has          | copied                                                                             |
| high_res_attention (direct)   | the trunk's attention, layer by layer                                              |
| extra positions               | the trunk's image positions, tiled: place (y, x) gets those of (y % s, x % s)      |

Source: CogView2's published code. s is the side of the coarse grid, for the iterative model too.
"""

from collections.abc import Callable, Mapping

import torch
from einops import repeat
from torch import Tensor

from cogvideo.model.initialise import trunk_values
from cogvideo.superres.transformer import SuperresTransformer


def inherited_values(model: SuperresTransformer, trunk: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """How to read each parameter that a model inherits from a text-to-image trunk's tensors (our names).

    Raises: ValueError naming a tensor that is missing or of another shape, or sizes that do not fit together.
    """
    config = model.config
    side, first = config.low_res_side, config.low_res_position_start - 1  # position of an image's first slot
    repeats, remainder = divmod(config.high_res_side, side)
    if remainder or not 0 <= first <= config.num_positions - side**2:
        raise ValueError(
            f"the trunk's {config.num_positions} positions hold no {side}x{side} image at {first} that tiles "
            f"{config.high_res_side}x{config.high_res_side}; set superres.low_res_side and low_res_position_start"
        )
    values = trunk_values(model, trunk)
    for name, _ in model.named_parameters():
        if ".high_res_attention." in name:
            values[name] = values[name.replace(".high_res_attention.", ".attention.")]

    def tiled_positions() -> Tensor:
        image_positions = values["position_embeddings.weight"]()[first : first + side**2]
        return repeat(image_positions, "(i j) h -> (a i b j) h", i=side, j=side, a=repeats, b=repeats)

    return values | {"extra_position_embeddings.weight": tiled_positions}


@torch.no_grad()
def inherit_trunk(model: SuperresTransformer, trunk: Mapping[str, Tensor]) -> None:
    """Copy the `inherited_values` into a model. Raises: ValueError, with the model unchanged."""
    own = dict(model.named_parameters())
    for name, read in inherited_values(model, trunk).items():
        own[name].copy_(read())
