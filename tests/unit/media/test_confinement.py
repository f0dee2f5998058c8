"""The limits of the process that runs FFmpeg, as the system has them."""

import subprocess
import sys

SCRIPT = """
import resource
from cogvideo.media.confinement import allow_memory, allow_seconds, confine, lift_memory_limit, within_seconds

def soft(kind):
    return resource.getrlimit(kind)[0]

allow_seconds(9)
allow_memory(1 << 30)
assert soft(resource.RLIMIT_CPU) == soft(resource.RLIMIT_DATA) == resource.RLIM_INFINITY, "no limits in other processes"
confine()
allow_seconds(90)
whole = soft(resource.RLIMIT_CPU)
assert 90 <= whole <= 95
with within_seconds(5):
    assert 5 <= soft(resource.RLIMIT_CPU) <= 10
assert soft(resource.RLIMIT_CPU) == whole
with within_seconds(500):
    assert soft(resource.RLIMIT_CPU) == whole, "a part may not take longer than the whole"
allow_memory(64 << 20)
try:
    bytearray(256 << 20)
except MemoryError:
    lift_memory_limit()
    bytearray(256 << 20)
    print("sound")
"""


def test_parts_have_limits_within_those_of_the_whole() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.stdout == "sound\n", done.stderr
