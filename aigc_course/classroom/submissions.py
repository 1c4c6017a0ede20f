"""What was handed in: whose it is and of which lesson, and what of it is run."""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..runtime import CourseError
from .masters import Master, Task

LARGEST = 50_000_000  # bytes of a notebook


@dataclass(frozen=True)
class Submission:
    student: str
    path: Path
    master: Master


@dataclass(frozen=True)
class Step:
    """Sources to run in one go: those of a task, which is then judged, or what comes before it."""

    sources: tuple[str, ...]
    task: Task | None = None
    students: bool = True


class Unread(Exception):
    """The notebook cannot be read, in a sentence."""


def find(folder: Path, known: Sequence[Master]) -> tuple[list[Submission], list[str]]:
    """The submissions below ``folder``, in order, and a line on each notebook that is none.

    The lesson is the one whose name stands in the file's name, else the only one whose exercises stand in the notebook.
    The student is the first folder below ``folder``; for a file without one, what its name has before the lesson's.
    Of several of one student and lesson, the youngest counts.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}: name the one with the submissions")
    found: dict[tuple[str, str], list[Submission]] = {}
    left_out = []
    for path in sorted(folder.rglob("*.ipynb")):
        inner = path.relative_to(folder)
        if any(part.startswith((".", "__MACOSX")) for part in inner.parts) or not path.is_file():
            continue
        master = next((master for master in known if master.name in path.name), None)
        prefix = path.name.split(master.name)[0] if master else path.stem
        master = master or _by_content(path, known)
        student = inner.parts[0] if len(inner.parts) > 1 else prefix.strip(" _-.")
        if master is None:
            left_out.append(f"{inner.as_posix()}: it is of no lesson with exercises")
        elif not student:
            left_out.append(f"{inner.as_posix()}: whose is it? Put it into a folder with the student's name")
        else:
            found.setdefault((student, master.name), []).append(Submission(student, path, master))
    for each in found.values():
        each.sort(key=lambda one: one.path.stat().st_mtime)
        left_out += [f"{older.path.relative_to(folder).as_posix()}: there is a later one" for older in each[:-1]]
    return [found[key][-1] for key in sorted(found)], left_out


def _by_content(path: Path, known: Sequence[Master]) -> Master | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.stat().st_size <= LARGEST else ""
    except OSError:
        return None
    fits = [master for master in known if any(re.search(rf"\b{task.check}\b", text) for task in master.tasks)]
    return fits[0] if len(fits) == 1 else None


def code_of(path: Path, data: bytes | None) -> list[tuple[str, str]]:
    """The ids and sources of the code cells in a notebook, read leniently; raises ``Unread``."""
    if data is None:
        size = path.stat().st_size / 1e6
        raise Unread(f"{path.name} has {size:.0f} MB, of {LARGEST / 1e6:.0f} allowed: have its outputs cleared")
    try:
        cells = json.loads(data.decode("utf-8-sig"))["cells"]
        return [(str(cell.get("id", "")), "".join(cell["source"])) for cell in cells if cell.get("cell_type") == "code"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Unread(f"{path.name} is not a notebook of Jupyter: {type(error).__name__}: {error}") from error


def plan(master: Master, code: list[tuple[str, str]], everything: bool) -> list[Step]:
    """The steps of a notebook with the code cells ``code``, as (id, source)."""
    cells = {task: _cells_of(task, code) for task in master.tasks}
    checks = {task.check for task in master.tasks}
    taken = {index for indices in cells.values() for index in indices}
    steps = [Step(master.setup, students=False)]
    if not everything:
        theirs = [source for index, (_, source) in enumerate(code) if index not in taken]
        steps.append(Step((_imports(source for source in theirs if source not in master.sources),)))
        tasks = [(indices[0], task) for task, indices in cells.items() if indices]
        order = [task for _, task in sorted(tasks, key=lambda pair: pair[0])]
        return steps + [Step(tuple(without_checks(code[i][1], checks) for i in cells[task]), task) for task in order]
    for index, (_, source) in enumerate(code):
        steps.append(Step((without_checks(source, checks),)))
        for task, indices in cells.items():
            if indices and index == indices[-1]:  # a cell may hold several
                steps += [Step((), task)] if steps[-1].task else [Step(steps.pop().sources, task)]
    return steps


def _cells_of(task: Task, code: list[tuple[str, str]]) -> list[int]:
    """Where the answer stands: in the exercise's cell and those that call its check, else where its name is made."""
    call = re.compile(rf"^[^#\n]*\b{task.check}\s*\(", re.MULTILINE)
    own = [index for index, (name, source) in enumerate(code) if name == task.cell or call.search(source)]
    names = "|".join(task.answers) or "(?!)"
    made = re.compile(rf"^(?:def\s+)?(?:{names})\b\s*(?:\(|=[^=])", re.MULTILINE)
    return own or [index for index, (_, source) in enumerate(code) if made.search(source)]


def without_checks(source: str, checks: Iterable[str]) -> str:
    """The source with empty lines where it calls a check on its own account; what is no plain Python stays as it is."""
    lines = source.split("\n")
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        body = ast.parse(source).body
        for node in body:
            call = node.value if isinstance(node, ast.Expr) else None
            alone = sum(other.lineno <= node.end_lineno and other.end_lineno >= node.lineno for other in body) == 1
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in checks and alone:
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


def _imports(sources: Iterable[str]) -> str:
    """The imports of the student's other cells, each on its own."""
    found = {}
    for source in sources:
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            for node in ast.parse(source).body:
                if isinstance(node, ast.Import | ast.ImportFrom):
                    found[f"try:\n    {ast.unparse(node)}\nexcept Exception:\n    pass"] = None
    return "\n".join(found)
