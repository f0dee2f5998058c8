"""Commands with weights of a stand-in hub: fetched, used, and recorded by commit; and `cogvideo push`."""

import json
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from cogvideo.checkpoint.adapter import Base, fingerprint
from cogvideo.checkpoint.format import load_checkpoint
from cogvideo.checkpoint.load import load_model, save_model
from cogvideo.cli.main import main
from cogvideo.files import BUNDLED_WEIGHTS
from cogvideo.model.config import ModelConfig
from cogvideo.model.transformer import CogVideoTransformer
from cogvideo.sequence.layout import Vocabulary
from cogvideo.training.launch import train
from tests.helpers.adapters import write_adapter
from tests.helpers.bundles import CAPTIONS, write_bundle
from tests.helpers.hub import Handler, Hub, log_in, serving, use
from tests.helpers.training import prepare_data, settings

SMALL = ["rounds=0", "num_clusters=32", "key_frames.top_k_clusters=4"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("weights") / "bundle")


def test_samples_are_those_of_the_folder_and_name_the_commits(bundle: Path, hub: Hub) -> None:
    base = Base(model="sequential", sha256=fingerprint(load_checkpoint(bundle / "sequential")), step=1)
    write_adapter(Path("adapter"), load_model(bundle / "sequential"), base)
    weights, adapter = hub.commit_folder("someone/clips", bundle), hub.commit_folder("a/lora", Path("adapter"), "v1")
    words = ["sample", CAPTIONS[0], *SMALL]
    assert main([*words, "--model", str(bundle), "--adapter", "adapter:0.5", "--out", "local"]) == 0
    assert main([*words, "--model", "someone/clips", "--adapter", "a/lora@v1:0.5", "--out", "fetched"]) == 0
    assert Path("fetched/tokens.safetensors").read_bytes() == Path("local/tokens.safetensors").read_bytes()
    made_of = json.loads(Path("fetched/samples.json").read_text())["weights"]
    assert made_of == f"someone/clips@{weights} + a/lora@{adapter}:0.5"


@pytest.mark.slow
def test_training_starts_from_the_hub_and_records_the_commit(hub: Hub) -> None:
    data = prepare_data(Path("data"))
    train(settings(data, Path("trunk"), "image", train={"steps": 1}))
    commit = hub.commit_folder("someone/clips", Path("trunk/export"))
    hub.commit("someone/words", {"text.model": (data / "text.model").read_bytes()})
    words = {"data": {"text_tokenizer": "someone/words/text.model"}, "init": {"checkpoint": "someone/clips/trunk"}}
    train(settings(data, Path("fetched"), "sequential", train={"steps": 2}, **words))
    local = {"init": {"checkpoint": "trunk/export/trunk"}}
    train(settings(data, Path("local"), "sequential", train={"steps": 2}, **local))
    weights = [Path(run, "export/sequential/model.safetensors").read_bytes() for run in ("fetched", "local")]
    assert weights[0] == weights[1]
    pinned = f"someone/clips/trunk@{commit}"
    assert json.loads(Path("fetched/origin.json").read_text())["weights"]["init.checkpoint"] == pinned
    assert yaml.safe_load(Path("fetched/config.yaml").read_text())["init"]["checkpoint"] == pinned


def test_commands_take_names_of_the_hub(bundle: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.commit_folder("someone/clips", bundle)
    assert main(["inspect", "--checkpoint", "someone/clips/trunk", "--no-plan"]) == 0
    Path("captions.csv").write_text("video,caption\na.mp4,a zebra\n", encoding="utf-8")
    words = ["vocabulary", "--captions", "captions.csv", "--pieces", "300"]
    assert main([*words, "--tokenizer", "someone/clips/image_tokenizer", "--out", "text.model"]) == 0
    assert main([*words, "--extend", "someone/clips@main", "--out", "extended"]) == 0
    assert main(["extend", "someone/clips", "--num-frames", "6", "--out", "longer"]) == 0
    shown = capsys.readouterr().out
    for line in ("someone/clips/trunk@{}: ", "extended: someone/clips@{} with", "longer: someone/clips@{} with"):
        assert line.format(commit) in shown
    assert "snapshots" not in shown
    assert main(["merge", "someone/clips", "--adapter", "x", "--out", "out"]) == 2
    assert f"such as someone/clips/sequential@{commit}" in capsys.readouterr().err
    for command in (
        ["sample", "a", "--model", "someone/absent", "--out", "out"],
        ["sample", "a", "--model", str(bundle), "--adapter", "someone/absent:2", "--out", "out"],
        ["merge", "someone/absent", "--adapter", "x", "--out", "out"],
        ["eval", "--real", "digits", "--tokenizer", "someone/absent"],
        ["finetune", "someone/absent", "--captions", "captions.csv", "--out", "out"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "someone/absent is not a local folder" in error
        assert not Path("out").exists()


def test_conversion_reads_the_hub(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """From our format to the published one, the only one whose .pt files are fetched, and back."""
    ids = {"num_image_tokens": 8, "pad": 9, "newline": 10, "start_of_image": 11}
    sizes = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "text_len": 8, "frame_side": 2, "num_positions": 516}
    model = CogVideoTransformer(ModelConfig(**sizes, vocabulary=Vocabulary(16, **ids)))
    save_model(Path("model"), model)
    hub.commit_folder("someone/clips", Path("model"))
    assert main(["convert", "--from", "someone/clips", "--to", "sat", "--to-sat"]) == 0
    Path("sat/evil.pt").touch()
    commit = hub.commit_folder("someone/sat", Path("sat"), "v1")
    keys = [f"vocab.{name}={id}" for name, id in ids.items()]
    assert main(["convert", "--from", "someone/sat@v1", "--to", "back", *keys]) == 0
    assert f"someone/sat@{commit}: " in capsys.readouterr().out and "evil.pt" not in hub.downloads
    back = load_model(Path("back"))
    assert all(torch.equal(p, back.get_parameter(name)) for name, p in model.named_parameters())
    assert main(["convert", "--from", "someone/absent", "--to", "other"]) == 2
    assert "someone/absent is not a local folder" in capsys.readouterr().err and not Path("other").exists()


def test_finetuning_names_the_commit_in_its_commands(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    commit = hub.commit_folder("someone/clips", BUNDLED_WEIGHTS)
    assert main(["digits", "--out", "videos", "--count", "2", "--pixels", "80"]) == 0
    words = ["finetune", "someone/clips", "--captions", "videos/captions.jsonl", "--out", "tuned", "--device", "cpu"]
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"fixed by someone/clips@{commit}" in shown
    tokenizer = f"--tokenizer someone/clips/image_tokenizer@{commit}"
    for part in (tokenizer, f"--model someone/clips@{commit}", "--text-len 32 --report"):
        assert part in shown
    assert "snapshots" not in shown


def test_push(bundle: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["push", str(bundle), "someone/clips", "--license", "mit"]
    assert main(words) == 2
    assert "give --yes" in capsys.readouterr().err and not hub.requests
    assert main([*words, "--yes"]) == 2
    assert "hf auth login" in capsys.readouterr().err and not hub.repositories
    log_in(monkeypatch)
    assert main([*words, "--yes"]) == 0
    assert f"{hub.url}/someone/clips/commit/" in capsys.readouterr().out
    files = hub.newest("someone/clips")
    assert files["trunk/model.safetensors"] == (bundle / "trunk/model.safetensors").read_bytes()
    assert files["README.md"].startswith(b"---\nlicense: mit\n")
    assert main(["sample", CAPTIONS[0], *SMALL, "--model", "someone/clips", "--out", "out"]) == 0
    (Path("x")).mkdir()
    for folder, repo, message in ((Path("x"), "someone/x", "is not a bundle"), (bundle, "clips", "give USER/REPO")):
        assert main(["push", str(folder), repo, "--yes"]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", ["push {} someone/new --yes", "inspect --checkpoint someone/clips/trunk --no-plan"])
def test_an_interrupt_does_not_wait_for_the_hub(
    words: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra [hub]")
    ended, waited_in_vain = threading.Event(), []

    class StalledHandler(Handler):
        def stall(self) -> None:
            """Take 30 seconds, of a download a byte at a time."""
            os.kill(os.getpid(), signal.SIGTERM)
            self.close_connection = True
            with suppress(OSError):  # the client has gone
                if self.command == "GET":
                    self.send_response(200)
                    self.send_header("Content-Length", "300")
                    self.end_headers()
                for _ in range(300):
                    if ended.wait(0.1):
                        return
                    if self.command == "GET":
                        self.wfile.write(b" ")
                waited_in_vain.append(self.path)

        def do_GET(self) -> None:
            if "/resolve/" in self.path:
                self.stall()
            else:
                self.handle_request()

        do_PUT = stall

    with serving(StalledHandler) as hub:
        use(hub, tmp_path / "cache", monkeypatch)
        log_in(monkeypatch)
        hub.commit_folder("someone/clips", bundle)
        assert main(words.format(bundle).split()) == 128 + signal.SIGTERM
        ended.set()
        assert not waited_in_vain
        assert "push" not in words or list(hub.newest("someone/new")) == [".gitattributes"]
