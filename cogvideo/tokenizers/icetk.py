"""The published tokenizers' files, `ice_text.model` and `ice_image.pt`: where they are, and how to read them safely.

The icetk package, which downloads them, is not needed. `text.py` and `image.py` open them as tokenizers.
"""

from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from torch import Tensor

from cogvideo.torch_archive import read_module

NAME = "icetk"
"""Stands for `DEFAULT_FOLDER` wherever a tokenizer's path is expected."""
DEFAULT_FOLDER = Path("~/.icetk_models")
TEXT_FILE, IMAGE_FILE = "ice_text.model", "ice_image.pt"
NUM_IMAGE_TOKENS = 20000
VOCABULARY_SIZE = 150010
"""Rows of the embedding table: seven more than there are ids."""
ADDED_PIECES = ("<start_of_image>", "<start_of_english>", "<start_of_chinese>")
MAX_IMAGE_BYTES = 2 << 30
"""The published weights take about 0.5 GB."""


def icetk_folder(path: Path, file_name: str) -> Path | None:
    """The folder of the published files, if `path` names it or `file_name` in it; None if `path` is something else."""
    if path == Path(NAME) and not path.exists():
        return DEFAULT_FOLDER
    if path.name == file_name:
        return path.parent
    return path if (path.expanduser() / file_name).is_file() else None


def find_icetk_file(folder: Path | str, file_name: str) -> Path:
    """The path of a published file. Raises: FileNotFoundError that says what to put where."""
    path = Path(folder).expanduser() / file_name
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; put the published {file_name} there (the icetk package downloads it to "
            f"{DEFAULT_FOLDER}), or give its folder"
        )
    return path


def add_special_pieces(proto: ModelProto) -> bytes:
    """Serialize the text model with the published special pieces appended, in the published order.

    They are CONTROL pieces where icetk appends NORMAL ones of score 0: the ids are the same, but a prompt with the
    text "<start_of_image>" is not encoded to that piece.
    """
    present = {piece.piece for piece in proto.pieces}
    for text in ADDED_PIECES:
        if text not in present:
            proto.pieces.add(piece=text, score=0.0, type=ModelProto.SentencePiece.Type.CONTROL)
    return bytes(proto.SerializeToString())


def read_image_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in `ice_image.pt`. Raises: ValueError for a file that is anything else, as `read_module`."""
    if path.stat().st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_IMAGE_BYTES >> 30} GiB, expected about 0.5 GB of weights")
    return read_module(path)
