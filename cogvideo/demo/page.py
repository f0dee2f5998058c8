"""The page itself, with gradio: widgets, and how they are wired to a studio. It decides nothing about clips.

All that it needs comes with gradio; a browser is told (`GuardedApp`) to fetch nothing from anywhere else.
"""

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, get_args

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when imported

import gradio as gr
from gradio.themes.utils.fonts import Font
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cogvideo.config import to_dict
from cogvideo.demo import look
from cogvideo.demo.form import MAIN, PARTS, STYLE, Setting, settings_of
from cogvideo.demo.studio import Ask, Studio, Use
from cogvideo.logs import one_line

MAX_UPLOAD = "64mb"
QUEUE = 64
"""Asks that wait behind those being made; more are turned away."""
UPLOADS_KEPT = 3600
"""Seconds."""
USES: dict[str, Use] = dict(
    zip(("begin with its first frame", "go on where it ends", "fill in between its frames"), get_args(Use), strict=True)
)
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'"
)


@dataclass(frozen=True)
class GuardedApp:
    """gradio's server, told to browsers as one that needs no other; and kept from fetching addresses for visitors."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
            await send(message)

        if "file=http" in scope.get("path", ""):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"files of this server only"})
        else:
            await self.app(scope, receive, guarded)


@contextmanager
def served(
    studio: Studio, *, about: str, examples: Sequence[str], host: str, port: int, share: bool, at_once: int
) -> Iterator[str]:
    """Serve a page for as long as the context lasts; yields its address.

    `about`: a line on what the model is and can. `at_once`: asks being made, the next ones wait.
    Raises: OSError if the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="cogvideo-demo-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = build_page(studio, about, examples, at_once)
        try:
            _, address, public = page.launch(
                **{"server_name": host, "server_port": port, "share": share, "quiet": True, "prevent_thread_lock": True},
                theme=gr.themes.Soft(font=Font("system-ui"), font_mono=Font("monospace")),
                css=look.CSS,
                allowed_paths=[str(studio.out.resolve())],
                max_file_size=MAX_UPLOAD,
                app_kwargs={"middleware": [Middleware(GuardedApp)]},
                **{"footer_links": ["api"], "run_history": False, "enable_monitoring": False, "ssr_mode": False},
                **{"pwa": False, "mcp_server": False},
            )
            yield public or address
        finally:
            studio.close()
            page.close(verbose=False)


def build_page(studio: Studio, about: str, examples: Sequence[str], at_once: int) -> gr.Blocks:
    values = to_dict(studio.config)
    names: list[str] = []
    widgets: list[Any] = []

    def ask_for(*settings: Setting) -> None:
        for setting in settings:
            names.append(setting.name)
            widgets.append(_widget(setting, values))

    with gr.Blocks(title="CogVideo", analytics_enabled=False, delete_cache=(UPLOADS_KEPT, UPLOADS_KEPT)) as page:
        gr.HTML(f'<div class="cv-head"><h1>CogVideo</h1><p>{escape(about)}</p></div>')
        with gr.Row():
            with gr.Column(scale=5):
                prompts = gr.Textbox(
                    label="Prompt", info="several: one a line", lines=2, max_lines=16, autofocus=True, elem_id="prompt"
                )
                if examples:
                    gr.Examples([[one] for one in examples], inputs=[prompts], label="Click to try")
                with gr.Row():
                    ask_for(*MAIN[:2])
                with gr.Row():
                    ask_for(*MAIN[2:])
                with gr.Accordion("Begin with a picture or a video", open=False):
                    file = gr.File(
                        label="Picture, video, or tokens downloaded here",
                        file_types=["image", "video", ".safetensors"],
                        height=120,
                    )
                    use = gr.Radio(list(USES), value=next(iter(USES)), label="What to do with it")
                with gr.Accordion("Finer settings", open=False):
                    ask_for(STYLE)
                    for part, label in PARTS.items():
                        gr.Markdown(f"**{label}**")
                        with gr.Row():
                            ask_for(*settings_of(part))
                upsample = gr.Checkbox(label="Super-resolution afterwards", visible=studio.upsampler is not None)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary")
                    stop = gr.Button("Stop", variant="stop")
                    reseed = gr.Button("New seed")
            with gr.Column(scale=7):
                line = gr.HTML()
                clips = gr.HTML(look.EMPTY)

        def generate(prompts: str, file: str | None, use: str, upsample: bool, *settings: Any) -> Iterator[Any]:
            ask = Ask(
                prompts or "",
                dict(zip(names, settings, strict=True)),
                None if file is None else Path(file),
                USES[use],
                upsample,
            )
            looked_at = None
            try:
                for shown in studio.make(ask):
                    look_again = (shown.folder, shown.written, shown.finished) != looked_at
                    looked_at = (shown.folder, shown.written, shown.finished)
                    yield look.progress(shown), look.cards(shown) if look_again else gr.skip()
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                raise gr.Error(escape(one_line(error)), duration=None, title="", print_exception=False) from None

        inputs = {"prompts": prompts, "file": file, "use": use, "upsample": upsample}
        inputs |= dict(zip((name.replace(".", "_") for name in names), widgets, strict=True))
        # gradio's clients call it with these names, and may leave any out
        generate.__signature__ = Signature(  # type: ignore[attr-defined]
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=made.value) for name, made in inputs.items()
        )
        making = gr.on(
            [go.click, prompts.submit],
            generate,
            list(inputs.values()),
            [line, clips],
            api_name="generate",
            concurrency_limit=at_once,
            show_progress="minimal",
        )
        stop.click(lambda: "Stopped. What was made is kept.", None, line, cancels=[making], api_visibility="private")
        reseed.click(lambda: random.randrange(2**31), None, widgets[0], queue=False, api_visibility="private")
    page.queue(max_size=QUEUE)
    return page


def _widget(setting: Setting, values: dict[str, Any]) -> Any:
    value: Any = values
    for name in setting.name.split("."):
        value = value[name]
    look = {"label": setting.label, "info": setting.info, "value": value, "min_width": 110}
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), **look)
    whole = {"precision": 0, "step": 1} if setting.kind == "integer" else {"step": 0.05}
    return gr.Number(minimum=setting.least, maximum=setting.most, **whole, **look)
