"""The README.md of a converted checkpoint: what it is, where it came from, and how to use it."""

import json

from cogvideo import __version__
from cogvideo.checkpoint.parameters import name_list
from cogvideo.checkpoint.sat.conversion import Conversion
from cogvideo.checkpoint.sat.reader import SatCheckpoint
from cogvideo.dtypes import dtype_name

TITLES = {
    "sequential": "CogVideo stage 1: four frames after a given one",
    "interpolation": "CogVideo stage 2: frames between given ones",
    "image": "CogView2's text-to-image transformer, the trunk of CogVideo",
    "direct": "CogView2's direct super-resolution, 20x20 to 60x60 tokens in one forward pass",
    "iterative": "CogView2's iterative super-resolution, 60x60 tokens refined in rounds",
}


def model_card(conversion: Conversion, sat: SatCheckpoint, hashes: dict[str, str], differing: list[str]) -> str:
    """Markdown with the front matter that model hubs read.

    `hashes`: sha256 by name of the source files; `differing`: `SatCheckpoint.differing_copies`.
    """
    settings = conversion.config.get("model") or conversion.config["superres"]
    dtypes = sorted({dtype_name(mapping.info.dtype) for mapping in conversion.mappings if mapping.info})
    lines = [
        "---",
        "library_name: cogvideo",
        "pipeline_tag: text-to-video" if "task" in settings else "pipeline_tag: image-to-image",
        "tags: [cogvideo, cogview2]",
        "---",
        f"# {TITLES[settings.get('task') or settings['method']]}",
        "",
        f"Converted by cogvideo {__version__} (`cogvideo convert`) from a SwissArmyTransformer checkpoint, iteration "
        f"{sat.iteration}. The values are the source's, in {', '.join(dtypes)}; the source's license applies.",
        "",
        f"- parameters: {conversion.num_parameters:,} in {len(conversion.written)} tensors",
        f"- model-parallel ranks merged: {len(sat.paths)}",
        *[f"- source `{name}`, sha256 `{sha256}`" for name, sha256 in hashes.items()],
        *([f"- tensors that differ between ranks, rank 0's kept: {name_list(differing)}"] if differing else []),
        f"- tensors dropped: {len(conversion.dropped)}",
        *[f"  - `{mapping.source}`: {mapping.reason}" for mapping in conversion.dropped],
        "",
        "Papers: CogVideo (arXiv 2205.15868), CogView2 (arXiv 2204.14217).",
        "",
        "## Settings",
        "```json",
        json.dumps(settings, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)
