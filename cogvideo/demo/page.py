"""The page itself, built with gradio: its settings, its widgets, and their connection to a `DemoService`.

What a request may do is decided in service.py, and when it runs in places.py.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html import escape
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from cogvideo.config import to_dict
from cogvideo.demo.guard import UPLOAD_SECONDS
from cogvideo.demo.html import EMPTY, IDLE, clip_cards, notes, progress_line, waiting_line
from cogvideo.demo.places import Places, RefusedError
from cogvideo.demo.service import DemoService, FileUse, Progress, Request
from cogvideo.demo.weights import ServedWeights
from cogvideo.logs import one_line
from cogvideo.sampling.config import MAX_ROUNDS, STYLES

Log = Callable[[str, str], None]
"""Called with a visitor and what happened to a request of theirs."""

MAX_THREADS = 512
"""Requests that gradio handles at the same time, waiting ones included; of those, places.py lets a few run."""
POLL_SECONDS = 0.1
"""Interval at which a request is checked for a place."""
SHOW_SECONDS = 1.0
"""Interval between messages about a request's position in the queue."""
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
    """Settings for drawing the tokens of a stage, a key of STAGES."""
    return (
        Setting(f"{stage}.temperature", "Temperature", "number", "for choosing a cluster", 0),
        Setting(f"{stage}.top_k_clusters", "Top-k clusters", "integer", "to choose from", 1),
        Setting(f"{stage}.token_temperature", "Token temperature", "number", "within a cluster", 0),
        Setting(f"{stage}.guidance_scale", "Guidance scale", "optional number", "empty: no guidance"),
        Setting(f"{stage}.text_bonus", "Text bonus", "optional number", "in attention; empty: as published"),
    )


def build_page(service: DemoService, places: Places, *, root: str, log: Log, log_prompts: bool) -> gr.Blocks:
    """Build the page. `root`: its public path or address behind a proxy.

    The guard (guard.py) puts the visitor's address into the scope of every request.
    """
    default = next(iter(service.weights))
    first = service.weights[default]
    threads = ThreadPoolExecutor(2 * service.limits.running, "page")
    shown_settings: list[Setting] = []
    widgets: list[Any] = []
    example_rows: list[gr.Row] = []

    def add_widgets(*settings: Setting) -> None:
        for setting in settings:
            shown_settings.append(setting)
            widgets.append(_widget(setting, _shown(setting, first)))

    with gr.Blocks(title="CogVideo", analytics_enabled=False, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)) as page:
        head = gr.HTML(_head(first.about))
        with gr.Row():
            with gr.Column(scale=5):
                weights = gr.Radio(
                    list(service.weights),
                    value=default,
                    label="Weights",
                    visible=len(service.weights) > 1,
                    elem_id="weights",
                )
                prompts = gr.Textbox(
                    label="Prompt", info="one per line", lines=2, max_lines=16, autofocus=True, elem_id="prompt"
                )
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=110)
                    stop = gr.Button("Stop", variant="stop", min_width=110)
                    new_seed = gr.Button("New seed", min_width=110)
                for name, served in service.weights.items():
                    with gr.Row(visible=name == default and bool(served.examples)) as row:
                        if served.examples:
                            gr.Examples([[text] for text in served.examples], inputs=[prompts], label="Examples")
                    example_rows.append(row)
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
                adapters = gr.CheckboxGroup(
                    list(first.adapters),
                    value=list(first.adapters),
                    label="Adapters",
                    info="finetuned updates to the weights; selected ones are added together",
                    visible=bool(first.adapters),
                    elem_id="adapters",
                )
                upsample = gr.Checkbox(
                    label="Also make large clips", info=first.about_large, visible=first.upsampler is not None
                )
            with gr.Column(scale=7):
                line = gr.HTML(IDLE, elem_id="line")
                clips = gr.HTML(EMPTY)
                gr.HTML(notes(service.limits))
        with gr.Row(visible=False):  # for API clients: arguments left out default to the settings of the weights
            called = gr.Button()
            all_adapters = list(dict.fromkeys(name for served in service.weights.values() for name in served.adapters))
            chosen_adapters = gr.Dropdown(all_adapters, value=None, multiselect=True, label="Adapters")
            chosen_settings = [_widget(setting, None) for setting in shown_settings]

        async def generate(
            visit: gr.Request,
            prompts: str,
            file: str | None,
            use: str,
            upsample: bool,
            adapters: list[str] | None,
            weights: str,
            *settings: Any,
        ) -> AsyncIterator[Any]:
            visitor, start, end = str(visit.request.scope["visitor"] if visit.request else ""), time.monotonic(), "left"
            running: Generator[Progress, None, None] | None = None
            step: asyncio.Future[Progress | None] | None = None
            request = places.enter(visitor, visit.session_hash or "")
            try:
                shown = start
                while (ahead := places.poll(request)) != 0:
                    if ahead is not None and time.monotonic() - shown > SHOW_SECONDS:
                        shown = time.monotonic()
                        yield waiting_line(ahead), gr.skip()
                    await asyncio.sleep(POLL_SECONDS)
                chosen = {
                    setting.name: None if value == "" else value
                    for setting, value in zip(shown_settings, settings, strict=True)
                    if value is not None
                }
                upload = None if file is None else Path(file)
                running = service.run(
                    Request(prompts or "", chosen, upload, FILE_USES[use], upsample, adapters, weights)
                )
                old_cards = None
                while True:
                    step = asyncio.ensure_future(asyncio.wrap_future(threads.submit(next, running, None)))
                    if (progress := await asyncio.shield(step)) is None:
                        break
                    end, cards = progress.plan, clip_cards(progress, root)
                    yield progress_line(progress), gr.skip() if cards == old_cards else cards
                    old_cards = cards
            except (ValueError, OSError, RuntimeError, MemoryError) as error:
                end = "refused" if isinstance(error, RefusedError) else "failed"
                raise gr.Error(escape(one_line(error)), duration=None, title="", print_exception=False) from None
            finally:

                def leave(done: asyncio.Future[Any] | None = None) -> None:
                    if done is not None and not done.cancelled():
                        done.exception()  # marks it as retrieved: nobody is left to see it
                    if running is not None:
                        running.close()
                    places.leave(request)

                if step is not None and not step.done():  # the visitor left while a thread is in this step
                    step.add_done_callback(leave)
                else:
                    leave()
                text = f": {one_line(ValueError(prompts))}" if log_prompts and prompts else ""
                log(visitor, f"request {end}, {time.monotonic() - start:.1f} s{text}")

        inputs = {"prompts": prompts, "file": file, "use": file_use, "upsample": upsample}
        inputs |= {"adapters": chosen_adapters, "weights": weights}
        inputs |= {
            setting.name.replace(".", "_"): w for setting, w in zip(shown_settings, chosen_settings, strict=True)
        }
        # gradio's clients pass arguments by these names, and may leave out any
        generate.__signature__ = Signature(  # type: ignore[attr-defined]
            [
                Parameter("visit", Parameter.POSITIONAL_OR_KEYWORD, annotation=gr.Request),
                *(Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=w.value) for name, w in inputs.items()),
            ]
        )
        called.click(generate, list(inputs.values()), [line, clips], api_name="generate", concurrency_limit=None)
        running = gr.on(
            [start.click, prompts.submit],
            generate,
            [prompts, file, file_use, upsample, adapters, weights, *widgets],
            [line, clips],
            api_visibility="private",
            concurrency_limit=None,  # places.py applies the limits
            show_progress="minimal",
            show_progress_on=line,
        )
        stop.click(lambda: "Stopped. Finished files are kept.", None, line, cancels=[running], api_visibility="private")

        def choose(name: str) -> list[Any]:
            """Updates of all that the page shows about the weights."""
            served = service.weights[name]
            rows = [gr.update(visible=row == name and bool(served.examples)) for row in service.weights]
            available = list(served.adapters)
            return [
                _head(served.about),
                gr.update(choices=available, value=available, visible=bool(available)),
                gr.update(info=served.about_large, value=False, visible=served.upsampler is not None),
                *rows,
                *(_shown(setting, served) for setting in shown_settings),
            ]

        weights.input(
            choose, weights, [head, adapters, upsample, *example_rows, *widgets], queue=False, api_visibility="private"
        )
        new_seed.click(lambda: random.randrange(2**31), None, widgets[0], queue=False, api_visibility="private")
    page.max_threads = MAX_THREADS
    page.queue(max_size=None, api_open=False)
    return page


def _head(about: str) -> str:
    return f'<div class="cv-head"><h1>CogVideo</h1><p>{escape(about)}</p></div>'


def _shown(setting: Setting, served: ServedWeights) -> Any:
    """The value of a setting for these weights, as its widget shows it."""
    value: Any = to_dict(served.config)
    for name in setting.name.split("."):
        value = value[name]
    if setting.kind == "optional number":
        return "" if value is None else f"{value:g}"
    return value


def _widget(setting: Setting, value: Any) -> Any:
    options = {"label": setting.label, "info": setting.info, "value": value, "min_width": 130}
    if setting.kind == "choice":
        return gr.Dropdown(list(setting.choices), **options)
    if setting.kind == "optional number":  # gr.Number shows, and then sends, 0 for an empty value
        return gr.Textbox(**options)
    step = {"precision": 0, "step": 1} if setting.kind == "integer" else {"step": 0.05}
    return gr.Number(minimum=setting.minimum, maximum=setting.maximum, **step, **options)
