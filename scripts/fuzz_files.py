"""Damage files of every kind that the package reads, thousands of times, and count how reading them ends.

    python scripts/fuzz_files.py [--count 1000] [--seed 0] [--only KIND]

`tests/helpers/damage.py` defines the damage. Reading must succeed, or raise a ValueError or OSError whose message is
one line and names the file. Prints a line per kind and one for all; the exit code is 1 if anything else happened.
`--count` is per kind. Memory is the process's peak, and its increase over the peak before the first damaged file.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cogvideo.training.resources import peak_memory_mib
from tests.helpers.damage import fuzz, kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND")
    args = parser.parse_args()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    total: Counter[str] = Counter()
    num_faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        every = kinds(Path(scratch))
        if args.only not in (None, *every):
            parser.error(f"--only {args.only}: expected one of {', '.join(every)}")
        start = peak_memory_mib(torch.device("cpu"))
        for name, kind in every.items():
            if args.only in (None, name):
                folder = Path(scratch) / f"fuzz-{name}"
                folder.mkdir()
                outcomes, faults = fuzz(kind, args.count, args.seed, folder)
                print(f"{name}: {describe(outcomes, start)}", flush=True)
                for fault, example in faults.items():
                    print(f"  {example} {fault}")
                total += outcomes
                num_faults += len(faults)
    print(f"{total.total()} damaged: {describe(total, start)}; {num_faults} faults")
    return 1 if num_faults else 0


def describe(outcomes: Counter[str], start: float) -> str:
    peak = peak_memory_mib(torch.device("cpu"))
    counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    return f"{counts}; peak memory {peak:.0f} MiB, {peak - start:.0f} above the start"


if __name__ == "__main__":
    sys.exit(main())
