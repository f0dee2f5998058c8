"""Typed configuration: frozen dataclasses filled from YAML files and `key=value` words.

Sources in order, later ones win: the dataclass's defaults, each file's `base:` files, the file itself, the command
line. Every mistake is a one-line ValueError that says where it is and what was expected. In paths that the user gives,
`~`, `$NAME` and `${NAME}` are expanded; a stored config, which may come from anyone, is taken literally. No field of
any config is named here: each part of the package has its own dataclass next to the code that uses it, with derived
values as properties.
"""

import contextlib
import dataclasses
import difflib
import enum
import json
import math
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

DERIVED = "derived settings"
MAX_SEED = 2**64 - 1
"""The largest seed; a run's files store it as a JSON integer, which is read back only if it fits 64 bits."""
MAX_FILE_BYTES = 1 << 20
YAML_ERRORS = (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, LookupError, AttributeError)
"""Errors of reading YAML; the last three are for a value that does not match its tag, such as `!!bool x`."""
MAX_VALUES = 1 << 16
"""Most values in a YAML file with aliases, counted after their expansion."""
OVERRIDE = re.compile(r"(?P<key>[A-Za-z_]\w*(\.\w+)*)=(?P<value>.*)", re.DOTALL)
SETTING = re.compile(OVERRIDE.pattern.replace(".*", r"([\[{].*|\S*)"), re.DOTALL)
"""An override with spaces only in a list or mapping; where prompts or file names may be given too, any other word is
one of those."""
VARIABLE = re.compile(r"\$(?:\$|(?P<bare>[A-Za-z_]\w*)|\{(?P<braced>[A-Za-z_]\w*)\})", re.ASCII)
"""An environment variable in a path, or an escaped dollar sign."""
INTERPOLATION = re.compile(r"\$\$|\$\{(?P<name>[^}]*)\}")
"""A possible OmegaConf interpolation (of a key, or a resolver such as `oc.env:NAME`), or an escaped dollar sign."""


def load_config(
    cls: type[T],
    files: Sequence[Path | str] = (),
    overrides: Sequence[str] = (),
    *,
    stored: Path | None = None,
    stored_group: str | None = None,
    derive: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> T:
    """Merge a dataclass's defaults, YAML files and `a.b=c` words into one instance, with paths as in `expand_path`.

    A file may name `base: other.yaml` (or a list), relative to its own folder; those are merged before it. `stored` is
    a YAML file that may come from anyone, overridden by all others: it is taken literally and cannot have a base; with
    `stored_group` only that group of it is used. `derive` computes values for further keys from all those given, which
    take precedence over its result.
    Raises: ValueError for an unknown key, a wrong type, NaN or infinity, a missing value, an unset environment variable
    or unreadable YAML; OSError for a missing file.
    """
    given: list[tuple[str, dict[str, Any]]] = []
    for file in files:
        given += _read_with_bases(Path(file))
    known = _known_keys(cls)
    given += [("command line", _parse_override(word, known)) for word in overrides]
    sources = [(origin, _expand_paths(values, known, origin)) for origin, values in given]
    if stored is not None:
        values = read_yaml(stored)
        _check_literal(values, str(stored))
        if stored_group is not None:
            values = values.get(stored_group, {})
            if not isinstance(values, dict):
                raise ValueError(f"{stored}: {stored_group} is a group of settings, got {values!r}")
        sources.insert(0, (str(stored), values))
    if derive is not None:
        with contextlib.suppress(OmegaConfBaseException, ValueError, TypeError):  # _build explains what is wrong
            merged = OmegaConf.merge({}, *(values for _, values in sources))
            resolved = OmegaConf.to_container(merged, resolve=True)
            assert isinstance(resolved, dict)
            derived = derive({str(key): value for key, value in resolved.items()})
            sources.insert(0, (DERIVED, derived))
    try:
        return _build(cls, sources)
    except ValueError as error:
        if str(error).startswith(f"{DERIVED}: "):
            _build(cls, sources[1:])  # names where the value was given
        if stored is not None:
            from_dict(cls, values, str(stored))  # names the file if it is wrong by itself
        raise


def from_dict(cls: type[T], values: dict[str, Any], origin: str = "config") -> T:
    """The inverse of `to_dict`; errors start with `origin`, a file name for example.

    Values are literal: a stored config may come from anyone, so OmegaConf's `${...}` is refused.
    Raises: ValueError as for `load_config`.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{origin}: expected a mapping of settings, got {type(values).__name__}")
    _check_literal(values, origin)
    try:
        return _build(cls, [(origin, values)])
    except ValueError as error:
        if str(error).startswith(origin):
            raise
        raise ValueError(f"{origin}: {error}") from None  # from a dataclass's own check, which names no file


def expand_path(path: str | Path) -> Path:
    """A path as the user means it: a leading `~` or `~user` is a home folder, `$NAME` and `${NAME}` are environment
    variables, `$$` is a dollar sign. In a path that exists as written, dollar signs are literal.

    Raises: ValueError for an empty path, an unset or empty variable, or an unknown user.
    """
    return Path(_expand(str(path)))


def _expand(text: str, keys: Container[str] = ()) -> str:
    """`expand_path` on text; `${NAME}` is kept if NAME is in `keys`, for OmegaConf to insert that key's value."""

    def value(match: re.Match[str]) -> str:
        name = match["bare"] or match["braced"]
        if name is None:
            return "$"
        if match["braced"] and name in keys:
            return match[0]
        if not os.environ.get(name):
            raise ValueError(f"the environment variable {name} is not set; set it, or write $$ for a dollar sign")
        return os.environ[name]

    if not text:
        raise ValueError("the path is empty")
    if "$" in text and not os.path.lexists(os.path.expanduser(text)):
        text = VARIABLE.sub(value, text)
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        home = text.partition("/")[0]
        raise ValueError(f"there is no home folder {home}; write ./{home} for a file of that name")
    return expanded


def _expand_paths(values: dict[Any, Any], known: dict[str, Any], origin: str, prefix: str = "") -> dict[Any, Any]:
    """Expand the values of keys that hold a path or a list of paths."""
    expanded: dict[Any, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            value = _expand_paths(value, known, origin, f"{name}.")
        elif _is_path_type(known.get(name)):
            try:
                value = [_given_path(v, known) for v in value] if isinstance(value, list) else _given_path(value, known)
            except ValueError as error:
                raise ValueError(f"{origin}: {name}={value}: {error}") from None
        expanded[key] = value
    return expanded


def _given_path(value: Any, keys: Container[str]) -> Any:
    if not isinstance(value, str):
        return value
    text = _expand(value, keys)
    names = [match["name"] for match in INTERPOLATION.finditer(value)]
    # a Path is literal, text is interpolated by OmegaConf
    return text if any(name and (name in keys or not name.isidentifier()) for name in names) else Path(text)


def _check_literal(values: dict[str, Any], origin: str) -> None:
    for key, value in leaves(values):
        if "${" in str(value):
            raise ValueError(f"{origin}: {key}={value!r} contains '${{', which is not allowed in a stored config")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists, strings and numbers, for JSON or YAML."""
    assert dataclasses.is_dataclass(config) and not isinstance(config, type)
    plain: dict[str, Any] = _plain(config)
    return plain


def dump_yaml(config: Any) -> str:
    """A config as YAML text, from which `load_config` makes an equal config."""
    return yaml.safe_dump(_plain(config, _escape), allow_unicode=True, sort_keys=False)


def _plain(value: Any, path_text: Callable[[Path], str] = str) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), path_text) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item, path_text) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, path_text) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    return path_text(value) if isinstance(value, Path) else value


def _escape(path: Path) -> str:
    """The text that `expand_path` turns into this path."""
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


def _build(cls: type[T], sources: Sequence[tuple[str, dict[str, Any]]]) -> T:
    merged = OmegaConf.structured(cls)
    known = _known_keys(cls)
    for origin, values in sources:
        values = _wrap_single_strings(values, known)
        try:
            merged = OmegaConf.merge(merged, values)
        except (OmegaConfBaseException, ValueError, TypeError):
            raise _explain(merged, origin, values, known) from None
    names = ", ".join(dict.fromkeys(origin for origin, _ in sources)) or "defaults"
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{names}: no value for {', '.join(missing)}; set it in a file or as {missing[0]}=...")
        _check_elements(names, OmegaConf.to_container(merged, resolve=True), known)
        built = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{names}: {_first_line(error)}") from None
    except (ArithmeticError, TypeError, LookupError) as error:  # in a dataclass's own checks
        raise ValueError(f"{names}: the settings are inconsistent ({_first_line(error)})") from None
    assert isinstance(built, cls)
    for key, value in leaves(to_dict(built)):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{names}: {key}={number}; expected a finite number")
    return built


def _check_elements(origin: str, values: Any, known: dict[str, Any]) -> None:
    """Check the contents of lists, tuples and dicts, which OmegaConf accepts as they are. Raises: ValueError."""
    for key, hint in known.items():
        if not any(typing.get_origin(option) in (list, tuple, dict) for option in _union_members(hint)):
            continue
        value = values
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        try:
            if value is not None:
                TypeAdapter(hint).validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError:
            shown = reprlib.repr(value)
            raise ValueError(f"{origin}: {key}={shown} is not valid; expected {_type_name(hint)}") from None


def _explain(merged: Any, origin: str, values: dict[str, Any], known: dict[str, Any]) -> ValueError:
    """The error for values that failed to merge: merge them one at a time to find the one that is not valid."""
    for key, value in leaves(values):
        try:
            OmegaConf.merge(merged, _nest(key, value))
        except ConfigKeyError:
            return ValueError(f"{origin}: unknown key '{key}'; {_suggest(key, known)}")
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            if any(other.startswith(f"{key}.") for other in known):
                example = next(other for other in known if other.startswith(f"{key}."))
                return ValueError(
                    f"{origin}: {key}={reprlib.repr(value)} is not valid: this key is a group; set {example} etc."
                )
            expected = _type_name(known[key]) if key in known else _first_line(error)
            return ValueError(f"{origin}: {key}={reprlib.repr(value)} is not valid; expected {expected}")
    return ValueError(f"{origin}: the settings are inconsistent")


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


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file as written, with `${...}` unresolved. Raises: OSError, ValueError."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes; give a YAML config file")
    try:
        _check_aliases(path)
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded, resolve=False)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path}:{where} not readable as YAML: {_first_line(error)}") from None
    except OSError as error:  # OmegaConf also raises this for a file of one bare word
        raise error if error.errno else ValueError(f"{path}: expected `key: value` lines") from None
    if not isinstance(loaded, DictConfig) or not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines, got a list")
    return {str(key): value for key, value in values.items()}


def _check_aliases(path: Path) -> None:
    """Refuse aliases of aliases, which can repeat a value a billion times.

    Raises: ValueError, yaml.YAMLError, OSError.
    """
    data = path.read_bytes()
    if b"*" in data and _expanded_size(yaml.compose(data, yaml.SafeLoader), {}) > MAX_VALUES:
        raise ValueError(f"its aliases expand to too many values; expected at most {MAX_VALUES} in all")


def _expanded_size(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """Number of values in a YAML node with its aliases expanded; infinity if a node contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        parts: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            parts = node.value
        elif isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_expanded_size(part, sizes) for part in parts)
    return sizes[id(node)]


def _read_with_bases(path: Path, chain: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    resolved = path.resolve()
    if resolved in chain:
        raise ValueError(f"{path}: `base:` files form a cycle: {' -> '.join(p.name for p in (*chain, resolved))}")
    values = read_yaml(path)
    bases = values.pop("base", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base={bases!r}; expected a file name or a list of them")
    sources: list[tuple[str, dict[str, Any]]] = []
    for base in bases:
        try:
            file = path.parent / expand_path(base)
        except ValueError as error:
            raise ValueError(f"{path}: base={base}: {error}") from None
        if not file.is_file():
            raise ValueError(f"{path}: base file {file} does not exist")
        sources += _read_with_bases(file, (*chain, resolved))
    return [*sources, (str(path), values)]


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split command-line words into plain ones and `key=value` ones; a prompt with `=` and a space is plain."""
    return [w for w in words if not SETTING.fullmatch(w)], [w for w in words if SETTING.fullmatch(w)]


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
        except YAML_ERRORS as error:
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
    """Whether a type accepts only strings or paths, apart from null."""
    return hint is not None and set(_union_members(hint)) <= {str, Path, types.NoneType}


def _is_path_type(hint: Any) -> bool:
    """Whether a type accepts only paths or lists of paths, apart from null."""
    options = {option for member in _union_members(hint) for option in typing.get_args(member) or (member,)}
    return hint is not None and options - {types.NoneType} == {Path}


def _is_string_list_type(hint: Any) -> bool:
    lists = [option for option in _union_members(hint) if typing.get_origin(option) is list]
    return any(_is_string_type(typing.get_args(option)[0]) for option in lists)


def _wrap_single_strings(values: dict[Any, Any], known: dict[str, Any], prefix: str = "") -> dict[Any, Any]:
    """Wrap a single string in a list where the key's type is a list of strings."""
    wrapped: dict[Any, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _wrap_single_strings(value, known, f"{prefix}{key}.")
        elif isinstance(value, str | Path) and _is_string_list_type(known.get(f"{prefix}{key}")):
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


def leaves(values: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything that is not a group."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: BaseException) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).partition("\n")[0].split())
