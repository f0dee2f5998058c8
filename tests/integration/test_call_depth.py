"""How much code a reader passes from a prompt to the first forward: files of the package that run, and stack depth.

A process of its own is profiled, so that nothing is imported or cached beforehand.
"""

import json
import subprocess
import sys
from pathlib import Path

MAX_FILES = 43  # hub.py, interrupts.py and cli/_common.py came with hub names and signals that wait
MAX_FRAMES = 10

PROFILE = '''
import inspect, json, sys, threading
from pathlib import Path
import cogvideo
from cogvideo.cli.main import main

PACKAGE = str(Path(cogvideo.__file__).parent)
called, stack = {}, []


class FirstForward(BaseException):
    pass


def frames_of_package(frame):
    """Function calls of the package on the stack, outermost first."""
    names = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            names.append(f"{frame.f_code.co_filename[len(PACKAGE) + 1:]}: {frame.f_code.co_qualname}")
        frame = frame.f_back
    return names[::-1]


def is_importing(frame):
    """Whether a module of the package is being imported, which calls decorators and constructors."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


def profile(frame, event, argument):
    code = frame.f_code
    is_function = code.co_flags & inspect.CO_OPTIMIZED  # the bodies of modules and classes are not
    if event != "call" or stack or not is_function or not code.co_filename.startswith(PACKAGE):
        return
    file = code.co_filename[len(PACKAGE) + 1:]
    if file not in called and not is_importing(frame):
        called[file] = code.co_qualname
    if code.co_qualname == "CogVideoTransformer.forward":
        stack.extend(frames_of_package(frame))
        raise FirstForward


threading.setprofile(profile)
sys.setprofile(profile)
try:
    main(["sample", "the red digit 3 moves left slowly", "rounds=1", "--out", sys.argv[1]])
except FirstForward:
    pass
sys.setprofile(None)
print(json.dumps({"called": called, "stack": stack}))
'''


def test_from_a_prompt_to_the_first_forward(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROFILE, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    stack, files = result["stack"], sorted(result["called"])
    assert stack[0] == "cli/main.py: main" and stack[-1] == "model/transformer.py: CogVideoTransformer.forward"
    assert len(stack) <= MAX_FRAMES, "\n".join(stack)
    assert len(files) <= MAX_FILES, "\n".join(f"{file}: {result['called'][file]}" for file in files)
