"""Make captions for public data sets from the files they come with; docs/guides/recipes.md has the next steps.

    python scripts/recipes/captions.py ucf101 UCF-101 --list ucfTrainTestlist/trainlist01.txt
    python scripts/recipes/captions.py kinetics600 kinetics600/train --list annotations/train.csv

Writes captions.csv, for `cogvideo prepare --captions`, and classes.txt, prompts for `cogvideo sample` and `eval`, into
the folder of videos. A caption is the name of the video's class, split into words.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

from cogvideo.cli.main import run_command
from cogvideo.files import atomic_write
from cogvideo.text import decode_text, split_lines

Rows = list[tuple[str, str]]
"""Pairs of a video's path, relative to the folder, and its caption."""


def ucf101(folder: Path, lines: list[str]) -> tuple[Rows, int]:
    """Rows for a split's list, with `Class/video.avi [number]` per line, and how many of its videos are missing."""
    rows, missing = Rows(), 0
    for line in filter(None, map(str.strip, lines)):
        path = line.split()[0]
        if (folder / path).is_file():
            rows.append((path, class_words(path.partition("/")[0])))
        else:
            missing += 1
    return rows, missing


def kinetics600(folder: Path, lines: list[str]) -> tuple[Rows, int]:
    """Rows of an annotations file (label, youtube_id, time_start, time_end), and how many videos are missing.

    Videos are named `ID_START_END.mp4`, with six digits for each time, and may be anywhere in the folder.
    """
    found = {path.stem: path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.mp4"))}
    try:
        names = [(_kinetics_name(record), record["label"].strip()) for record in csv.DictReader(lines)]
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error):
        raise ValueError(
            "not an annotations file of Kinetics; expected columns label, youtube_id, time_start, time_end"
        ) from None
    rows, missing = Rows(), 0
    for name, label in names:
        if name in found:
            rows.append((found[name], label))
        else:
            missing += 1
    return rows, missing


def _kinetics_name(record: dict[str, str]) -> str:
    return f"{record['youtube_id']}_{float(record['time_start']):06.0f}_{float(record['time_end']):06.0f}"


def class_words(name: str) -> str:
    """ApplyEyeMakeup -> apply eye makeup; YoYo -> yo yo; TaiChi -> tai chi."""
    return " ".join(re.findall(r"[A-Z][a-z]*|[a-z]+|\d+", name)).lower()


def run(data_set: str, folder: Path, file: Path) -> None:
    lines = split_lines(decode_text(file.read_bytes(), str(file)))
    rows, missing = (ucf101 if data_set == "ucf101" else kinetics600)(folder, lines)
    if not rows:
        raise ValueError(f"{folder} has none of the {missing:,} videos that {file} lists; give the folder with them")
    with atomic_write(folder / "captions.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([("video", "caption"), *rows])
    classes = sorted({caption for _, caption in rows})
    with atomic_write(folder / "classes.txt") as temporary:
        temporary.write_text("\n".join(classes) + "\n", encoding="utf-8")
    print(f"{folder / 'captions.csv'}: {len(rows):,} videos of {len(classes)} classes; {missing:,} are missing")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_set", choices=("ucf101", "kinetics600"))
    parser.add_argument("folder", type=Path, help="folder of the videos")
    parser.add_argument("--list", type=Path, required=True, metavar="FILE", help="the published list of the split")
    args = parser.parse_args()
    return run_command(lambda: run(args.data_set, args.folder, args.list), "captions")


if __name__ == "__main__":
    sys.exit(main())
