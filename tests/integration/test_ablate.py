"""scripts/ablate.py on a study of two variants: trains, scores, resumes; every shipped variant is a valid config."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogvideo.config import dump_yaml, load_config
from cogvideo.training.config import TrainConfig
from tests.helpers.training import prepare_data, settings

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("ablate", ROOT / "scripts/ablate.py")
assert _spec is not None and _spec.loader is not None
ablate = importlib.util.module_from_spec(_spec)
sys.modules["ablate"] = ablate
_spec.loader.exec_module(ablate)


@pytest.mark.parametrize("name", ["digits", "bodies"])
def test_every_shipped_variant_loads(name: str) -> None:
    study = ablate.read_study(ROOT / f"configs/ablate/{name}.yaml")
    assert len(study.seeds) == 3
    for _, runs in study.variants.values():
        for run in runs:
            config = load_config(TrainConfig, [ROOT / study.config], [*study.overrides, *run.overrides])
            assert config.data.validation is not None
    single = study.variants["single_channel"][1][0]
    assert load_config(TrainConfig, [], single.overrides).init.mix_logit == -100


def test_scores_are_weighted_by_frames_and_the_spread_is_over_seeds(tmp_path: Path) -> None:
    runs = [ablate.Run([], 4, 0.5), ablate.Run([], 4, 0.5)]
    assert ablate.score(runs, [1.0, 2.0]) == 1.5
    study = ablate.Study(Path("c"), tmp_path, [0, 1], 5, [], {"a": ("A", runs), "b": ("B", runs)})
    rows = ablate.summarise({"a": {0: 3.0, 1: 5.0}, "b": {0: 2.0}}, study)
    assert [row["variant"] for row in rows] == ["b", "a"]
    assert rows[1]["mean"] == 4.0 and rows[1]["spread"] == pytest.approx(2**0.5) and rows[0]["spread"] is None


@pytest.mark.slow
def test_a_small_study_runs_and_resumes(tmp_path: Path) -> None:
    data = prepare_data(tmp_path / "prepared")
    config = settings(data, tmp_path / "run", data={"validation": data / "clips"}, log={"validation_batches": 1})
    (tmp_path / "small.yaml").write_text(dump_yaml(config), encoding="utf-8")
    single = {"what": "one channel", "runs": [{"set": ["init.mix_logit=-100.0"]}]}
    halves = [{"set": [], "frames": 4, "share": 0.5}, {"set": ["task=interpolation"], "frames": 4, "share": 0.5}]
    variants = {"single": single, "two_stages": {"what": "both", "runs": halves}}
    study = {"config": str(tmp_path / "small.yaml"), "out": str(tmp_path / "out"), "seeds": [0], "steps": 4, "set": []}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"variants": variants}), encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts/ablate.py"), "--study", str(tmp_path / "study.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert {row["variant"] for row in results["rows"]} == {"single", "two_stages"}
    assert "| two_stages | both |" in done.stdout and (tmp_path / "out/curves.png").stat().st_size > 1000
    lines = (tmp_path / "out/runs/single/0/seed_0/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["alpha/layer_0"] == json.loads(lines[-2])["alpha/layer_0"] < 1e-40
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "training" not in again.stderr
    assert again.stdout and done.stdout == again.stdout


def pretend_to_train(job: Any, loss: float) -> None:
    """Write what a finished run leaves behind, without training it."""
    config = load_config(TrainConfig, [job.config], job.words)
    (job.folder / f"checkpoints/step_{job.steps:08d}").mkdir(parents=True, exist_ok=True)
    (job.folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    line = {"step": job.steps, "validation/loss": loss}
    (job.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")


def run_study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *words: str) -> int:
    """Run the script on a study of three variants, with runs that end at once."""
    runs = {"one": [], "two": ["init.mix_logit=4.0"], "three": ["model.window_size=5"]}
    variants = {name: {"what": name, "runs": [{"set": settings}]} for name, settings in runs.items()}
    study = {"config": str(ROOT / "configs/train/debug.yaml"), "out": str(tmp_path / "out"), "seeds": [0, 1]}
    study |= {"steps": 40, "set": [], "variants": variants}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    trained: list[Path] = []

    def train(job: Any) -> None:
        pretend_to_train(job, 2.0 + len(trained))
        trained.append(job.folder)

    monkeypatch.setattr(ablate.Job, "train", train)
    monkeypatch.setattr(ablate, "draw", lambda curves, path: None)
    monkeypatch.setattr(sys, "argv", ["ablate.py", "--study", str(tmp_path / "study.yaml"), *words])
    code = ablate.main()
    (tmp_path / "trained").write_text(str(len(trained)))
    return code


def variants_in(tmp_path: Path) -> dict[str, int]:
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    return {row["variant"]: row["seeds"] for row in rows}


def test_results_hold_every_finished_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_study(monkeypatch, tmp_path, "--only", "two") == 0
    assert variants_in(tmp_path) == {"two": 2}
    assert run_study(monkeypatch, tmp_path, "--only", "one") == 0
    assert variants_in(tmp_path) == {"one": 2, "two": 2} and (tmp_path / "trained").read_text() == "2"
    assert run_study(monkeypatch, tmp_path) == 0
    assert variants_in(tmp_path) == {"one": 2, "two": 2, "three": 2} and (tmp_path / "trained").read_text() == "2"


@pytest.mark.parametrize("word", ["optimiser.lr=0.5", "log.validation_batches=3", "train.batch_size=4"])
def test_scores_of_other_settings_are_not_used(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_study(monkeypatch, tmp_path, "--only", "one") == 0
    assert run_study(monkeypatch, tmp_path, word, "--only", "one") == 2
    key, _, value = word.partition("=")
    assert f"one/0/seed_0 was begun with {key}=" in (said := capsys.readouterr().err) and f"(now {value})" in said
    assert run_study(monkeypatch, tmp_path, word, "--only", "two") == 0
    assert variants_in(tmp_path) == {"two": 2} and "the results leave it out" in capsys.readouterr().err
    assert run_study(monkeypatch, tmp_path, "--only", "one", "--steps", "20") == 2


@pytest.mark.parametrize("word", ["log.every=7", "log.wandb=offline", "train.num_threads=3", "export.weights=last"])
def test_runs_whose_score_cannot_change_stay_finished(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in ([], [word]):
        assert run_study(monkeypatch, tmp_path, *words) == 0
    assert (tmp_path / "trained").read_text() == "0"


@pytest.mark.parametrize("name", ["digits", "bodies"])
def test_finished_runs_of_shipped_studies_stay_finished(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = ablate.read_study(ROOT / f"configs/ablate/{name}.yaml")
    for variant, (_, runs) in study.variants.items():
        for index, run in enumerate(runs):
            job = ablate.Job.of(study, run, 1, tmp_path / variant / str(index), [])
            pretend_to_train(job, 1.0)
            assert job.is_finished and not job.changes()


def test_no_steps_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_study(monkeypatch, tmp_path, "--steps", "0")
    assert "--steps 0; expected at least 1" in capsys.readouterr().err.splitlines()[-1]


def test_a_fetched_commit_is_no_change() -> None:
    commit = "0123456789" * 4
    assert ablate._is_fetched(f"user/repo/trunk@{commit}", "user/repo/trunk")
    assert ablate._is_fetched(f"user/repo@{commit}", "user/repo@main")
    assert not ablate._is_fetched(f"user/other@{commit}", "user/repo") and not ablate._is_fetched("a@v1", "a@v2")
