"""What a visitor sees while clips are made, as HTML: a line of progress, and a card for each clip."""

from html import escape
from pathlib import Path
from urllib.parse import quote

from cogvideo.demo.service import Shown

CSS = """
.cv-head { margin: .5rem 0 0 } .cv-head h1 { font-size: 1.7rem; margin: 0 } .cv-head p { margin: .3rem 0; opacity: .75 }
.cv-line { min-height: 2.2rem; font-variant-numeric: tabular-nums }
.cv-line progress { width: 100%; height: .5rem; accent-color: var(--color-accent) }
#line .error, #line .clear-status { display: none }
.cv-clips { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)) }
.cv-clips figure { margin: 0; max-width: 540px; padding: .8rem; border-radius: .8rem;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill) }
.cv-clips video { display: block; width: 100%; max-width: 480px; margin: 0 auto; border-radius: .4rem }
.cv-clips video { image-rendering: pixelated }
.cv-clips img { display: block; max-width: 100%; margin: .6rem auto 0; border-radius: .2rem }
.cv-clips figcaption { margin-bottom: .5rem; font-weight: 600 }
.cv-clips nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin-top: .6rem; font-size: .9rem }
.cv-clips nav a { text-decoration: underline }
.cv-empty { padding: 4rem 1rem; text-align: center; opacity: .6; border-radius: .8rem;
  border: 1px dashed var(--border-color-primary) }
"""
IDLE = '<div class="cv-line"></div>'
EMPTY = '<div class="cv-empty">Clips appear here: first a frame, then all of them, smoother after every round.</div>'


def progress(shown: Shown) -> str:
    """How far it is: tokens drawn, tokens a second, time left."""
    where = escape(f"{shown.folder.parent.name}/{shown.folder.name}")
    if shown.finished:
        return f'<div class="cv-line">{shown.plan}, done. Kept in {where}</div>'
    rate = shown.drawn / shown.seconds if shown.seconds else 0.0
    words = f"{shown.plan}: {shown.drawn:,} of {shown.total:,} tokens"
    if rate:
        words += f", {rate:,.0f} a second, {clock((shown.total - shown.drawn) / rate)} left"
    return f'<div class="cv-line"><progress max="{shown.total}" value="{shown.drawn}"></progress>{words}</div>'


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:30`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def cards(shown: Shown) -> str:
    """Each clip's video, or what there is of it, its contact sheet and its files."""
    made = "".join(_card(shown, caption, name) for caption, name in zip(shown.captions, shown.names, strict=True))
    return f'<div class="cv-clips">{made}</div>'


def _card(shown: Shown, caption: str, name: str) -> str:
    video, gif, sheet = (shown.folder / f"{name}{ending}" for ending in (".mp4", ".gif", ".png"))
    links = {"video": video, "GIF": gif, "frames": sheet}
    if shown.finished:
        links |= {"tokens": shown.folder / "tokens.safetensors", "settings": shown.folder / "config.yaml"}
    inner = f"<figcaption>{escape(caption)}</figcaption>"
    if video in shown.files:
        inner += f'<video src="{_address(shown, video)}" autoplay loop muted playsinline controls></video>'
    if sheet in shown.files:
        inner += f'<img src="{_address(shown, sheet)}" alt="frames of the clip">'
    inner += "<nav>" + "".join(
        f'<a href="{_address(shown, path)}" download="{escape(path.name)}">{label}</a>'
        for label, path in links.items()
        if path in shown.files
    )
    return f"<figure>{inner}</nav></figure>"


def _address(shown: Shown, path: Path) -> str:
    """Below the page's own; another one after each change, so that a browser looks again."""
    return f"gradio_api/file={quote(str(path.resolve()))}?{shown.files[path]}"
