"""The ids that the model and its tokenizers share. Not a tokenizer: nothing here turns text or pixels into ids."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """Joint vocabulary: image tokens, then text pieces. Defaults are the published (icetk) ids."""

    size: int = 150010
    """Rows of the embedding table; published tables have a few more rows than there are pieces."""
    num_image_tokens: int = 20000
    """Ids [0, num_image_tokens) are codes of the image tokenizer; only these are predicted."""
    pad: int = 20003
    """`<pad>`: pads text on the left; masked, so its embedding has no effect."""
    newline: int = 20004
    """`<n>`: separates the clip length from the caption."""
    start_of_image: int = 150000
    """BOI, `<start_of_image>`: the input of the first slot of every frame."""

    def __post_init__(self) -> None:
        if self.num_image_tokens < 1:
            raise ValueError(f"vocabulary.num_image_tokens={self.num_image_tokens}; expected at least 1")
        for name in ("pad", "newline", "start_of_image"):
            value = getattr(self, name)
            if not self.num_image_tokens <= value < self.size:
                raise ValueError(
                    f"vocabulary.{name}={value} is not in the text ids [{self.num_image_tokens}, {self.size}); "
                    "give the id that the text tokenizer has for it"
                )
