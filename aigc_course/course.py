"""The whole course at once: execute each lesson, keep what its last cell recorded, store it, measure its bands."""

import ast
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from .checkpoints import writable, write_atomically
from .pages import Result, figure_line, first_line, index_page, read_notebook, render, settle_outputs, title_of
from .runtime import CourseError, course_dir, pick_profile

if TYPE_CHECKING:
    from nbformat import NotebookNode

INSERTED = {"injected-parameters", "papermill-error-cell-tag"}  # the tags of cells that papermill adds
TIMING = ("papermill", "execution", "ExecuteTime")
CELL_TIMEOUT = {"quick": 300}  # seconds; at the full profile a cell may take its time


def lessons() -> list[Path]:
    """The lessons' notebooks, in order."""
    return sorted((course_dir() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def run_lesson(
    path: Path,
    out: Path,
    *,
    profile: str = "quick",
    parameters: dict[str, Any] | None = None,
    cell_timeout: int | None = None,
    on_tick: Callable[[str], None] = lambda progress: None,
) -> Result:
    """Execute the notebook ``path`` in a fresh kernel, in its own folder, into ``out``.

    ``parameters`` replace those in the cell tagged ``parameters``; PROFILE joins them if that cell sets another.
    A lesson passes if no cell raises and its record, written by the last cell, says so. It fails at the first cell that
    takes longer than ``cell_timeout`` seconds (0: none does; default 300 at the quick profile, 0 at the full one).
    ``on_tick`` is told the seconds and the cell several times a second. Raises ``CourseError`` for a parameter that the
    lesson does not have.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    path, out = Path(path).resolve(), Path(out).resolve()
    profile, nb = pick_profile(profile), read_notebook(path)
    known, given = _parameters_of(nb), dict(parameters or {})
    if unknown := sorted(given.keys() - known.keys()):
        names = ", ".join(sorted(known)) or "none"
        raise CourseError(f"{path.name} has no parameter {', '.join(unknown)}: its parameters are {names}")
    if known.get("PROFILE") not in (None, profile):  # None leaves the choice to AIGC_PROFILE, which is set below
        given.setdefault("PROFILE", profile)

    if cell_timeout is None:
        cell_timeout = CELL_TIMEOUT.get(profile, 0)
    record, executed = out / "records" / f"{path.stem}.json", out / path.name
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    cell, error = [0], ""  # papermill counts a cell that it injects
    start = time.perf_counter()
    with (
        patch.dict(os.environ, AIGC_RECORD_DIR=str(record.parent), AIGC_PROFILE=profile),
        _watch(lambda seconds: on_tick(f"{seconds:.0f} s, cell {cell[0]} of {len(nb.cells)}")) as peak,
    ):
        try:
            papermill.execute_notebook(
                path,
                executed,
                given,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=path.parent,
                execution_timeout=cell_timeout,
                extra_arguments=["--log-level=CRITICAL"],  # the kernel warns of its TCP ports at every start
                on_cell_start=lambda cell_index, **_: cell.__setitem__(
                    0, cell_index + (not given)
                ),  # injected: one more
            )
        except PapermillExecutionError as failure:
            error = f"In [{failure.exec_count}]: {failure.ename}: {first_line(failure.evalue)}"
        except CellTimeoutError:
            error = f"cell {cell[0]} did not end within {cell_timeout} s: mend it, or allow more with --cell-timeout"
        except DeadKernelError:
            error = (
                f"cell {cell[0]} ended its kernel: it crashed, or memory ran out (aigc doctor says how much there is)"
            )
        except Exception as failure:  # the kernel never started
            error = f"cell {cell[0]}: {type(failure).__name__}: {first_line(str(failure))}"
    seconds = time.perf_counter() - start
    complaint, figures = _read_record(record)
    error = error or complaint
    return Result(
        lesson=path.stem,
        title=title_of(nb, path.stem),
        notebook=executed,
        seconds=seconds,
        peak_mb=peak[0] / 1e6,
        passed=not error,
        error=error,
        figures=figures,
    )


def clean(nb: "NotebookNode") -> "NotebookNode":
    """A copy of ``nb`` fit to be committed: no widget state, no timings, nothing of papermill's or of this machine."""
    import nbformat

    nb = nbformat.from_dict(nb)
    nb.cells = [cell for cell in nb.cells if not INSERTED & set(cell.metadata.get("tags", []))]
    for cell in nb.cells:
        settle_outputs(cell)
        for key in TIMING:
            cell.metadata.pop(key, None)
    for key in ("papermill", "widgets"):
        nb.metadata.pop(key, None)
    nb.metadata.kernelspec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata.language_info = {"name": "python"}
    return nb


def store(paths: Sequence[Path], out: Path | None = None, cell_timeout: int | None = None) -> list[Result]:
    """Execute each lesson at the quick profile and, if it passes, write it back to where it came from, cleaned."""
    import nbformat

    results = []
    for path, result in _run_each(paths, out or course_dir() / "build" / "store", "quick", cell_timeout=cell_timeout):
        results.append(result)
        if result.passed:
            text = nbformat.writes(clean(read_notebook(result.notebook)))  # indent 1, keys sorted
            write_atomically(path, f"{text}\n".encode())
    return results


def measure_bands(
    paths: Sequence[Path],
    profile: str,
    out: Path | None = None,
    seeds: Sequence[int] = range(5),
    cell_timeout: int | None = None,
) -> bool:
    """Run each lesson once per seed and keep what it recorded in ``data/bands``; returns whether all runs passed.

    What a lesson recorded is stored only when all its runs have passed, with the old bands set aside.
    """
    out = out or course_dir() / "build" / "bands"
    for path in paths:
        with patch.dict(os.environ, AIGC_BANDS="measure"):
            runs = [_run_each([path], out, profile, {"SEED": seed}, cell_timeout) for seed in seeds]
            results = [result for run in runs for _, result in run]
        if not all(result.passed for result in results):
            return False
        if not results[0].figures:
            continue
        stored = course_dir() / "data" / "bands" / f"{path.stem}.json"
        bands = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {"command": {}, "profiles": {}}
        bands["command"][profile] = f"aigc course --bands --profile {profile} {int(path.stem[:2])}"
        bands["profiles"][profile] = {n: [run.figures[n]["value"] for run in results] for n in results[0].figures}
        write_atomically(stored, (json.dumps(bands, indent=1, ensure_ascii=False) + "\n").encode("utf-8"))
    return True


def run_course(
    *, profile: str, out: Path | None = None, only: Sequence[int] | None = None, cell_timeout: int | None = None
) -> int:
    """Execute and render the lessons (those numbered in ``only``, or all), one after the other; see ``run_lesson``.

    A lesson that fails does not stop the next. Returns the exit status: 0 if all of them passed, else 1.
    """
    out = writable(Path(out or course_dir() / "build" / "course").resolve(), "--out")
    results = []
    for _, result in _run_each(pick_lessons(only), out, profile, cell_timeout=cell_timeout):
        results.append(result)
        if result.notebook.exists():
            render(result.notebook, out / f"{result.lesson}.html")
    index = index_page(results, out)
    print(summary(results))
    print(f"The pages: {index}")
    return 0 if all(result.passed for result in results) else 1


def pick_lessons(only: Sequence[int] | None = None) -> list[Path]:
    """The lessons with the numbers ``only``, or all; raises ``CourseError`` for a number that has no lesson."""
    by_number = {int(path.name[:2]): path for path in lessons()}
    if missing := [number for number in only or () if number not in by_number]:
        known = ", ".join(map(str, by_number)) or "none"
        raise CourseError(f"there is no lesson {missing[0]} in notebooks/: the lessons are {known}")
    if not by_number:
        raise CourseError(f"there are no lessons in {course_dir() / 'notebooks'}: git checkout notebooks")
    return [path for number, path in by_number.items() if not only or number in only]


def summary(results: Sequence[Result]) -> str:
    """The table for the terminal: one line per lesson, its recorded figures beneath it."""
    width = max(len(result.lesson) for result in results)
    lines = [f"\n{'lesson':<{width}}  {'seconds':>8}  {'peak MB':>8}"]
    for result in results:
        verdict = "passed" if result.passed else f"FAILED  {result.error}"
        lines.append(f"{result.lesson:<{width}}  {result.seconds:>8.1f}  {result.peak_mb:>8.0f}  {verdict}")
        lines += [f"    {figure_line(name, figure)}" for name, figure in result.figures.items()]
    return "\n".join(lines)


def _run_each(
    paths: Sequence[Path],
    out: Path,
    profile: str,
    parameters: dict[str, Any] | None = None,
    cell_timeout: int | None = None,
) -> Iterator[tuple[Path, Result]]:
    """Run one lesson after the other, with a line in the terminal that lives while the lesson runs."""
    live = sys.stdout.isatty()
    for path in paths:
        path = Path(path)

        def paint(progress: str, name: str = path.stem) -> None:
            print(f"\r{name}: {progress}\033[K", end="", flush=True)

        print(f"{path.stem} ...", end="" if live else "\n", flush=True)
        try:
            tick = {"on_tick": paint} if live else {}
            result = run_lesson(path, out, profile=profile, parameters=parameters, cell_timeout=cell_timeout, **tick)
        finally:
            print("\r\033[K" if live else "", end="", flush=True)
        verdict = "passed" if result.passed else f"FAILED: {result.error}"
        print(f"{path.stem}: {verdict} ({result.seconds:.1f} s, {result.peak_mb:.0f} MB)", flush=True)
        yield path, result


@contextmanager
def _watch(on_tick: Callable[[float], None]) -> Iterator[list[int]]:
    """Five times a second, call ``on_tick(seconds)`` and measure the processes started since; yields [peak bytes]."""
    import psutil

    this, peak, stop = psutil.Process(), [0], threading.Event()
    before, start = set(this.children(recursive=True)), time.perf_counter()

    def rss(process: psutil.Process) -> int:
        try:
            return process.memory_info().rss
        except psutil.Error:  # it has ended
            return 0

    def watch() -> None:
        while not stop.wait(0.2):
            peak[0] = max(peak[0], sum(map(rss, set(this.children(recursive=True)) - before)))
            on_tick(time.perf_counter() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _parameters_of(nb: "NotebookNode") -> dict[str, Any]:
    """The names assigned in the cell tagged ``parameters``, with their values (None where one is not a literal)."""
    known = {}
    for cell in nb.cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            for line in ast.parse(cell.source).body:
                targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
                for target in targets:
                    if isinstance(target, ast.Name):
                        known[target.id] = line.value.value if isinstance(line.value, ast.Constant) else None
    return known


def _read_record(path: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """What is wrong with the record that a lesson left (nothing, if it passed), and the figures by name."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        figures = {figure["name"]: figure for figure in record["figures"]}
        if record["passed"] is True:
            return "", figures
        failed = [f"claim {claim['tag']}" for claim in record["claims"] if not claim["passed"]]
        failed += [figure_line(name, figure) for name, figure in figures.items() if not figure["passed"]]
        return f"its record says that it failed: {'; '.join(failed)}", figures
    except FileNotFoundError:
        return f"it left no {path.name}: its last cell must be lessons.finish()", {}
    except (ValueError, KeyError, TypeError) as error:
        return f"its record {path.name} cannot be read ({type(error).__name__}: {error})", {}
