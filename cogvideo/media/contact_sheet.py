"""Contact sheets: clips as rows of frames, with their captions, in one picture."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from cogvideo.files import atomic_write

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

PAPER, INK = (250, 250, 250), (30, 30, 30)
GAP = 2  # pixels between frames
LINE_HEIGHT = 16  # pixels per line of text
FONT_SIZE = 12
MAX_PIXELS = 100_000_000
OVER_TIME = 8
"""Maximum number of sheets to compare."""
ROWS = "rows"
"""Name of a sheet's PNG text chunk, which holds [top, bottom] of each row, caption included, as JSON."""
FONT_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts"),
    *("~/.local/share/fonts", "~/.fonts", "~/Library/Fonts"),
    *("/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts"),
)
CJK_FONTS = (
    *("notosanscjk", "notosanssc", "sourcehansans", "wqy", "droidsansfallback"),
    *("pingfang", "stheiti", "msyh", "simsun"),
)


def contact_sheet(
    path: str | Path, rows: Sequence[NDArray[np.uint8]], captions: Sequence[str] | None = None, *, scale: int = 1
) -> None:
    """Write a .png with one row per clip (N, H, W, 3) uint8, its caption above it. Rows may differ in length and size.

    `scale` repeats pixels. A caption that no installed font can draw is written as `[caption 2]`, counted from 1.
    Raises: ValueError if there is nothing to draw, or too much.
    """
    if not rows or any(row.ndim != 4 or not row.size for row in rows):
        raise ValueError("no frames to draw; expected rows of frames (N, H, W, 3)")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"{len(captions)} captions for {len(rows)} rows of frames; expected one each")
    text_height = LINE_HEIGHT + GAP if captions is not None else 0
    width = max(len(row) * (row.shape[2] * scale + GAP) for row in rows) + GAP
    height = sum(row.shape[1] * scale + text_height + GAP for row in rows) + GAP
    if width * height > MAX_PIXELS:
        raise ValueError(f"a contact sheet of {width}x{height} pixels is too large; draw fewer rows or frames")
    sheet = Image.new("RGB", (width, height), PAPER)
    draw, top, bounds = ImageDraw.Draw(sheet), GAP, []
    for index, row in enumerate(rows):
        bounds.append((top, top + text_height + row.shape[1] * scale + GAP))
        if captions is not None:
            draw.text((GAP, top), *_drawable(captions[index], index + 1, width))
            top += text_height
        for column, frame in enumerate(row.repeat(scale, axis=1).repeat(scale, axis=2)):
            sheet.paste(Image.fromarray(frame), (GAP + column * (frame.shape[1] + GAP), top))
        top += row.shape[1] * scale + GAP
    places = PngInfo()
    places.add_text(ROWS, json.dumps(bounds))
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG", pnginfo=places)


def sheets_over_time(path: str | Path, sheets: Sequence[Path]) -> None:
    """Write a .png that stacks the versions of each row from several sheets, omitting those with unchanged pixels.

    `sheets` come from `contact_sheet`, oldest first; those with other rows than the last are left out. Of many,
    OVER_TIME evenly spaced ones are used. Writes nothing if fewer than two are left, or the picture would be too large.
    """
    layouts = [_layout(sheet) for sheet in sheets]
    alike = [sheet for sheet, layout in zip(sheets, layouts, strict=True) if layout[1] and layout == layouts[-1]]
    if len(alike) < 2:
        return
    places = np.linspace(0, len(alike) - 1, min(len(alike), OVER_TIME)).round().astype(int)
    pictures = [np.asarray(Image.open(alike[place]).convert("RGB")) for place in places]
    strips: list[NDArray[np.uint8]] = []
    for top, bottom in json.loads(layouts[-1][1]):
        of_row = [picture[top:bottom] for picture in pictures]
        strips += [strip for n, strip in enumerate(of_row) if n == 0 or not np.array_equal(strip, of_row[n - 1])]
    if sum(strip.size for strip in strips) > 3 * MAX_PIXELS:
        return
    with atomic_write(path) as temporary:
        Image.fromarray(np.concatenate(strips)).save(temporary, "PNG")


def _layout(sheet: Path) -> tuple[int, str]:
    """A sheet's width, and its rows as `contact_sheet` wrote them, or "" if it has none."""
    with Image.open(sheet) as image:
        return image.width, str(image.info.get(ROWS, ""))


def _drawable(caption: str, number: int, width: int) -> tuple[str, tuple[int, int, int], Font]:
    """A caption truncated to `width`, its colour, and a font that has all of its letters.

    If no font has them, `[caption number]` replaces the part from the first missing letter on.
    """
    text = " ".join(caption.split())[: 4 * width]  # far more than fits; measuring long texts is slow
    fonts = _fonts()
    font = next((font for font in fonts if _first_missing(font, text) is None), None)
    if font is None:
        font = fonts[0]
        text = f"{text[: _first_missing(font, text)]}[caption {number}]"
    while text and font.getlength(text) > width - 2 * GAP:
        text = text[: max(0, min(len(text) - 2, int(len(text) * width / font.getlength(text))))] + "…"
        if text == "…":
            break
    return text, INK, font


def _first_missing(font: Font, text: str) -> int | None:
    """Index of the first letter that `font` draws as its missing-glyph box; None if it has all of them."""
    box = bytes(font.getmask("\uffff"))  # a noncharacter, which no font has
    return next(
        (i for i, letter in enumerate(text) if not letter.isspace() and bytes(font.getmask(letter)) == box), None
    )


@cache
def _fonts() -> tuple[Font, ...]:
    """Pillow's font, matplotlib's (accents, Greek, Cyrillic), and a system font with Chinese if there is one."""
    fonts: list[Font] = [ImageFont.load_default(size=FONT_SIZE)]
    dejavu = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    system = (path for folder in map(Path, FONT_FOLDERS) for path in sorted(folder.expanduser().rglob("*.[to]t[cf]")))
    chinese = [path for path in system if path.stem.lower().replace("-", "").startswith(CJK_FONTS)]
    chinese.sort(key=lambda path: "bold" in path.stem.lower())  # prefer a regular weight; the sort is stable
    for candidates in ([dejavu], chinese):
        for path in candidates:
            try:
                fonts.append(ImageFont.truetype(str(path), FONT_SIZE))
            except OSError:
                continue  # a broken or missing font file; another may do
            break
    return tuple(fonts)
