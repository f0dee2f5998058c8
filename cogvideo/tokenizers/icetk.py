"""The published tokenizers' own files: `ice_text.model` and `ice_image.pt`, as the icetk package keeps them.

Reading only, into our classes; the icetk package itself is never needed. Not here: what we train (`text.py`,
`image.py`).
"""

import re
from pathlib import Path

import torch
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from cogvideo.tokenizers.image import ImageTokenizer, ImageTokenizerConfig, load_weights
from cogvideo.tokenizers.text import TextTokenizer, parse_model, read_model
from cogvideo.tokenizers.vqvae import VQVAE, VQVAEConfig

DEFAULT_FOLDER = Path("~/.icetk_models")
TEXT_FILE, IMAGE_FILE = "ice_text.model", "ice_image.pt"
NUM_IMAGE_TOKENS = 20000
VOCABULARY_SIZE = 150010  # the embedding table's rows: seven more than there are pieces
ADDED_PIECES = ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")
MAX_IMAGE_BYTES = 2 << 30  # the published weights take about 0.5 GB


def load_icetk_text(
    folder: Path | str = DEFAULT_FOLDER,
    *,
    num_image_tokens: int = NUM_IMAGE_TOKENS,
    vocabulary_size: int | None = VOCABULARY_SIZE,
) -> TextTokenizer:
    """The published text tokenizer with its special pieces; `vocabulary_size` None counts the pieces.

    Raises: FileNotFoundError that says what to put where; ValueError for a file that is not such a model.
    """
    path = _find(folder, TEXT_FILE, "the published sentencepiece model")
    try:
        model = add_special_pieces(parse_model(read_model(path)))
        return TextTokenizer(model, num_image_tokens, vocabulary_size=vocabulary_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def add_special_pieces(proto: ModelProto) -> bytes:
    """The serialised model with the published special pieces behind its own, in the published order.

    They are CONTROL pieces where icetk appends NORMAL ones of score 0: the ids are the same, yet a prompt that holds
    the text "<start_of_image>" is not encoded to it.
    """
    present = {piece.piece for piece in proto.pieces}
    for text in ADDED_PIECES:
        if text not in present:
            proto.pieces.add(piece=text, score=0.0, type=ModelProto.SentencePiece.Type.CONTROL)
    return proto.SerializeToString()


def load_icetk_image(
    folder: Path | str = DEFAULT_FOLDER, compress_rate: int = 8, config: VQVAEConfig | None = None
) -> ImageTokenizer:
    """The published image tokenizer at one of its compress rates; those of the others are loaded and not used.

    Raises: FileNotFoundError that says what to put where; ValueError for a file that is not these weights.
    """
    path = _find(folder, IMAGE_FILE, "the published image tokenizer's weights")
    full = VQVAEConfig() if config is None else config
    level = full.level_of_rate(compress_rate)
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_IMAGE_BYTES >> 30} GiB, expected about 0.5 GB of weights")
    try:
        # tensors and plain containers only: a pickle that names anything else is refused, never run
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can make the unpickler raise anything
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it names {named[1]}" if named else (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: refused, not a plain PyTorch weights file ({reason})") from None
    weights = content.get("module") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path}: has no tensors under the key 'module'; it is not icetk's {IMAGE_FILE}")
    with torch.device("meta"):
        model = VQVAE(full)
    load_weights(model, weights, origin=str(path))
    return ImageTokenizer(ImageTokenizerConfig(vqvae=full, level=level), model)


def _find(folder: Path | str, name: str, what: str) -> Path:
    path = Path(folder).expanduser() / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; put {what} there (the icetk package downloads it to {DEFAULT_FOLDER}), "
            "or name its folder"
        )
    return path
