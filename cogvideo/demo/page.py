"""The page itself, with gradio: widgets, and how they are wired to a studio. It decides nothing about clips."""

import random
from collections.abc import Iterator, Sequence
from html import escape
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from cogvideo.config import to_dict
from cogvideo.demo import html as look
from cogvideo.demo.form import MAIN, PARTS, STYLE, Setting, settings_of
from cogvideo.demo.service import Ask, Studio, Use
from cogvideo.logs import one_line

QUEUE = 64
"""Asks that wait behind those being made; more are turned away."""
UPLOADS_KEPT = 3600
"""Seconds."""
USES: dict[str, Use] = dict(
    zip(("begin with its first frame", "go on where it ends", "fill in between its frames"), get_args(Use), strict=True)
)


def build_page(studio: Studio, about: str, examples: Sequence[str], at_once: int) -> gr.Blocks:
    """All arguments as of `serve.served`."""
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
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", min_width=110)
                    stop = gr.Button("Stop", variant="stop", min_width=110)
                    reseed = gr.Button("New seed", min_width=110)
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
            with gr.Column(scale=7):
                line = gr.HTML(look.IDLE, elem_id="line")
                clips = gr.HTML(look.EMPTY)

        def generate(prompts: str, file: str | None, use: str, upsample: bool, *settings: Any) -> Iterator[Any]:
            chosen = {name: None if value == "" else value for name, value in zip(names, settings, strict=True)}
            ask = Ask(prompts or "", chosen, None if file is None else Path(file), USES[use], upsample)
            seen = None
            try:
                for shown in studio.make(ask):
                    cards = look.cards(shown)
                    yield look.progress(shown), gr.skip() if cards == seen else cards
                    seen = cards
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                raise gr.Error(escape(one_line(error)), duration=None, title="", print_exception=False) from None

        inputs = {"prompts": prompts, "file": file, "use": use, "upsample": upsample}
        inputs |= dict(zip((name.replace(".", "_") for name in names), widgets, strict=True))
        # gradio's clients call it with these names, and may leave any out
        generate.__signature__ = Signature(  # type: ignore[attr-defined]
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=made.value) for name, made in inputs.items()]
        )
        making = gr.on(
            [go.click, prompts.submit],
            generate,
            list(inputs.values()),
            [line, clips],
            api_name="generate",
            concurrency_limit=at_once,
            show_progress="minimal",
            show_progress_on=line,
        )
        stop.click(lambda: "Stopped. What was made is kept.", None, line, cancels=[making], api_visibility="private")
        reseed.click(lambda: random.randrange(2**31), None, widgets[0], queue=False, api_visibility="private")
    page.queue(max_size=QUEUE)
    return page


def _widget(setting: Setting, values: dict[str, Any]) -> Any:
    value: Any = values
    for name in setting.name.split("."):
        value = value[name]
    look = {"label": setting.label, "info": setting.info, "value": value, "min_width": 130}
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), **look)
    if setting.kind == "number or nothing":  # gradio's numbers show, and then send, 0 for nothing
        return gr.Textbox(**{**look, "value": "" if value is None else f"{value:g}"})
    whole = {"precision": 0, "step": 1} if setting.kind == "integer" else {"step": 0.05}
    return gr.Number(minimum=setting.least, maximum=setting.most, **whole, **look)
