"""Damage files of every kind that the package reads, thousands of times, and count how reading them ends.

    python scripts/fuzz_files.py [--count 1000] [--seed 0] [--only KIND]

`tests/helpers/damage.py` says what is changed. Reading must succeed, or end in a ValueError or OSError of one line that
names the file. Prints a line per kind of folder; the exit code is 1 if anything else happened. `--count` is per kind.
"""

import argparse
import resource
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.damage import fuzz, kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND")
    args = parser.parse_args()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    ok = True
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind in kinds(Path(scratch)).items():
            if args.only in (None, name):
                folder = Path(scratch) / f"fuzz-{name}"
                folder.mkdir()
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                outcomes, faults = fuzz(kind, args.count, args.seed, folder)
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
                print(f"{name}: {counts}; peak memory {peak // 1024} MiB, {(peak - before) // 1024} more", flush=True)
                for fault, example in faults.items():
                    print(f"  {example} {fault}")
                ok = ok and not faults
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
