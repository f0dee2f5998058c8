"""A report as one self-contained HTML file: text, commands, tables, histograms and pictures.

Nothing is fetched from elsewhere. All text is escaped. The content is up to the caller.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from cogvideo.files import atomic_write

MIME = {".png": "image/png", ".gif": "image/gif", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
MAX_PICTURE_BYTES = 16 << 20

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --mute: #888; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; }
pre { background: var(--soft); padding: .75rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .82rem; }
.scroll { overflow-x: auto; margin-bottom: 1rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
td.bar { min-width: 18rem; }
td.bar i { display: block; height: .8rem; background: #58a; border-radius: 2px; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; border-radius: 4px; }
img.pixels { image-rendering: pixelated; }
figcaption { color: var(--mute); font-size: .85rem; margin-top: .3rem; overflow-wrap: anywhere; }
"""


class HtmlReport:
    """Collects parts in the order they are added; `write` makes the file."""

    def __init__(self, title: str, language: str = "en") -> None:
        self._title = title
        self._language = language
        self._parts = [f"<h1>{escape(title)}</h1>"]

    def section(self, title: str) -> None:
        self._parts.append(f"<h2>{escape(title)}</h2>")

    def text(self, paragraph: str) -> None:
        self._parts.append(f"<p>{escape(paragraph)}</p>")

    def preformatted(self, text: str) -> None:
        """Add commands, logs or tables that are already aligned."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Add a table; its first row is the header."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
        self._parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def histogram(self, name: str, counts: Sequence[tuple[str, int]]) -> None:
        """Add counts by label as horizontal bars. `name` says what the labels are."""
        most = max((count for _, count in counts), default=0) or 1
        rows = "".join(
            f'<tr><td>{escape(label)}</td><td>{count:,}</td><td class="bar">'
            f'<i style="width:{100 * count / most:.1f}%"></i></td></tr>'
            for label, count in counts
        )
        head = f"<th>{escape(name)}</th><th>count</th><th></th>"
        self._parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        )

    def pictures(self, pictures: Sequence[tuple[Path, str]], width: int | None = None) -> None:
        """Add picture files side by side, each with its caption.

        `width` in CSS pixels enlarges pictures so that their pixels show as squares; None keeps each one's own size.
        Raises: ValueError for a file that is too large or of an unknown type; OSError for a missing one.
        """
        size = "" if width is None else f' class="pixels" style="width:{int(width)}px"'
        box = "" if width is None else f' style="width:{int(width)}px"'
        figures = "".join(
            f'<figure{box}><img src="{_inline(path)}" alt="{escape(caption, quote=True)}"{size}>'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for path, caption in pictures
        )
        self._parts.append(f'<div class="pictures">{figures}</div>')

    def html(self) -> str:
        body = "\n".join(self._parts)
        return (
            f'<!doctype html>\n<html lang="{escape(self._language, quote=True)}">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            # Forbids loading anything from outside, should a part ever try to.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
            "style-src 'unsafe-inline'\">\n"
            f"<title>{escape(self._title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the page atomically. Raises: OSError if the folder cannot be written."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")


def _inline(path: Path) -> str:
    """A picture as a data URI."""
    mime = MIME.get(path.suffix.lower())
    if mime is None:
        raise ValueError(f"{path} is not a picture that browsers show; expected one of {', '.join(MIME)}")
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; a report takes pictures of at most {MAX_PICTURE_BYTES}"
        )
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
