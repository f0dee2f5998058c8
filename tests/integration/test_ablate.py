"""scripts/ablate.py on a study of two variants: trains, scores, resumes; every shipped variant is a valid config."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

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
