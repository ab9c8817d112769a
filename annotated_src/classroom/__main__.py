"""Write notebooks for a class: `python -m annotated_src.classroom`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from annotated_src.classroom.course import build, prove
from annotated_src.classroom.plan import update
from annotated_src.exercises import CHAPTERS


def make_parser() -> argparse.ArgumentParser:
    """Describe the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m annotated_src.classroom",
        description="Write notebooks for students, solved ones, and a course for "
        "nbgrader. What students have handed in stays where it is.",
    )
    parser.add_argument("--out", type=Path, default=Path(".build/exercises"))
    parser.add_argument("--chapters", nargs="+", default=list(CHAPTERS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=1, help="draws the hidden inputs")
    parser.add_argument("--book", default="", help="where the book stands on the web")
    parser.add_argument(
        "--minutes",
        type=Path,
        metavar="PAGE",
        help="only bring the minutes of a page up to date",
    )
    return parser


def main() -> None:
    """Run the command; an error is one line, and exit status 1."""
    parser = make_parser()
    options = parser.parse_args()
    try:
        if options.minutes:
            update(options.minutes)
            return
        count = prove(options.chapters, options.seed)
        files = build(options.out, options.chapters, options.seed, options.book)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    said = f"{count} right and wrong solutions tried on the inputs of seed"
    sys.stdout.write(f"{said} {options.seed}\n{len(files)} files in {options.out}\n")


if __name__ == "__main__":
    main()
