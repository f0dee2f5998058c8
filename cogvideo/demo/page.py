"""The page itself, with gradio: its settings, its widgets, and their connection to a `DemoService`.

What a request may do is decided in service.py.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from cogvideo.config import to_dict
from cogvideo.demo.html import EMPTY, IDLE, clip_cards, progress_line
from cogvideo.demo.service import DemoService, FileUse, Request
from cogvideo.logs import one_line
from cogvideo.sampling.config import MAX_ROUNDS, STYLES

MAX_WAITING = 64
"""Requests that wait while others run; further ones are rejected."""
UPLOAD_SECONDS = 3600
"""How long uploads are kept."""
FILE_USES: dict[str, FileUse] = {
    "start with its first frame": "first frame",
    "continue from its end": "continue",
    "interpolate its frames": "interpolate",
}


@dataclass(frozen=True)
class Setting:
    """One field of `SampleConfig`, by its dotted name, and how the page asks for it. An empty value means null."""

    name: str
    label: str
    kind: Literal["integer", "number", "optional number", "choice"]
    info: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()


MAIN_SETTINGS = (
    Setting("seed", "Seed", "integer", "the same seed gives the same clip", 0),
    Setting("seconds", "Seconds", "number", "from the first frame to the last", 0.1),
    Setting("rounds", "Rounds", "integer", "of interpolation: 5, 9, 17, 33 frames", 0, MAX_ROUNDS),
    Setting("samples_per_prompt", "Samples", "integer", "per prompt", 1),
)
STYLE_SETTING = Setting("style", "Style of the first frame", "choice", choices=tuple(STYLES))
STAGES = {"first_frame": "First frame", "key_frames": "Key frames", "interpolation": "Interpolation"}


def draw_settings(stage: str) -> tuple[Setting, ...]:
    """How the tokens of a stage, a key of STAGES, are drawn."""
    return (
        Setting(f"{stage}.temperature", "Temperature", "number", "of the choice of a cluster", 0),
        Setting(f"{stage}.top_k_clusters", "Top-k clusters", "integer", "to choose among", 1),
        Setting(f"{stage}.token_temperature", "Token temperature", "number", "within a cluster", 0),
        Setting(f"{stage}.guidance_scale", "Guidance scale", "optional number", "empty: no guidance"),
        Setting(f"{stage}.text_bonus", "Text bonus", "optional number", "in attention; empty: as published"),
    )


def build_page(service: DemoService, about: str, examples: Sequence[str], max_running: int) -> gr.Blocks:
    """Build the page; arguments as in `server.serve`."""
    values = to_dict(service.config)
    names: list[str] = []
    widgets: list[Any] = []

    def add_widgets(*settings: Setting) -> None:
        for setting in settings:
            names.append(setting.name)
            widgets.append(_widget(setting, values))

    with gr.Blocks(title="CogVideo", analytics_enabled=False, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)) as page:
        gr.HTML(f'<div class="cv-head"><h1>CogVideo</h1><p>{escape(about)}</p></div>')
        with gr.Row():
            with gr.Column(scale=5):
                prompts = gr.Textbox(
                    label="Prompt", info="one per line", lines=2, max_lines=16, autofocus=True, elem_id="prompt"
                )
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=110)
                    stop = gr.Button("Stop", variant="stop", min_width=110)
                    new_seed = gr.Button("New seed", min_width=110)
                if examples:
                    gr.Examples([[example] for example in examples], inputs=[prompts], label="Examples")
                with gr.Row():
                    add_widgets(*MAIN_SETTINGS[:2])
                with gr.Row():
                    add_widgets(*MAIN_SETTINGS[2:])
                with gr.Accordion("Start from a picture or a video", open=False):
                    file = gr.File(
                        label="Picture, video, or tokens downloaded here",
                        file_types=["image", "video", ".safetensors"],
                        height=120,
                    )
                    file_use = gr.Radio(list(FILE_USES), value=next(iter(FILE_USES)), label="What to do with it")
                with gr.Accordion("More settings", open=False):
                    add_widgets(STYLE_SETTING)
                    for stage, label in STAGES.items():
                        gr.Markdown(f"**{label}**")
                        with gr.Row():
                            add_widgets(*draw_settings(stage))
                upsample = gr.Checkbox(label="Super-resolution afterwards", visible=service.upsampler is not None)
            with gr.Column(scale=7):
                line = gr.HTML(IDLE, elem_id="line")
                clips = gr.HTML(EMPTY)

        def generate(prompts: str, file: str | None, use: str, upsample: bool, *settings: Any) -> Iterator[Any]:
            chosen = {name: None if value == "" else value for name, value in zip(names, settings, strict=True)}
            upload = None if file is None else Path(file)
            request = Request(prompts or "", chosen, upload, FILE_USES[use], upsample)
            shown = None
            try:
                for progress in service.run(request):
                    cards = clip_cards(progress)
                    yield progress_line(progress), gr.skip() if cards == shown else cards
                    shown = cards
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                raise gr.Error(escape(one_line(error)), duration=None, title="", print_exception=False) from None

        inputs = {"prompts": prompts, "file": file, "use": file_use, "upsample": upsample}
        inputs |= dict(zip((name.replace(".", "_") for name in names), widgets, strict=True))
        # gradio's clients pass arguments by these names, and may leave out any
        generate.__signature__ = Signature(  # type: ignore[attr-defined]
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=widget.value) for name, widget in inputs.items()]
        )
        running = gr.on(
            [start.click, prompts.submit],
            generate,
            list(inputs.values()),
            [line, clips],
            api_name="generate",
            concurrency_limit=max_running,
            show_progress="minimal",
            show_progress_on=line,
        )
        stop.click(lambda: "Stopped. Finished files are kept.", None, line, cancels=[running], api_visibility="private")
        new_seed.click(lambda: random.randrange(2**31), None, widgets[0], queue=False, api_visibility="private")
    page.queue(max_size=MAX_WAITING)
    return page


def _widget(setting: Setting, values: dict[str, Any]) -> Any:
    value: Any = values
    for name in setting.name.split("."):
        value = value[name]
    options = {"label": setting.label, "info": setting.info, "value": value, "min_width": 130}
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), **options)
    if setting.kind == "optional number":  # gr.Number shows, and then sends, 0 for an empty value
        return gr.Textbox(**{**options, "value": "" if value is None else f"{value:g}"})
    step = {"precision": 0, "step": 1} if setting.kind == "integer" else {"step": 0.05}
    return gr.Number(minimum=setting.minimum, maximum=setting.maximum, **step, **options)
