"""Draws clips as rows of frames with their captions beside them, one picture to look at."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cogvideo.files import atomic_write

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER, INK = (250, 250, 250), (30, 30, 30)
GAP = 2  # pixels between frames
LINE = 16  # pixels a line of text
MAX_PIXELS = 100_000_000
FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts"),
    *("/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts"),
)
CJK_FONTS = (
    *("notosanscjk", "notosanssc", "sourcehansans", "wqy", "droidsansfallback"),
    *("pingfang", "stheiti", "msyh", "simsun"),
)


def contact_sheet(
    path: str | Path, rows: Sequence[NDArray[np.uint8]], captions: Sequence[str] | None = None, *, scale: int = 1
) -> None:
    """Write a .png with one clip (N, H, W, 3) uint8 a row, its caption above it; rows may differ in length and size.

    `scale` repeats pixels. Where no font with Chinese letters is found, such letters are written as U+XXXX.
    Raises: ValueError if there is nothing to draw, or too much.
    """
    if not rows or any(row.ndim != 4 or not row.size for row in rows):
        raise ValueError("no frames to draw; expected rows of frames (N, H, W, 3)")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"{len(captions)} captions for {len(rows)} rows of frames; expected one each")
    text_height = LINE + GAP if captions is not None else 0
    width = max(len(row) * (row.shape[2] * scale + GAP) for row in rows) + GAP
    height = sum(row.shape[1] * scale + text_height + GAP for row in rows) + GAP
    if width * height > MAX_PIXELS:
        raise ValueError(f"a contact sheet of {width}x{height} pixels is too large; draw fewer rows or frames")
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, top = ImageDraw.Draw(sheet), GAP
    for index, row in enumerate(rows):
        if captions is not None:
            draw.text((GAP, top), *_drawable(captions[index], width))
            top += text_height
        for place, frame in enumerate(row.repeat(scale, axis=1).repeat(scale, axis=2)):
            sheet.paste(Image.fromarray(frame), (GAP + place * (frame.shape[1] + GAP), top))
        top += row.shape[1] * scale + GAP
    with atomic_write(path) as part:
        sheet.save(part, "PNG")


def _drawable(caption: str, width: int) -> tuple[str, tuple[int, int, int], Font]:
    """A caption as the font can show it, cut to `width`, with its colour and font."""
    text = " ".join(caption.split())
    font = _font(any(ord(letter) > 0x2E7F for letter in text))
    if font is None:
        font = _font(False)
        assert font is not None
        text = "".join(letter if ord(letter) <= 0x2E7F else f"U+{ord(letter):04X} " for letter in text)
    text = text[: 4 * width]  # before it is measured: nobody draws a novel
    while text and font.getlength(text) > width - 2 * GAP:
        text = text[: max(0, min(len(text) - 2, int(len(text) * width / font.getlength(text))))] + "…"
        if text == "…":
            break
    return text, INK, font


@cache
def _font(cjk: bool) -> Font | None:
    """Pillow's own font, or a system font with Chinese letters; None if there is none."""
    if not cjk:
        return ImageFont.load_default(size=12)
    for folder in map(Path, FONT_FOLDERS):
        for file in sorted(folder.rglob("*.tt[cf]")) + sorted(folder.rglob("*.otf")):
            if file.stem.lower().replace("-", "").startswith(CJK_FONTS):
                try:
                    return ImageFont.truetype(str(file), 12)
                except OSError:
                    continue  # a broken font file; another may do
    return None
