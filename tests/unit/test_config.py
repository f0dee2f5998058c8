"""Configs: order of sources, the error for each kind of mistake, and round trips through files."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideo.config import dump_yaml, expand_path, from_dict, load_config, to_dict


@dataclass(frozen=True)
class Optimiser:
    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)


@dataclass(frozen=True)
class Training:
    steps: int = 100
    window_size: int | None = None
    out: Path | None = None
    note: str = ""
    resume: bool = False
    tags: list[str] = field(default_factory=list)
    optimiser: Optimiser = Optimiser()
    fallback: Optimiser | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; expected 1 or more")

    @property
    def half(self) -> int:
        return self.steps // 2


@dataclass(frozen=True)
class Paths:
    out: Path = Path("out")
    data: list[Path] | None = None
    note: str = ""


@dataclass(frozen=True)
class Required:
    data: Path
    optimiser: Optimiser = Optimiser()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("words", [["tags=[a b]"], ["tags=a b"]])
def test_a_single_string_becomes_a_list_of_one(tmp_path: Path, words: list[str]) -> None:
    assert load_config(Training, [], words).tags == ["a b"]
    assert load_config(Training, [write(tmp_path / "c.yaml", "tags: a b")]).tags == ["a b"]
    assert from_dict(Training, {"tags": "a b"}).tags == ["a b"]


def test_later_sources_win(tmp_path: Path) -> None:
    write(tmp_path / "common" / "base.yaml", "steps: 1\nnote: base\noptimiser: {learning_rate: 5e-4, name: sgd}")
    first = write(tmp_path / "a" / "first.yaml", "base: ../common/base.yaml\nsteps: 2\noptimiser: {name: adamw}")
    second = write(tmp_path / "second.yaml", "tags: [x]")
    config = load_config(Training, [first, second], ["optimiser.learning_rate=2e-4", "window_size=5"])
    assert config == Training(steps=2, note="base", tags=["x"], window_size=5, optimiser=Optimiser(learning_rate=2e-4))
    assert config.half == 1


def test_two_files_may_share_a_base(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", "steps: 7")
    write(tmp_path / "left.yaml", "base: root.yaml\nnote: left")
    write(tmp_path / "right.yaml", "base: root.yaml\nresume: true")
    top = write(tmp_path / "top.yaml", "base: [left.yaml, right.yaml]")
    assert load_config(Training, [top]) == Training(steps=7, note="left", resume=True)


def test_null_and_optional_groups() -> None:
    assert load_config(Training, [], ["window_size=4", "window_size=null", "out=null"]) == Training()
    assert load_config(Training, [], ["fallback.name=sgd"]).fallback == Optimiser(name="sgd")
    assert load_config(Training, [], ["fallback.name=sgd", "fallback=null"]).fallback is None


def test_strings_on_the_command_line_are_not_parsed() -> None:
    config = load_config(Training, [], ["note=a: [b] = 1e3", "out=/tmp/a: b.mp4"])
    assert config.note == "a: [b] = 1e3" and config.out == Path("/tmp/a: b.mp4")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimiser.learning_rat=1", "unknown key 'optimiser.learning_rat'; did you mean 'optimiser.learning_rate'?"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'optimiser.learning_rate'?"),
        ("zzz=1", "unknown key 'zzz'; known keys: steps, window_size, out,"),
        ("optimiser.zzz=1", "known keys: optimiser.name, optimiser.learning_rate, optimiser.betas"),
        ("steps=many", "steps='many' is not valid; expected int"),
        ("steps=1.5", "steps=1.5 is not valid; expected int"),
        ("steps=null", "steps=None is not valid; expected int"),
        ("window_size=x", "window_size='x' is not valid; expected int or null"),
        ("resume=perhaps", "resume='perhaps' is not valid; expected bool"),
        ("optimiser.name=lion", "optimiser.name='lion' is not valid; expected one of adamw, sgd"),
        ("optimiser.betas=[a]", "optimiser.betas=['a'] is not valid; expected tuple[float, ...]"),
        ("optimiser=3", "optimiser=3 is not valid: this key is a group; set optimiser.name etc."),
        ("tags=[a", "tags='[a' is not readable as YAML"),
        ("steps=!!bool x", "steps='!!bool x' is not readable as YAML"),
        ("steps", "expected key=value, got 'steps'"),
        ("=3", "expected key=value, got '=3'"),
        ("steps=${nothing}", "nothing"),
    ],
)
def test_a_mistake_on_the_command_line_is_an_error_of_one_line(word: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(Training, [], [word])
    assert message in str(caught.value) and str(caught.value).startswith("command line: ")
    assert "\n" not in str(caught.value)


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
"""A few hundred bytes that hold 10^8 values."""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser:\n  learning_rat: 1", "unknown key 'optimiser.learning_rat'; did you mean"),
        ("steps: many", "steps='many' is not valid; expected int"),
        ("optimiser: 3", "optimiser=3 is not valid: this key is a group"),
        ("steps: 1\nsteps: 2", "duplicate key steps"),
        ("steps: [", "not readable as YAML"),
        ("- steps", "got a list"),
        ("word", "unknown key 'word'"),
        ("base: 3", "base=3; expected a file name or a list"),
        ("base: nowhere.yaml", "nowhere.yaml does not exist"),
        ("base: here.yaml", "files form a cycle: here.yaml -> here.yaml"),
        ("note: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("note: ${note}", "interpolation"),
        ("note: '\x00'", "not readable as YAML"),
        ("steps: !!int ''", "not readable as YAML"),
        ("steps: !!bool x", "not readable as YAML"),
        ("steps: !!timestamp x", "not readable as YAML"),
        ("a: &a [x, *a]", "its aliases expand to too many values"),
        (LAUGHS, "its aliases expand to too many values; expected at most 65536 in all"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "here.yaml", text)
    with pytest.raises(ValueError) as caught:
        load_config(Training, [file])
    assert message in str(caught.value) and str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_a_mistake_in_a_base_file_names_the_base_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "stpes: 1")
    top = write(tmp_path / "top.yaml", "base: base.yaml")
    with pytest.raises(ValueError, match=r"base\.yaml: unknown key 'stpes'; did you mean 'steps'\?"):
        load_config(Training, [top])


def test_not_text_too_large_and_missing_files(tmp_path: Path) -> None:
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"steps: \xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_config(Training, [binary])
    with pytest.raises(ValueError, match="larger than"):
        load_config(Training, [write(tmp_path / "large.yaml", "#" * (1 << 20) + "\nsteps: 1")])
    with pytest.raises(FileNotFoundError):
        load_config(Training, [tmp_path / "none.yaml"])


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"no value for data; set it in a file or as data=\.\.\."):
        load_config(Required)
    assert load_config(Required, [], ["data=clips"]).data == Path("clips")


def test_a_configs_own_check_is_passed_on() -> None:
    with pytest.raises(ValueError, match=r"^steps=0; expected 1 or more$"):
        load_config(Training, [], ["steps=0"])


def test_a_stored_config_is_taken_literally() -> None:
    with pytest.raises(ValueError, match=r"^config\.json: note="):
        from_dict(Training, {"note": "${oc.env:HOME}"}, "config.json")
    with pytest.raises(ValueError, match=r"^config\.json: unknown key 'step'"):
        from_dict(Training, {"step": 3}, "config.json")
    with pytest.raises(ValueError, match="expected a mapping"):
        from_dict(Training, [1], "config.json")  # type: ignore[arg-type]


# without characters that YAML cannot hold unescaped: controls and surrogates
CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"), exclude_characters="$")
TEXT = st.text(CHARACTERS, max_size=20).filter(lambda t: t != "???")
OPTIMISERS = st.builds(
    Optimiser,
    name=st.sampled_from(["adamw", "sgd"]),
    learning_rate=st.floats(0, 1),
    betas=st.lists(st.floats(0, 1), max_size=3).map(tuple),
)
TRAININGS = st.builds(
    Training,
    steps=st.integers(1, 10**9),
    window_size=st.none() | st.integers(-5, 5),
    out=st.none() | st.sampled_from([Path("a/b"), Path("/tmp/视频"), Path("~/a"), Path("$HOME/$$a"), Path("$5")]),
    note=TEXT,
    resume=st.booleans(),
    tags=st.lists(TEXT, max_size=3),
    optimiser=OPTIMISERS,
    fallback=st.none() | OPTIMISERS,
)


@given(TRAININGS)
def test_round_trip_through_json(config: Training) -> None:
    assert from_dict(Training, json.loads(json.dumps(to_dict(config)))) == config


@given(TRAININGS, TRAININGS)
def test_merging_a_whole_config_over_another_gives_the_second(
    tmp_path_factory: pytest.TempPathFactory, first: Training, second: Training
) -> None:
    folder = tmp_path_factory.mktemp("configs")
    files = [write(folder / f"{i}.yaml", dump_yaml(config)) for i, config in enumerate((first, second))]
    assert load_config(Training, files) == second


@given(
    st.dictionaries(
        st.sampled_from(["steps", "note", "resume", "optimiser"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | TEXT,
            lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
        ),
    )
)
def test_any_mapping_gives_a_config_or_one_line(values: dict[str, Any]) -> None:
    try:
        assert isinstance(from_dict(Training, values), Training)
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA", "/data sets")
    monkeypatch.setenv("RELATIVE", "~/r")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)
    return tmp_path / "home"


EXPANDED = {
    "~": "{home}",
    "~/a": "{home}/a",
    "$DATA/a": "/data sets/a",
    "x/${DATA}b": "x/data setsb",
    "$RELATIVE/a": "{home}/r/a",
    "./~/a": "~/a",
    "a~b": "a~b",
    "$$DATA": "$DATA",
    "cost $5, 5$": "cost $5, 5$",
}


@pytest.mark.parametrize("written", EXPANDED)
def test_home_and_variables_in_paths(home: Path, tmp_path: Path, written: str) -> None:
    expected = Path(EXPANDED[written].replace("{home}", str(home)))
    assert expand_path(written) == expected
    assert load_config(Paths, [], [f"out={written}", f"data={written}"]) == Paths(expected, [expected])
    file = write(tmp_path / "c.yaml", f"out: '{written}'\ndata: ['{written}', b]\nnote: '~ $DATA'")
    assert load_config(Paths, [file]) == Paths(expected, [expected, Path("b")], "~ $DATA"), "a note is no path"
    assert from_dict(Paths, {"out": "~/$DATA"}).out == Path("~/$DATA"), "a stored config is literal"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("$UNSET/a", "environment variable UNSET is not set; set it, or write $$ for a dollar sign"),
        ("a/${UNSET}", "environment variable UNSET is not set"),
        ("$EMPTY/a", "environment variable EMPTY is not set"),
        ("~nobody-here/a", "there is no home folder ~nobody-here; write ./~nobody-here for a file of that name"),
        ("", "the path is empty"),
    ],
)
def test_what_has_no_value_in_a_path_is_named_with_its_key(
    home: Path, tmp_path: Path, written: str, message: str
) -> None:
    file = write(tmp_path / "c.yaml", f"data: ['{written}']")
    for source, origin in (([file], f"{file}: data="), ([], "command line: out=")):
        with pytest.raises(ValueError) as error:
            load_config(Paths, source, [] if source else [f"out={written}"])
        assert str(error.value).startswith(origin) and message in str(error.value)
        assert "\n" not in str(error.value)


def test_an_existing_path_with_a_dollar_sign_is_literal(home: Path, tmp_path: Path) -> None:
    (tmp_path / "a $UNSET").mkdir()
    assert load_config(Paths, [], ["out=a $UNSET"]).out == Path("a $UNSET")


def test_omegaconfs_interpolation_still_works_in_paths(home: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "out: ~/${note}/${oc.env:RELATIVE}\nnote: n")
    assert load_config(Paths, [file]).out == home / "n/~/r"


def test_a_base_may_be_in_the_home_folder(home: Path, tmp_path: Path) -> None:
    write(home / "base.yaml", "note: base")
    assert load_config(Paths, [write(tmp_path / "c.yaml", "base: ~/base.yaml")]).note == "base"
    with pytest.raises(ValueError, match=r"base=.UNSET/a.yaml: the environment variable UNSET is not set"):
        load_config(Paths, [write(tmp_path / "c.yaml", "base: $UNSET/a.yaml")])


@pytest.mark.parametrize("text", ["note: ${oc.env:HOME}", "base: other.yaml"])
def test_a_stored_file_is_literal(home: Path, tmp_path: Path, text: str) -> None:
    write(tmp_path / "other.yaml", "note: other")
    stored = write(tmp_path / "stored.yaml", "note: stored\nout: ~/a")
    assert load_config(Paths, [], ["note=mine"], stored=stored) == Paths(Path("~/a"), note="mine")
    with pytest.raises(ValueError, match=r"stored.yaml: (note=.* not allowed in a stored config|unknown key 'base')"):
        load_config(Paths, stored=write(stored, text))


def test_a_number_that_is_none_is_named_with_its_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seconds: !!int x\n")
    with pytest.raises(ValueError, match=r"c\.yaml: not readable as YAML: invalid literal for int"):
        load_config(Training, [path])


@dataclass
class Checked:
    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be above 0")


def test_a_stored_value_that_a_check_refuses_names_the_file_and_one_of_the_command_line_does_not(
    tmp_path: Path,
) -> None:
    stored = write(tmp_path / "stored.yaml", "steps: 0")
    with pytest.raises(ValueError, match=f"^{stored}: steps=0 must be above 0$"):
        load_config(Checked, stored=stored)
    assert load_config(Checked, [], ["steps=2"], stored=stored) == Checked(2)
    write(stored, "steps: 3")
    with pytest.raises(ValueError, match=r"^steps=0 must be above 0$"):
        load_config(Checked, [], ["steps=0"], stored=stored)
