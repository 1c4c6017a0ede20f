"""The masters: the lessons as they are stored, what to grade in them, and the students' copies."""

import ast
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints import writable, write_atomically
from ..course import lessons, pick_lessons
from ..exercises import Exercise
from ..pages import read_notebook
from ..runtime import CourseError

TEACHERS = {"solution", "teacher"}  # the tags of the cells that students do not get
LINK = re.compile(r"(?:\]\(|(?:src|href)=[\"'])([^)\"'#\s]+)")


@dataclass(frozen=True, eq=False)
class Task:
    """One exercise of a lesson: its check, the cell that it stands in, and the names that hold the answer."""

    check: str
    module: str
    exercise: Exercise
    cell: str
    expression: str  # the master's check, looked up anew, so that no name of the student's stands in its way
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Master:
    """What grading needs of a lesson: its tasks; as ``setup`` its parameters, its imports and those of its checks."""

    name: str
    setup: tuple[str, ...]
    sources: frozenset[str]
    tasks: tuple[Task, ...]


def make(out: Path, only: Sequence[int] | None = None) -> list[Path]:
    """Write the students' notebooks, and the pictures they refer to, into ``out``; returns the paths.

    A student's notebook is the master without the cells tagged ``solution`` or ``teacher`` and without outputs. Nothing
    is replaced: raises ``CourseError`` if a file is there that differs, as it may hold someone's work.
    """
    import nbformat

    paths, out = pick_lessons(only), Path(out)
    files: dict[Path, bytes] = {}
    for path in paths:
        nb = student_copy(read_notebook(path))
        files[out / path.name] = f"{nbformat.writes(nb)}\n".encode()
        for link in links_of(nb):
            picture = path.parent / link
            if picture.suffix != ".ipynb" and picture.is_file() and not Path(link).is_absolute() and ".." not in link:
                files[out / link] = picture.read_bytes()
    changed = [path for path, data in files.items() if path.exists() and path.read_bytes() != data]
    if changed:
        more = f" (and {len(changed) - 1} more)" if changed[1:] else ""
        raise CourseError(
            f"{changed[0]}{more} is there already and differs, so it may hold someone's work: move it away, "
            "or name another folder"
        )
    writable(out, "OUT")
    for path, data in files.items():
        if not path.exists():
            write_atomically(path, data)
    return list(files)


def student_copy(nb):
    """A copy of a master for students."""
    import nbformat

    nb = nbformat.from_dict(nb)
    nb.cells = [cell for cell in nb.cells if not TEACHERS & set(cell.metadata.get("tags", []))]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nb.metadata.pop("widgets", None)
    return nb


def dead_links(paths: Sequence[Path]) -> list[str]:
    """For each notebook of ``paths``, a line that names the relative links in it that lead nowhere."""
    found = []
    for path in paths:
        if path.suffix == ".ipynb":
            dead = [link for link in links_of(read_notebook(path)) if not (path.parent / link).exists()]
            found += [f"{path.name}: {', '.join(dead)}"] if dead else []
    return found


def links_of(nb) -> list[str]:
    """The relative links in the text of a notebook."""
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    text = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", text, flags=re.DOTALL)  # code and formulas
    links = dict.fromkeys(LINK.findall(text))
    return [link for link in links if not re.match(r"[a-z][a-z0-9+.-]*:|/", link, re.IGNORECASE)]


def masters() -> list[Master]:
    """The lessons that have exercises."""
    return [master for master in map(read_master, lessons()) if master.tasks]


def read_master(path: Path) -> Master:
    """Raises ``CourseError`` for an exercise that does not end in its check."""
    nb = read_notebook(path)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    stubs = [cell for cell in code if "exercise" in cell.metadata.get("tags", [])]
    setup = [cell.source for cell in code if cell not in stubs][:2]  # the parameters and the imports
    tasks = tuple(_task(path, cell) for cell in stubs)
    setup += [f"__import__({module!r})" for module in sorted({task.module for task in tasks})]
    return Master(path.stem, tuple(setup), frozenset(cell.source for cell in code), tasks)


def _task(path: Path, cell) -> Task:
    """The last line of a stub is ``check_…(answer)``, and the stub imports that check."""
    tree = ast.parse(cell.source)
    call = tree.body[-1].value if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
        check = call.func.id
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and check in [alias.name for alias in node.names]:
                exercise = getattr(importlib.import_module(node.module), check)
                arguments = ", ".join(ast.unparse(part) for part in (*call.args, *call.keywords))
                answers = {name.id for part in call.args for name in ast.walk(part) if isinstance(name, ast.Name)}
                fresh = f"__import__('importlib').import_module({node.module!r}).{check}({arguments})"
                return Task(check, node.module, exercise, cell.id, fresh, tuple(sorted(answers)))
    raise CourseError(f"{path.name}: the exercise {cell.id} is to import its check and to end in check_…(answer)")
