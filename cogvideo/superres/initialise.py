"""How a super-resolution model starts from a text-to-image trunk. Random starting values: `cogvideo.model.initialise`.

| parameter                     | inherited from a trunk                                                             |
|-------------------------------|------------------------------------------------------------------------------------|
| all that a trunk has          | copied                                                                             |
| high_res_attention (direct)   | the trunk's attention, layer by layer                                              |
| extra positions               | the trunk's positions of a picture, tiled: place (y, x) has those of (y % s, x % s) |

Source: CogView2's published code; s is the side of the coarse grid, for the iterative model too.
"""

from collections.abc import Mapping

import torch
from einops import repeat
from torch import Tensor

from cogvideo.superres.transformer import SuperresTransformer


@torch.no_grad()
def inherit_trunk(model: SuperresTransformer, trunk: Mapping[str, Tensor]) -> None:
    """Take a trunk's tensors (our names); others among them are left alone.

    Raises: ValueError naming what is missing or of another shape, or sizes that do not go together; nothing has changed
    then.
    """
    config = model.config
    for name, p in model.trunk_parameters():
        if name not in trunk or trunk[name].shape != p.shape:
            got = f"shape {tuple(trunk[name].shape)}" if name in trunk else "no such tensor"
            raise ValueError(
                f"{name} should have shape {tuple(p.shape)}, it has {got}; use equal sizes and vocabularies"
            )
    side, first = config.low_res_side, config.low_res_position_start - 1  # a picture's first slot
    of_a_picture = trunk["position_embeddings.weight"][first : first + side**2]
    times, left = divmod(config.high_res_side, side)
    if left or len(of_a_picture) < side**2 or first < 0:
        raise ValueError(
            f"its {config.num_positions} positions hold no picture of {side}x{side} from {first} on to be tiled to "
            f"{config.high_res_side}x{config.high_res_side}; set superres.low_res_side and low_res_position_start"
        )
    own = dict(model.named_parameters())
    for name, _ in model.trunk_parameters():
        own[name].copy_(trunk[name])
    for name, p in model.added_parameters():
        if ".high_res_attention." in name:
            p.copy_(trunk[name.replace(".high_res_attention.", ".attention.")])
    tiled = repeat(of_a_picture, "(i j) h -> (a i b j) h", i=side, j=side, a=times, b=times)
    own["extra_position_embeddings.weight"].copy_(tiled)
