"""Outputs that would replace what the same command reads."""

from pathlib import Path

import pytest

from cogvideo.cli._common import captions_files, refuse_replaced_inputs
from cogvideo.cli.main import main

FILES = (
    *("votes.json", "key.json", "captions.json", "prompts.txt", "clip.pt", "scores.safetensors", "rows.safetensors"),
    *("model/sequential/model.safetensors", "adapter/adapter_model.safetensors", "tokenizer/config.json"),
    *("videos/metadata.csv", "tars/shard-0.tar", "tars/shard-1.tar", "real/a.mp4", "made/samples.json", "made/x.json"),
)
REFUSED = [
    "study read votes.json --key key.json --json key.json",
    "study read votes.json --key key.json --json votes.json",
    "study read votes.json --key link.json --json key.json",
    "vocabulary --captions captions.json --tokenizer tokenizer --out captions.json --overwrite",
    "vocabulary --captions captions.json --tokenizer tokenizer --out tokenizer --overwrite",
    "vocabulary --captions captions.json --extend model --out model --overwrite",
    "vocabulary --captions videos --tokenizer tokenizer --out videos/metadata.csv --overwrite",
    "vocabulary --captions tars/shard-{0..1}.tar --tokenizer tokenizer --out tars/shard-1.tar --overwrite",
    "score --model model/sequential --rows rows.safetensors --out rows.safetensors",
    "score --model model/sequential --rows rows.safetensors --out model/sequential/model.safetensors",
    "merge model/sequential --adapter adapter:0.5 --out adapter --overwrite",
    "eval local --real real --generated made --scores scores.safetensors --json scores.safetensors",
    "eval local --real real --generated made --scores scores.safetensors --report scores.safetensors",
    "eval local --real real --generated made --network clip=clip.pt --captions captions.json --json captions.json",
    "eval local --real real --generated made --network clip=clip.pt --report clip.pt",
    "eval local --model model --prompts prompts.txt --json prompts.txt",
    "eval local --real real --generated made --json made/samples.json",
    "eval local --real real --generated made --report real/a.mp4",
    "eval digits --model model --json model/sequential/model.safetensors",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link.json").symlink_to("key.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", REFUSED)
def test_an_output_does_not_replace_an_input(words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert "would replace" in error and error.count("\n") == 1
    assert {name: (folder / name).read_text() for name in FILES} == {name: name for name in FILES}


def test_vocabulary_replaces_a_file_only_when_asked_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["vocabulary", "--captions", "captions.json", "--tokenizer", "tokenizer", "--out", "key.json"]
    assert main(words) == 2
    assert "key.json exists; choose another name, or --overwrite to replace it" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 2, "these captions cannot be read"
    assert "exists" not in capsys.readouterr().err and (folder / "key.json").read_text() == "key.json"


def test_other_outputs_are_accepted(folder: Path) -> None:
    refuse_replaced_inputs("--json", None, [folder])
    refuse_replaced_inputs("--json", folder / "new.json", [folder / "key.json", None, folder], [folder / "model", None])
    refuse_replaced_inputs("--json", folder / "model/new.json", [folder / "key.json"], [folder / "model"])
    refuse_replaced_inputs("--out", folder / "mod", [folder / "model"])
    with pytest.raises(ValueError, match=r"--out .* would replace what is read: .*key\.json"):
        refuse_replaced_inputs("--out", folder, [folder / "key.json"])
    assert {path.name for path in captions_files(Path("tars"))} > {"tars", "shard-0.tar", "shard-1.tar"}
