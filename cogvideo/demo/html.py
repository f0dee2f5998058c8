"""HTML that a visitor sees during generation: a progress line, and a card per clip."""

from html import escape
from pathlib import Path
from urllib.parse import quote

from cogvideo.demo.places import Limits
from cogvideo.demo.service import Progress

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
.cv-notes { margin-top: 1rem; font-size: .85rem; opacity: .7 }
.cv-empty { padding: 4rem 1rem; text-align: center; opacity: .6; border-radius: .8rem;
  border: 1px dashed var(--border-color-primary) }
"""
IDLE = '<div class="cv-line"></div>'
EMPTY = '<div class="cv-empty">Clips appear here: a first frame, then key frames, smoother after every round.</div>'


def progress_line(progress: Progress) -> str:
    """Tokens drawn, tokens per second, and time left."""
    folder = escape(str(_shown_path((progress.small or progress).folder)))
    if progress.finished:
        return f'<div class="cv-line">{progress.plan}, done. Saved in {folder}</div>'
    if progress.waiting:
        return f'<div class="cv-line">{progress.plan}: waiting for clips with other adapters</div>'
    drawn, total = progress.drawn_tokens, progress.total_tokens
    text = f"{progress.plan}{', large' if progress.small else ''}: {drawn:,} of {total:,} tokens"
    tokens_per_second = drawn / progress.seconds if progress.seconds else 0.0
    if tokens_per_second:
        text += f", {tokens_per_second:,.0f} per second, {clock((total - drawn) / tokens_per_second)} left"
    return f'<div class="cv-line"><progress max="{total}" value="{drawn}"></progress>{text}</div>'


def waiting_line(position: int) -> str:
    """A request's position in the queue, from 1."""
    return f'<div class="cv-line">Waiting: position {position} in the queue</div>'


def notes(limits: Limits) -> str:
    """What a visitor should know about the limits."""
    space = f"{limits.disk_bytes / 1e9:,.3g} GB" if limits.disk_bytes >= 10**9 else f"{limits.disk_bytes / 1e6:,.3g} MB"
    return (
        f'<div class="cv-notes">Download what you want to keep: once all results take more than {space}, '
        "the oldest are removed. Everyone who can open this page can see them.</div>"
    )


def _shown_path(folder: Path) -> Path:
    """The path below the working directory; for a folder elsewhere only its last two names, since visitors see it."""
    resolved, here = folder.resolve(), Path.cwd().resolve()
    return resolved.relative_to(here) if resolved.is_relative_to(here) else Path(*resolved.parts[-2:])


def clock(seconds: float) -> str:
    """Format a duration: `0:07`, `12:30`, `1:02:30`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def clip_cards(progress: Progress, root: str = "") -> str:
    """Each clip's video as far as it is generated, its contact sheet, and download links.

    `root`: the page's public path or address behind a proxy, without a trailing slash; if empty, links are relative.
    """
    cards = [
        _card(progress, root, caption, name) for caption, name in zip(progress.captions, progress.names, strict=True)
    ]
    return f'<div class="cv-clips">{"".join(cards)}</div>'


def _card(progress: Progress, root: str, caption: str, name: str) -> str:
    """The newest video and contact sheet, and links to all files: a line for the clip, then one for the large clip."""
    steps = [progress] if progress.small is None else [progress.small, progress]
    video = sheet = lines = ""
    for step in steps:
        files = {"video": f"{name}.mp4", "GIF": f"{name}.gif", "frames": f"{name}.png"}
        if step.finished:
            files |= {"tokens": "tokens.safetensors", "settings": "config.yaml"}
        urls = {
            label: _url(step, root, step.folder / file)
            for label, file in files.items()
            if step.folder / file in step.files
        }
        if "video" in urls:
            video = f'<video src="{urls["video"]}" autoplay loop muted playsinline controls></video>'
        if "frames" in urls:
            sheet = f'<img src="{urls["frames"]}" alt="frames of the clip">'
        title = "<span>large:</span>" if urls and step.small is not None else ""
        links = (f'<a href="{url}" download="{escape(files[label])}">{label}</a>' for label, url in urls.items())
        lines += f"<nav>{title}{''.join(links)}</nav>"
    return f"<figure><figcaption>{escape(caption)}</figcaption>{video}{sheet}{lines}</figure>"


def _url(progress: Progress, root: str, path: Path) -> str:
    """The URL of a file, which changes with every version of the file, so that browsers reload it."""
    return f"{escape(root + '/' if root else '')}gradio_api/file={quote(str(path.resolve()))}?{progress.files[path]}"
