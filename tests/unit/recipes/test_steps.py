"""Steps of a recipe: what is skipped, what a failure says, schedules that fill a time."""

import json
import subprocess

import pytest

from cogvideo.recipes import steps
from cogvideo.recipes.steps import Step, StepError, check_trained, choose_steps, is_trained, run, schedule_for


def test_finished_steps_are_skipped_unless_they_are_named(tmp_path):
    (tmp_path / "a").touch()
    recipe = [Step("a", tmp_path / "a", []), Step("b", tmp_path / "b", []), Step("c", None, [])]
    assert [step.name for step in choose_steps(recipe, None)] == ["b", "c"]
    assert [step.name for step in choose_steps(recipe, ["a"])] == ["a"]
    with pytest.raises(ValueError, match="no step is named d; choose from a, b, c"):
        choose_steps(recipe, ["d"])


def test_a_failed_step_ends_the_recipe():
    with pytest.raises(StepError, match=r"\[wrong\] failed with exit code 2; run again"):
        run(Step("wrong", None, ["no-such-command"]))


def test_a_command_in_several_processes_is_launched_by_torchrun_on_a_free_port():
    step = Step("train", None, ["train", "--config", "a b.yaml"], processes=2)
    options = "--standalone --local-addr 127.0.0.1 --nproc-per-node 2"
    assert step.shown == f"torchrun {options} -m cogvideo train --config 'a b.yaml'"
    assert step.command[1:] == ["-m", "torch.distributed.run", *options.split(), "-m", "cogvideo", *step.words]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_command_gets_the_users_gpus_and_time_to_save(monkeypatch, processes):
    started = {}

    def run_child(command, **options):
        started.update(options)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(steps, "run_child", run_child)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    run(Step("train", None, ["train"], processes))
    assert started["env"]["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert int(started["env"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 600
    assert started.get("start_new_session", False) is (processes > 1)


@pytest.mark.parametrize(("seconds", "expected"), [(100.0, 75), (0.0, 25)])
def test_schedule_fills_the_time(tmp_path, monkeypatch, seconds, expected):
    """1.5 seconds per step, 15 steps taken already: 0.9 of the time is filled, at least 10 steps."""
    monkeypatch.setattr(steps.time, "monotonic", lambda: 0.0)
    lines = [{"step": step, "seconds_per_step": 1.5} for step in (5, 10, 15)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    schedule = schedule_for(Step("train", None, ["train"]), tmp_path, seconds)
    assert schedule == {"train.steps": expected, "log.save_every": 80}


def test_a_cut_line_of_metrics_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(steps.time, "monotonic", lambda: 0.0)
    line = json.dumps({"step": 15, "seconds_per_step": 1.5}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line + line[:12])
    assert schedule_for(Step("train", None, ["train"]), tmp_path, 100.0)["train.steps"] == 75


@pytest.mark.parametrize(("latest", "expected"), [("step_00000020", True), ("step_00000010", False)])
def test_a_stopped_run_is_not_finished(tmp_path, latest, expected):
    (tmp_path / "config.yaml").write_text("task: tokenizer\ntrain: {steps: 20, stop_at: 10}\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/latest").write_text(latest)
    assert is_trained(tmp_path) is expected
    if not expected:
        with pytest.raises(StepError, match="was stopped"):
            check_trained(Step("train", None, []), tmp_path)
