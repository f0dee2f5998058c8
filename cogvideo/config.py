"""Typed configuration: frozen dataclasses filled from YAML files and `key=value` words.

Sources in order, later ones win: the dataclass's defaults, each file's `base:` files, the file itself, the command
line. Every mistake is a ValueError of one line that says where it is and what was expected. No field of any config is
named here: each part of the package has its own dataclass next to the code that uses it, with derived values as
properties.
"""

import dataclasses
import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")

MAX_FILE_BYTES = 1 << 20
OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(\.\w+)*)=(?P<value>.*)", re.DOTALL)


def load_config(cls: type[T], files: Sequence[Path | str] = (), overrides: Sequence[str] = ()) -> T:
    """Merge a dataclass's defaults, YAML files and `a.b=c` words into one instance.

    A file may name `base: other.yaml` (or a list), relative to its own folder; those are merged before it.
    Raises: ValueError for an unknown key, a wrong type, NaN or infinity, a missing value or unreadable YAML; OSError
    for a missing file.
    """
    sources: list[tuple[str, dict[str, Any]]] = []
    for file in files:
        sources += _read_with_bases(Path(file))
    known = _known_keys(cls)
    sources += [("command line", _parse_override(word, known)) for word in overrides]
    return _build(cls, sources)


def from_dict(cls: type[T], values: dict[str, Any], origin: str = "config") -> T:
    """The inverse of `to_dict`; errors start with `origin`, a file name for example.

    Values are literal: a stored config may come from anyone, so OmegaConf's `${...}` is refused.
    Raises: ValueError as for `load_config`.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{origin}: expected a mapping of settings, got {type(values).__name__}")
    for key, value in _leaves(values):
        if "${" in str(value):
            raise ValueError(f"{origin}: {key}={value!r} contains '${{', which is not allowed in a stored config")
    return _build(cls, [(origin, values)])


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, strings and numbers, for JSON or YAML."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def dump_yaml(config: Any) -> str:
    """A config as YAML text, from which `load_config` makes an equal config."""
    return yaml.safe_dump(to_dict(config), allow_unicode=True, sort_keys=False)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def _build(cls: type[T], sources: Sequence[tuple[str, dict[str, Any]]]) -> T:
    merged = OmegaConf.structured(cls)
    known = _known_keys(cls)
    for origin, values in sources:
        values = _wrap_single_strings(values, known)
        try:
            merged = OmegaConf.merge(merged, values)
        except (OmegaConfBaseException, ValueError):
            raise _explain(merged, origin, values, known) from None
    names = ", ".join(dict.fromkeys(origin for origin, _ in sources)) or "defaults"
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{names}: no value for {', '.join(missing)}; set it in a file or as {missing[0]}=...")
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{names}: {_first_line(error)}") from None
    assert isinstance(built, cls)
    for key, value in _leaves(to_dict(built)):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{names}: {key}={number}; expected a finite number")
    return built


def _explain(merged: Any, origin: str, values: dict[str, Any], known: dict[str, Any]) -> ValueError:
    """The error for values that failed to merge: merge them one at a time to find the one that does not fit."""
    for key, value in _leaves(values):
        try:
            OmegaConf.merge(merged, _nest(key, value))
        except ConfigKeyError:
            return ValueError(f"{origin}: unknown key '{key}'; {_suggest(key, known)}")
        except (OmegaConfBaseException, ValueError) as error:
            if any(other.startswith(f"{key}.") for other in known):
                example = next(other for other in known if other.startswith(f"{key}."))
                return ValueError(f"{origin}: {key}={value!r} does not fit; it is a group, set {example} and so on")
            expected = _type_name(known[key]) if key in known else _first_line(error)
            return ValueError(f"{origin}: {key}={value!r} does not fit; expected {expected}")
    raise AssertionError("the values merge one by one, but not all together")


def _suggest(key: str, known: dict[str, Any]) -> str:
    """Suggest the nearest known key: in the same group, else by its full path, else by its last word in any group."""
    group, _, word = key.rpartition(".")
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == group}
    paths = {other: other for other in known if other.count(".") == key.count(".")}
    anywhere = {other.rpartition(".")[2]: other for other in reversed(known)}  # the first key with a name wins
    for wanted, choices, cutoff in ((word, siblings, 0.6), (key, paths, 0.75), (word, anywhere, 0.6)):
        for near in difflib.get_close_matches(wanted, choices, n=1, cutoff=cutoff):
            return f"did you mean '{choices[near]}'?"
    return f"known keys: {', '.join(siblings.values() or [other for other in known if '.' not in other])}"


def _read_with_bases(path: Path, chain: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    resolved = path.resolve()
    if resolved in chain:
        raise ValueError(f"{path}: `base:` files form a cycle: {' -> '.join(p.name for p in (*chain, resolved))}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes; give a YAML config file")
    try:
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded, resolve=False)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}:{where} not readable as YAML: {_first_line(error)}") from None
    except OSError as error:  # OmegaConf also raises this for a file of one bare word
        raise error if error.errno else ValueError(f"{path}: expected `key: value` lines") from None
    if not isinstance(loaded, DictConfig) or not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got a list")
    bases = values.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base={bases!r}; expected a file name or a list of them")
    sources: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        if not (path.parent / base).is_file():
            raise ValueError(f"{path}: base file {path.parent / base} does not exist")
        sources += _read_with_bases(path.parent / base, (*chain, resolved))
    return [*sources, (str(path), {str(key): value for key, value in values.items()})]


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split command-line words into plain ones and `key=value` ones; a prompt with spaces before its `=` is plain."""
    return [w for w in words if not OVERRIDE.fullmatch(w)], [w for w in words if OVERRIDE.fullmatch(w)]


def _parse_override(word: str, known: dict[str, Any]) -> dict[str, Any]:
    match = OVERRIDE.fullmatch(word)
    if not match:
        raise ValueError(f"command line: expected key=value, got {word!r}")
    key, text = match["key"], match["value"]
    hint = known.get(key)
    is_string = _is_string_type(hint) or (_is_string_list_type(hint) and not text.startswith("["))
    if is_string and text != "null":
        value: Any = text  # a path or a caption is not YAML
    else:
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"command line: {key}={text!r} is not readable as YAML: {_first_line(error)}") from None
    return _nest(key, value)


def _nest(key: str, value: Any) -> Any:
    """{"a": {"b": value}} for the key a.b."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _known_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a dataclass and its nested dataclasses, with its type."""
    known: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        known[name] = hint
        for option in _union_members(hint):
            if isinstance(option, type) and dataclasses.is_dataclass(option):
                known |= _known_keys(option, f"{name}.")
    return known


def _union_members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_string_type(hint: Any) -> bool:
    """Whether a type takes strings or paths only, null aside."""
    return hint is not None and set(_union_members(hint)) <= {str, Path, types.NoneType}


def _is_string_list_type(hint: Any) -> bool:
    lists = [option for option in _union_members(hint) if typing.get_origin(option) is list]
    return any(_is_string_type(typing.get_args(option)[0]) for option in lists)


def _wrap_single_strings(values: dict[Any, Any], known: dict[str, Any], prefix: str = "") -> dict[Any, Any]:
    """Replace a single string by a list of one where the key's type is a list of strings."""
    wrapped: dict[Any, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _wrap_single_strings(value, known, f"{prefix}{key}.")
        elif isinstance(value, str) and _is_string_list_type(known.get(f"{prefix}{key}")):
            value = [value]
        wrapped[key] = value
    return wrapped


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, enum.EnumType):
        return "one of " + ", ".join(hint.__members__)
    if hint is types.NoneType:
        return "null"
    options = _union_members(hint)
    if len(options) > 1:
        return " or ".join(map(_type_name, options))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _leaves(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is not a group."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).partition("\n")[0].split())
