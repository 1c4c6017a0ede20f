"""A class: ``aigc class make`` writes the students' notebooks, ``aigc class grade`` runs and judges what comes back.

Grading keeps accidents apart: a crash, an endless loop or eaten memory costs one exercise of one student. It is no wall
against malice: what is graded runs as you, so grade a class that you do not trust in a container.
"""

# Nothing heavy is imported up here: the command line asks for the options only.
import argparse
from pathlib import Path


def add_commands(add, within) -> None:
    """Add the commands and their options to ``within``, by ``add(name, command, within)``."""
    making = add("make", make, within)
    making.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    making.add_argument("number", nargs="*", type=int, metavar="NUMBER", help="lessons (default: all)")
    grading = add("grade", grade, within)
    grading.add_argument("submissions", type=Path, metavar="SUBMISSIONS", help="a folder with one folder per student")
    grading.add_argument("--out", type=Path, metavar="DIR", help="where the results go (default: build/class)")
    grading.add_argument("--seconds", type=float, default=60.0, metavar="N", help="for one exercise (default 60)")
    grading.add_argument("--memory", type=float, default=4000.0, metavar="MB", help="for one notebook (default 4000)")
    grading.add_argument("--jobs", type=int, default=1, metavar="N", help="notebooks at a time (default 1)")
    grading.add_argument("--all", action="store_true", help="run every cell, not only the exercises and the imports")


def make(args: argparse.Namespace) -> int:
    """Write the students' notebooks: without worked answers, teacher's cells and outputs."""
    from .masters import dead_links, make

    paths = make(args.out, args.number)
    print("\n".join(map(str, paths)))
    if dead := dead_links(paths):
        print("Links that lead nowhere there: " + "; ".join(dead))
    return 0


def grade(args: argparse.Namespace) -> int:
    """Grade what students handed in: CSV tables, and a page on the class's misconceptions."""
    from .grading import grade

    limits = {"seconds": args.seconds, "memory": args.memory, "jobs": args.jobs}
    return grade(args.submissions, args.out, everything=args.all, **limits)
