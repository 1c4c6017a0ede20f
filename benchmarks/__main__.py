"""``python -m benchmarks``: time the course beside its peers, and write what was found."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .clock import Result, Row
    from .report import Lessons

FOLDER = Path(__file__).resolve().parent
LESSON = re.compile(r"^(\S+): (passed|FAILED).* \(([\d.]+) s, \d+ MB\)$", re.MULTILINE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a row or a lesson failed or missed what is required of it, else 0."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.redraw:
        from . import report

        *stored, sizes = report.read(args.out or FOLDER)
        report.write(*stored, args.out or FOLDER, sizes)
        return 0

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(args.threads)  # before NumPy and torch are loaded; lessons inherit it
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks of its own affairs
    import torch

    from aigc_course.runtime import keep_freed_memory

    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as fit does, so that both sides have it from the first sample on
    chosen = rows()
    if unknown := sorted(set(args.key) - {row.key for row in chosen}):
        parser.error(f"there is no row {unknown[0]}: the rows are {', '.join(row.key for row in chosen)}")
    chosen = [row for row in chosen if not args.key or row.key in args.key]
    if args.list:
        width = max(len(row.key) for row in chosen)
        for row in chosen:
            print(f"{row.key:<{width}}  {row.workload} / {row.peer}: {row.required:g}x required, {row.aim:g}x the aim")
        return 0
    return measure(chosen, args.threads, args.out or (None if args.key else FOLDER), not args.key, not args.no_lessons)


def rows() -> list["Row"]:
    """All rows, in the order of the table."""
    from . import images, language, mixtures

    found = [*images.ROWS, *mixtures.ROWS, *language.ROWS]
    keys = [row.key for row in found]
    assert len(set(keys)) == len(keys), f"a key names two rows: {sorted(keys)}"
    return found


def measure(chosen: Sequence["Row"], threads: int, folder: Path | None, everything: bool, with_lessons: bool) -> int:
    """Time the rows ``chosen``; with ``everything`` the lessons and the cost against size too. Returns the exit status.

    The page is written into ``folder``, if there is one, after each part: an interruption loses only what follows.
    """
    from . import report, roofline
    from .clock import compare

    width = max(len(row.key) for row in chosen)
    start, results, lessons, sizes = time.perf_counter(), [], None, ""
    rates = roofline.rates() if folder else None
    facts = report.facts(threads) if folder else {}

    def write() -> None:
        if folder:
            report.write(results, rates, lessons, facts, folder, sizes)

    for row in chosen:
        results.append(compare(row))
        print(f"{row.key:<{width}}  {line(results[-1])}", flush=True)
        if results[-1].profile and not folder:
            print(results[-1].profile, flush=True)
    write()
    if everything and with_lessons:
        lessons = time_lessons(threads)
        for name, seconds in lessons.seconds.items():
            print(f"{name}: {seconds:.1f} s{', failed' if name in lessons.failed else ''}")
        print(f"all lessons: {lessons.total:.1f} s", flush=True)
        write()
    if everything:
        sizes = cost_against_size(folder)
        write()
    print(f"{sum(result.met for result in results)} of {len(results)} rows are met", end="")
    print(f"; {folder / 'RESULTS.md'}" if folder else "", f"({(time.perf_counter() - start) / 60:.1f} minutes)")
    return 0 if all(result.met for result in results) and (lessons is None or lessons.met) else 1


def line(result: "Result") -> str:
    """One line for the terminal."""
    from statistics import median

    from .report import verdict

    row = result.row
    if result.error:
        return f"failed: {result.error} ({result.took:.0f} s)"
    ours, theirs = (median(samples) / result.units for samples in (result.ours, result.theirs))
    least, greatest = result.spread
    return (
        f"{result.ratio:.2f}x ({least:.2f}-{greatest:.2f}), required {row.required:g}x, aim {row.aim:g}x: "
        f"{verdict(result)}; {ours:.4g} s to {theirs:.4g} s per {result.unit}; {result.rejected} couples rejected "
        f"({result.took:.0f} s)"
    )


def time_lessons(threads: int, run: Callable[..., subprocess.CompletedProcess] = subprocess.run) -> "Lessons":
    """Execute all lessons, one after the other, as ``aigc course`` does, with no earlier runs to take up."""
    from .clock import machine_seconds
    from .report import Lessons

    aigc = "import sys; from aigc_course.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", aigc, "course", "--profile", "quick"]
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "AIGC_RUN_DIR": str(Path(folder, "runs"))}
        machine, own, start = machine_seconds(), _own_seconds(), time.perf_counter()
        done = run([*command, "--out", folder], env=env, capture_output=True, text=True, encoding="utf-8")
        total = time.perf_counter() - start
        foreign = machine_seconds() - machine - (_own_seconds() - own)
    found = LESSON.findall(done.stdout)
    failed = [name for name, verdict, _ in found if verdict == "FAILED"]
    if done.returncode and not failed:
        failed = ["aigc course"]
    if failed:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    seconds = {name: float(seconds) for name, _, seconds in found}
    return Lessons(seconds=seconds, failed=failed, total=total, foreign=max(foreign, 0.0))


def cost_against_size(folder: Path | None) -> str:
    """Measure it, draw cost.png into ``folder``, and return the table."""
    from . import sizes

    series = sizes.measure()
    if folder:
        sizes.draw(series, folder / "cost.png")
    return sizes.table(series)


def _own_seconds() -> float:
    """CPU seconds of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time the course beside its peers.")
    parser.add_argument("key", nargs="*", metavar="KEY", help="rows to time (default: all, with the lessons and sizes)")
    parser.add_argument("--list", action="store_true", help="list the rows and time none")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the page goes (default: benchmarks/, or nowhere)"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="for both sides (default 2)")
    parser.add_argument("--no-lessons", action="store_true", help="leave the lessons out")
    parser.add_argument("--redraw", action="store_true", help="write the page and the chart anew from results.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
