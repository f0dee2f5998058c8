"""Records of the tokenizers behind prepared data and models, stored with both and compared wherever they meet.

A manifest of prepared data has the record of its image tokenizer. An export's `extra` has those of the image and text
tokenizers that it was trained with. Pairs and super-resolution models also have that of the image tokenizer of their
large frames, if it is a separate one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideo.files import sha256_file
from cogvideo.tokenizers.image import CONFIG_FILE, ImageTokenizer, image_tokenizer_files

KEY = "tokenizers"
"""The key of an export's `extra`."""


def describe_tokenizer(folder: Path, tokenizer: ImageTokenizer) -> dict[str, Any]:
    """The record of an image tokenizer: enough to tell whether tokens and a tokenizer belong together."""
    return {"num_tokens": tokenizer.num_tokens, "compress_rate": tokenizer.compress_rate} | hash_tokenizer(folder)


def hash_tokenizer(folder: Path) -> dict[str, Any]:
    """The part of an image tokenizer's record that needs only its files. Raises: OSError."""
    return {"sha256": {path.name: sha256_file(path) for path in image_tokenizer_files(folder)}}


@dataclass(frozen=True)
class TokenizerRecords:
    """The tokenizers of a model; None where it does not record them, as older versions did not."""

    image: Mapping[str, Any] | None = None
    """As `describe_tokenizer` returns it."""
    text: str | None = None
    """`TextTokenizer.sha256`."""
    high_res: Mapping[str, Any] | None = None
    """The image tokenizer of super-resolution's large frames; None: `image` serves both sizes."""

    @classmethod
    def of_export(cls, extra: Mapping[str, Any]) -> "TokenizerRecords":
        """Read a checkpoint's `extra`, which is not trusted: whatever is not a record counts as none."""
        stored = extra.get(KEY)
        if not isinstance(stored, dict):
            return cls()
        image, text, high_res = stored.get("image"), stored.get("text"), stored.get("high_res")
        return cls(
            image if isinstance(image, dict) else None,
            text if isinstance(text, str) else None,
            high_res if isinstance(high_res, dict) else None,
        )

    def to_extra(self) -> dict[str, Any]:
        """What an export's `extra` holds."""
        stored: dict[str, Any] = {"image": None if self.image is None else dict(self.image), "text": self.text}
        return {KEY: stored if self.high_res is None else stored | {"high_res": dict(self.high_res)}}

    def differing(self, other: "TokenizerRecords", *, both_sizes: bool = False) -> str | None:
        """A kind of tokenizer, such as `text tokenizer`, that certainly differs between the two; None if there is none.

        `both_sizes`: for pairs and super-resolution models, whose tokenizers of large frames are compared too.
        """
        if are_different(self.image, other.image):
            return "image tokenizer"
        if both_sizes and are_different(self.high_res or self.image, other.high_res or other.image):
            return "image tokenizer of large frames"
        if self.text is not None and other.text is not None and self.text != other.text:
            return "text tokenizer"
        return None


def are_different(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """Whether two records certainly belong to different image tokenizers.

    An entry that either record lacks is not compared. Of the files, only the weights are: a later version may write
    the same config.json with more keys.
    """
    if first is None or second is None:
        return False
    if any(key in first and key in second and first[key] != second[key] for key in ("num_tokens", "compress_rate")):
        return True
    hashes, others = first.get("sha256"), second.get("sha256")
    if not isinstance(hashes, dict) or not isinstance(others, dict):
        return False
    return any(hashes[name] != others[name] for name in hashes.keys() & others.keys() - {CONFIG_FILE})
