"""Fuzz the file readers with atheris, which looks for inputs that reach new code (pip install atheris).

    python scripts/fuzz_readers.py [--minutes 1] [--reader NAME] [--out fuzzing]

Each reader of `tests/helpers/readers.py` runs for `--minutes` in its own process. Reading must succeed, or raise a
ValueError or OSError whose message is one line and names the file. Inputs that do anything else are kept in OUT/NAME,
with a line in OUT/NAME.txt; the exit code is 1 if there are any. The next call continues from OUT/NAME.corpus.
"""

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: F401  (before the instrumentation, which is for our files)

MAX_MEMORY_MB = 1024
MAX_SECONDS = 20
"""For one input."""
MAX_BYTES = 16384
PACKAGES = ["cogvideo"]
"""Packages to instrument."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each reader")
    parser.add_argument("--reader", metavar="NAME", help="only this one")
    parser.add_argument("--out", type=Path, default=Path("fuzzing"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        fuzz(args.reader, args.out, args.minutes, args.inside)
    from tests.helpers.readers import readers

    with tempfile.TemporaryDirectory() as scratch:
        names = list(readers(Path(scratch)))
    if args.reader not in (None, *names):
        parser.error(f"--reader {args.reader}: expected one of {', '.join(names)}")
    args.out.mkdir(parents=True, exist_ok=True)
    # a list: a generator would stop at the first reader with a fault
    return 0 if all([run(name, args) for name in names if args.reader in (None, name)]) else 1


def run(name: str, args: argparse.Namespace) -> bool:
    """Fuzz one reader in another process and print how it went; returns whether no fault was found."""
    options = ["--reader", name, "--minutes", str(args.minutes), "--out", str(args.out)]
    with tempfile.TemporaryDirectory() as scratch, open(args.out / f"{name}.log", "w+b") as log:
        command = [sys.executable, __file__, "--inside", scratch, *options]
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        log.seek(0)
        text = log.read().decode(errors="replace")
    faults = args.out / f"{name}.txt"
    lines = faults.read_text().splitlines() if faults.is_file() else []
    numbers = {key: re.findall(pattern, text) for key, pattern in (("runs", r"#(\d+)\t"), ("edges", r" cov: (\d+)"))}
    runs, edges = (int(found[-1]) if found else 0 for found in numbers.values())
    memory = max(map(int, re.findall(r"rss: (\d+)Mb", text)), default=0)
    ended = "" if code == 0 else f"; the process ended with {code}, see {log.name}"
    print(f"{name}: {runs} inputs, {edges} edges, {memory} MB, {len(lines)} faults{ended}", flush=True)
    for line in lines:
        print(f"  {line}")
    return code == 0 and not lines and runs > 0


def fuzz(name: str, out: Path, minutes: float, scratch: Path) -> None:
    """Fuzz one reader, with its files in `scratch`. Ends this process without cleaning up."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES, enable_loader_override=False):
        from cogvideo.logs import one_line
        from tests.helpers.readers import readers
    reader = readers(scratch)[name]
    corpus, kept = out / f"{name}.corpus", out / name
    for folder in (corpus, kept):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(reader.seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    folder = scratch / "file"
    folder.mkdir()
    path = folder / f"damaged{reader.suffix}"
    seen: set[str] = set()

    def report(fault: str, data: bytes) -> None:
        if fault not in seen:
            seen.add(fault)
            (kept / f"fault{len(seen)}").write_bytes(data)
            with open(out / f"{name}.txt", "a", encoding="utf-8") as file:
                file.write(f"fault{len(seen)}: {fault}\n")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            reader.read(path)
        except (ValueError, OSError) as error:
            line = one_line(error)
            if path.stem not in line and folder.name not in line:
                report(f"does not name the file: {type(error).__name__} {re.sub('[0-9]+', 'N', line)[:80]!r}", data)
            elif len(line) > 2000:
                report("the message is too long", data)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            report(f"{type(error).__name__} {at.filename}:{at.lineno} {str(error)[:100]!r}", data)

    limits = [f"-rss_limit_mb={MAX_MEMORY_MB}", f"-timeout={MAX_SECONDS}", f"-max_total_time={round(60 * minutes)}"]
    largest = max(MAX_BYTES, max(map(len, reader.seeds)))
    atheris.Setup([sys.argv[0], *limits, f"-max_len={largest}", f"-artifact_prefix={kept}/", str(corpus)], read)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
