"""Opens a tokenizer by path, wherever one is asked for: ours, or the published files (icetk).

a text tokenizer     our model file, or `ice_text.model`, or the folder that holds it
an image tokenizer   our folder, or `ice_image.pt`, or the folder that holds it
the word `icetk`     the folder where the icetk package keeps both, ~/.icetk_models
"""

from pathlib import Path

from cogvideo.tokenizers.icetk import DEFAULT_FOLDER, IMAGE_FILE, TEXT_FILE, load_icetk_image, load_icetk_text
from cogvideo.tokenizers.image import CONFIG_FILE, WEIGHTS_FILE, ImageTokenizer
from cogvideo.tokenizers.text import TextTokenizer

ICETK = Path("icetk")


def open_text_tokenizer(path: Path | str) -> TextTokenizer:
    """Raises: OSError, or ValueError in one line, if there is none or it is damaged."""
    folder = _icetk_folder(Path(path), TEXT_FILE)
    return TextTokenizer.load(path) if folder is None else load_icetk_text(folder)


def open_image_tokenizer(path: Path | str) -> ImageTokenizer:
    """At compress rate 8 for the published one, which CogVideo uses. Raises: as `open_text_tokenizer`."""
    folder = _icetk_folder(Path(path), IMAGE_FILE)
    return ImageTokenizer.load(path) if folder is None else load_icetk_image(folder)


def image_tokenizer_files(path: Path | str) -> list[Path]:
    """The files that decide which tokens an image becomes, for hashing."""
    folder = _icetk_folder(Path(path), IMAGE_FILE)
    if folder is not None:
        return [folder.expanduser() / IMAGE_FILE]
    return [Path(path) / CONFIG_FILE, Path(path) / WEIGHTS_FILE]


def _icetk_folder(path: Path, name: str) -> Path | None:
    if path == ICETK and not path.exists():
        return DEFAULT_FOLDER
    if path.name == name:
        return path.parent
    return path if (path.expanduser() / name).is_file() else None
