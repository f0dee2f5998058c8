"""MkDocs hook: write the reference pages from the package when the site is built.

`reference/commands.md` holds every command's help text; `reference/config.md` every config key with its type, default
and docstring; `reference/python.md` the signatures and docstrings of the public API. None of them is stored.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import os
import re
import textwrap
import typing
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from cogvideo.cli.main import COMMANDS
from cogvideo.config import to_dict
from cogvideo.data.prepare import PrepareConfig
from cogvideo.planning.budgets import TrainingSettings
from cogvideo.sampling.config import SampleConfig, UpsampleConfig
from cogvideo.training.config import TrainConfig

CONFIGS: tuple[tuple[str, type, str], ...] = (
    ("cogvideo train", TrainConfig, ""),
    ("cogvideo prepare and check", PrepareConfig, ""),
    ("cogvideo sample, interpolate, eval and demo", SampleConfig, ""),
    ("cogvideo upsample; `upsample.*` of cogvideo sample --upsample", UpsampleConfig, ""),
    ("cogvideo inspect: the planner", TrainingSettings, "training."),
)
API: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Sampling", ("sampling.pipeline.Pipeline", "sampling.config.SampleConfig", "sampling.pipeline.StageOutput")),
    ("Super-resolution", ("sampling.superres.Upsampler", "sampling.config.UpsampleConfig")),
    ("Given frames", ("sampling.jobs.clip_job", "sampling.inputs.InputReader", "sampling.inputs.InputClips")),
    (
        "Decoding",
        (
            "inference.engine.Engine",
            "inference.engine.build_program",
            "inference.engine.Conditioning",
            "inference.sampler.ClusterSampler",
        ),
    ),
    (
        "Models and checkpoints",
        (
            "model.config.ModelConfig",
            "model.transformer.CogVideoTransformer",
            "checkpoint.load.load_model",
            "checkpoint.load.save_model",
            "checkpoint.load.from_pretrained",
        ),
    ),
    ("Tokenizers", ("tokenizers.image.ImageTokenizer", "tokenizers.text.TextTokenizer")),
    (
        "Data",
        (
            "data.dataset.ClipDataset",
            "data.dataset.InMemoryClips",
            "data.dataset.FrameDataset",
            "data.dataset.PairDataset",
            "data.loader.ClipLoader",
            "data.loader.LoaderConfig",
            "sequence.batch.Batch",
            "data.readers.open_captions",
            "data.captions.CaptionsFile",
            "data.captions.Caption",
        ),
    ),
    ("Training", ("training.launch.train", "training.config.TrainConfig")),
)
"""The public API by topic: classes, with their public methods, and functions."""
ON_CONFIG_PAGE = {"SampleConfig", "UpsampleConfig", "ModelConfig", "TrainConfig"}
API_INTRODUCTION = """What is meant to be imported; the [Python guide](../guides/python.md) shows most of it in use.
Other names may change at any time."""
INTRODUCTION = """Keys are set by `--config FILE` (repeatable; later files win) and by `key=value` on the command line,
which wins over files. A file may name others as its `base:`. An unknown key is an error that names the nearest known
one. `null` stands for "not set"."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages (MkDocs calls this)."""
    for name, text in (("commands", commands_page()), ("config", config_page()), ("python", python_page())):
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def commands_page() -> str:
    """Every command's `--help`."""
    os.environ["COLUMNS"] = "100"  # argparse wraps at this width
    parts = ["# Commands", "Bad input gives one line on standard error and exit code 2."]
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"cogvideo.cli.{name}")
        parser = argparse.ArgumentParser(
            prog=f"cogvideo {name}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        parts += [f"## cogvideo {name}", f"{summary[0].upper()}{summary[1:]}.", fenced(parser.format_help())]
    return "\n\n".join(parts) + "\n"


def fenced(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def config_page() -> str:
    """Every config key of every command."""
    parts = ["# Config keys", INTRODUCTION]
    for title, cls, prefix in CONFIGS:
        parts += [f"## {title}", first_paragraph(cls), *groups(cls, to_dict(cls()), prefix)]
    return "\n\n".join(parts) + "\n"


def groups(cls: type, defaults: dict[str, Any], prefix: str) -> list[str]:
    """A table of the plain keys of a config class, then the same for each nested class."""
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    rows, nested = [], []
    for field in dataclasses.fields(cls):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            text = docs.get(field.name) or first_paragraph(hint)
            nested += [f"### `{key}.*`", text, *groups(hint, defaults[field.name], f"{key}.")]
        else:
            shown = ["`" + key + "`", type_name(hint), "`" + default(defaults[field.name]) + "`"]
            rows.append("| " + " | ".join([*shown, docs.get(field.name, "").replace("|", "\\|")]) + " |")
    if not rows:
        return nested
    head = ["| key | type | default | |", "|---|---|---|---|"]
    return ['<div class="keys" markdown>', "\n".join([*head, *rows]), "</div>", *nested]


def field_docs(cls: type) -> dict[str, str]:
    """The string literal below each field, by the field's name."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node, after in zip(tree.body, tree.body[1:], strict=False):
        match node, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = one_line(text)
    return found


def first_paragraph(cls: type) -> str:
    return one_line((cls.__doc__ or "").split("\n\n")[0])


def one_line(text: str) -> str:
    return " ".join(text.split())


def type_name(hint: Any) -> str:
    """A type as a reader of YAML would say it."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin in (list, tuple):
        return f"list of {type_name(members[0])}"
    if members:  # a union
        return " or ".join(type_name(member) for member in members)
    names = {Path: "path", str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(default(item) for item in value) + "]"
    return str(value)


def python_page() -> str:
    """Signature and docstring of everything in API."""
    parts = ["# Python reference", API_INTRODUCTION]
    for topic, names in API:
        parts.append(f"## {topic}")
        for path in names:
            module, _, name = f"cogvideo.{path}".rpartition(".")
            member = getattr(importlib.import_module(module), name)
            parts += [f"### {name}", f"`from {module} import {name}`"]
            parts += class_entry(member) if isinstance(member, type) else [signature(member, name), prose(member)]
    return "\n\n".join(parts) + "\n"


def class_entry(cls: type) -> list[str]:
    """Docstring, fields or constructor, then every public method and property that the class itself defines."""
    parts = [prose(cls)]
    if cls.__name__ in ON_CONFIG_PAGE:
        return [*parts, "Fields: [Config keys](config.md)."]
    if "__init__" in vars(cls) and not dataclasses.is_dataclass(cls):
        parts += [signature(cls.__init__, cls.__name__), prose(cls.__init__)]
    elif docs := typing.get_type_hints(cls):
        meanings = field_docs(cls)
        rows = [f"| `{name}` | `{annotation(hint)}` | {meanings.get(name, '')} |" for name, hint in docs.items()]
        parts.append("\n".join(["| field | type | |", "|---|---|---|", *rows]))
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))  # of class methods and properties
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        is_property = isinstance(member, property)
        parts += [signature(function, f"{cls.__name__}.{name}", is_property=is_property), prose(function)]
    return [part for part in parts if part]


def annotation(hint: Any) -> str:
    """A type hint as it is written."""
    shown = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return shown.replace("|", "or")  # a bar would end the table's cell


def prose(member: Any) -> str:
    """A docstring as Markdown, with shapes and errors in paragraphs of their own."""
    return re.sub(
        r"(?<!\n)\n(?=(Shapes|Raises|Source|Returns): |Raises )", "\n\n", inspect.cleandoc(member.__doc__ or "")
    )


def signature(function: Any, name: str, *, is_property: bool = False) -> str:
    """`name(arguments) -> result` as in the source, an argument per line where it is long."""
    node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body[0]
    assert isinstance(node, ast.FunctionDef)
    node.args.args = [argument for argument in node.args.args if argument.arg not in ("self", "cls")]
    result = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    result = result.replace("'", "")  # forward references
    arguments = split_arguments(ast.unparse(node.args).replace("'", '"'))
    text = f"{name}{result}" if is_property else f"{name}({', '.join(arguments)}){result}"
    if len(text) > 100:
        lines = "".join(f"    {argument},\n" for argument in arguments)
        text = f"{name}(\n{lines}){result}"
    return f"```python\n{text}\n```"


def split_arguments(text: str) -> list[str]:
    """Split at the commas that are in no brackets, and put blanks around `=` after a type."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [re.sub(r"(: [^=]*)=", r"\1 = ", part.strip()) for part in parts]
