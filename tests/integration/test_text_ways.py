"""The same prompt by every way gives the same clip: command line, file, standard input, page, Python, prepared data."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cogvideo.cli.main import main
from cogvideo.data.readers import open_captions
from cogvideo.demo.service import DemoService, Request
from cogvideo.demo.weights import ServedWeights
from cogvideo.sampling.bundle import load_sample_config
from cogvideo.sampling.pipeline import Pipeline
from tests.helpers.bundles import write_bundle

PROMPT = "a café 서, x=3"
WRITTEN = [
    PROMPT,
    "  a cafe\u0301\t서,  x=3 ",  # decomposed, and spaces
    "\ufeffa ca\u00adfé\u3000\u200e서,\u2028x=3\x0b",  # invisible characters, spaces of other kinds
]
ENDS = ["\n", "\r\n", "\r"]
SMALL = ["rounds=0", "num_clusters=32"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle")


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.load(bundle)


@pytest.fixture(scope="module")
def expected(pipeline: Pipeline, bundle: Path) -> Tensor:
    return pipeline.sample([PROMPT], load_sample_config(bundle, [], SMALL))


@pytest.fixture(params=range(len(WRITTEN)))
def written(request: pytest.FixtureRequest) -> str:
    return WRITTEN[request.param]


def tokens(folder: Path) -> Tensor:
    return load_file(folder / "tokens.safetensors")["tokens"]


def by_command(bundle: Path, out: Path, *words: str) -> Tensor:
    assert main(["sample", "--model", str(bundle), "--out", str(out), *words, *SMALL]) == 0
    return tokens(out)


def test_command_line(bundle: Path, expected: Tensor, tmp_path: Path, written: str) -> None:
    assert torch.equal(by_command(bundle, tmp_path / "out", written), expected)


@pytest.mark.parametrize(("written", "end"), [*zip(range(3), ENDS, strict=True)], indirect=["written"])
def test_file(bundle: Path, expected: Tensor, tmp_path: Path, written: str, end: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf" + f"another one{end}{written}{end}".encode())
    assert torch.equal(by_command(bundle, tmp_path / "out", "--prompts", str(file))[1:], expected)


@pytest.mark.parametrize(("written", "end"), [*zip(range(3), ENDS[::-1], strict=True)], indirect=["written"])
def test_standard_input(
    bundle: Path, expected: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, end: str
) -> None:
    data = b"\xef\xbb\xbf" + f"seed=3{end}another one{end}seed=0{end}{written}".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    words = ["sample", "--model", str(bundle), "--interactive", "--out", str(tmp_path / "talk"), *SMALL]
    assert main(words) == 0
    assert torch.equal(tokens(next((tmp_path / "talk").glob("001-*"))), expected)


def test_page(pipeline: Pipeline, bundle: Path, expected: Tensor, tmp_path: Path, written: str) -> None:
    service = DemoService(
        {"one": ServedWeights(pipeline, load_sample_config(bundle, [], SMALL), bundle)}, tmp_path / "out"
    )
    try:
        *_, last = service.run(Request(f"another one\r\n{written}\r\n"))
    finally:
        service.close()
    assert torch.equal(tokens(last.folder)[1:], expected)


def test_python(pipeline: Pipeline, bundle: Path, expected: Tensor, written: str) -> None:
    config = load_sample_config(bundle, [], SMALL)
    assert torch.equal(pipeline.sample([written], config), expected)
    assert pipeline.encode_prompts([written], config) == pipeline.encode_prompts([PROMPT], config)


def test_captions_file(pipeline: Pipeline, tmp_path: Path, written: str) -> None:
    """Training reads the tokens that sampling reads."""
    file = tmp_path / "captions.jsonl"
    file.write_text(f'\ufeff{{"video": "a.mp4", "caption": {json.dumps(written)}}}\r\n', encoding="utf-8")
    (caption,) = open_captions(file)
    assert caption.text == PROMPT
    trained = [pipeline.prompt_format.image_text(pipeline.encode, text, 64) for text in (caption.text, written)]
    assert trained[0] == trained[1]


BAD = {
    "a \x1b[D": "control character (U+001B) at character 3",
    "\u200b \ufeff": "is empty",
    "caf\udce9": "not UTF-8: byte 0xe9 at character 4",
}


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ways(pipeline: Pipeline, bundle: Path, tmp_path: Path) -> Iterator[DemoService]:
    service = DemoService(
        {"one": ServedWeights(pipeline, load_sample_config(bundle, [], SMALL), bundle)}, tmp_path / "page"
    )
    yield service
    service.close()


def test_a_bad_prompt_is_one_line_by_every_way(
    pipeline: Pipeline, bundle: Path, ways: DemoService, tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str
) -> None:
    assert main(["sample", bad, "--model", str(bundle), "--out", str(tmp_path / "out"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert BAD[bad] in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    with pytest.raises(ValueError) as refused:
        pipeline.sample([bad], load_sample_config(bundle, [], SMALL))
    assert BAD[bad] in str(refused.value)
    if "empty" not in BAD[bad]:  # a blank line of the page is skipped
        with pytest.raises(ValueError) as refused:
            list(ways.run(Request(bad)))
        assert BAD[bad] in str(refused.value)
