"""scripts/launch.sh and signals: with a stand-in for DeepSpeed's command, over ssh and on this machine."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OVER_SSH = "trap 'echo deepspeed >>ended; kill $!; exit 1' TERM\nsleep 600 &\n"
TRAINING = "trap 'echo training >>ended; exit 0' TERM; while :; do sleep 0.1; done"
LOCAL = f"trap 'echo deepspeed >>ended; exit 1' TERM\nbash -c \"{TRAINING}\" -m cogvideo train &\n"


@pytest.mark.parametrize(
    ("stand_in", "variables", "ended"),
    [
        (OVER_SSH, {"HOSTFILE": "hosts"}, "deepspeed"),
        (LOCAL, {}, "training"),
        (LOCAL, {"HOSTFILE": "hosts"}, "training"),
    ],
)
def test_a_signal_ends_the_launch(stand_in: str, variables: dict[str, str], ended: str, tmp_path: Path) -> None:
    command = tmp_path / "deepspeed"
    command.write_text(f'#!/usr/bin/env bash\ncd {tmp_path}\necho "$@" >words\n{stand_in}wait\necho over >>ended\n')
    command.chmod(0o755)
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    words = {name: str(tmp_path / value) for name, value in variables.items()}
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CONFIG": "x", "MACHINE": "cpu"} | words
    script = subprocess.Popen([ROOT / "scripts/launch.sh", "a=1"], env=environment)
    while not (tmp_path / "words").is_file():
        time.sleep(0.1)
    time.sleep(0.5)
    script.send_signal(signal.SIGTERM)
    assert script.wait(20) == 143
    assert (tmp_path / "ended").read_text().split()[0] == ended
    assert ("--hostfile" in (tmp_path / "words").read_text()) == ("HOSTFILE" in variables)
