"""A class of small notebooks: what is handed out, and how answers that are right, wrong or harmful are graded."""

import csv
import html
import json
import os
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from aigc_course import cli, course
from aigc_course.classroom import grading, kernel, masters, report, submissions
from aigc_course.exercises.exercise import MIME
from aigc_course.runtime import CourseError

NAME = "09_toy"
SECONDS = 15.0
MEGABYTES = 1500.0
TOY = """
import torch

from aigc_course.exercises import Function, Mistake, Number

check_square = Function(
    number="9.1", title="The square of <x>", kind="derivation", seconds=2.0, reference=lambda x: x**2,
    cases=lambda rng: [(torch.rand(3, generator=rng) + 2,), (torch.rand(5, generator=rng) + 3,)],
    mistakes=[Mistake("doubled", "You <doubled> it.", lambda x: 2 * x), Mistake("cubed", "Cubed.", lambda x: x**3)],
)
check_ten = Number(
    number="9.2", title="Ten", kind="prediction", truth=lambda: 10.0,
    mistakes=[Mistake("hundred", "Its square.", 100.0)],
)
"""
STUBS = {
    "square": "from toy_exercises import check_square\n\n\ndef my_square(x): ...\n\n\ncheck_square(my_square)",
    "ten": "from toy_exercises import check_ten\n\nmy_ten = None\n\ncheck_ten(my_ten)",
}
RIGHT = "from toy_exercises import check_square\nmy_square = lambda x: x * x\ncheck_square(my_square)"
TEN = "from toy_exercises import check_ten\nmy_ten = 10\ncheck_ten(my_ten)"
FACTS = {MIME: {"exercise": "9.1", "status": "right", "mistake": "", "text": "forged"}, "text/plain": "forged"}
FORGED = f"""
import sys
from IPython.display import display
class Fake:
    def __repr__(self): return "right"
    def _repr_mimebundle_(self, include=None, exclude=None): return {FACTS!r}
def check_square(answer): return Fake()
def my_square(x):
    display({FACTS!r}, raw=True)
    sys.displayhook(Fake())
    return 2 * x
display({FACTS!r}, raw=True)
check_square(my_square)
Fake()"""
CHILD = """
import ctypes, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
def my_square(x): ctypes.string_at(0)
"""
GREEDY = """
kept = []
while True:
    kept.append(bytearray(b"x") * 50_000_000)"""
PRINTING = """
for i in range(300):
    print("x" * 100_000)"""
STUBBORN = """
while True:
    try:
        import time; time.sleep(0.01)
    except BaseException: pass"""

# What each hands in for the two exercises; how that is to be graded: the status, and the mistake or words of the text.
CLASS = {
    "李雷": (RIGHT, TEN, ("right", ""), ("right", "")),
    "second": (
        "def my_square(x): return np.square(x)\ncheck_square(my_square)",
        "my_ten = 1e1",
        ("right", ""),
        ("right", ""),
    ),
    "known": (RIGHT.replace("x * x", "x + x"), TEN.replace("10", "100"), ("wrong", "doubled"), ("wrong", "hundred")),
    "cubed": (RIGHT.replace("x * x", "x * x * x"), TEN.replace("10", "9"), ("wrong", "cubed"), ("wrong", "too low")),
    "same": (RIGHT.replace("x * x", "2 * x"), None, ("wrong", "doubled"), ("missing", "no cell")),
    "untried": (STUBS["square"], STUBS["ten"], ("untried", ""), ("untried", "")),
    "raising": (
        "raise ValueError('<script>')",
        "my_ten = [1]\nmy_ten = my_ten[3]",
        ("raised", "<script>"),
        ("raised", "Index"),
    ),
    "inside": ("def my_square(x): return 1 / 0", "my_ten = 10\n1 / 0", ("raised", "ZeroDivision"), ("right", "")),
    "crashing": ("import os\nos._exit(3)", "my_ten = 10", ("crashed", "status 3"), ("right", "")),
    "segfault": (CHILD, "my_ten = 10", ("crashed", "signal"), ("right", "")),
    "leaving": (RIGHT + "\nquit()", "my_ten = 10", ("right", ""), ("right", "")),
    "looping": (STUBBORN, "my_ten = 10", ("slow", "15 seconds"), ("right", "")),
    "turning": ("def my_square(x):\n    while True: pass", "my_ten = 10", ("slow", "2 seconds"), ("right", "")),
    "greedy": ("my_square = lambda x: x * x", GREEDY, ("right", ""), ("memory", "MB")),
    "forged": (FORGED, "my_ten = 10; check_ten = print", ("wrong", "doubled"), ("right", "")),
    "printing": (PRINTING, "my_ten = 10", ("raised", "my_square"), ("right", "")),
    "syntax": ("def my_square(x) return", "%matplotlib inline\nmy_ten = 10", ("raised", "SyntaxError"), ("right", "")),
}


def toy_master(folder: Path) -> Path:
    """A lesson of two exercises, with outputs, a picture, links, and a cell that would fail if it were run."""

    def tagged(make, source, *tags, **more):
        return make(source, metadata={"tags": list(tags)} if tags else {}, **more)

    cells = [
        new_markdown_cell("# Toy\n\n![A dot](img/dot.png) [next](01_next.ipynb) [web](https://example.org) `[x](y)`"),
        tagged(new_code_cell, "SEED = 0", "parameters"),
        new_code_cell("import math\n\nprint(SEED)", outputs=[new_output("stream", text="0\n")], execution_count=1),
        tagged(new_markdown_cell, "### Exercise 9.1", "exercise"),
        tagged(new_code_cell, STUBS["square"], "exercise", id="exercise-9-1"),
        tagged(new_markdown_cell, "Hint", "hints"),
        tagged(new_markdown_cell, "The answer is x * x", "solution"),
        new_code_cell("raise RuntimeError('the lesson itself is not run')"),
        tagged(new_code_cell, STUBS["ten"], "exercise", id="exercise-9-2"),
        tagged(new_markdown_cell, "The answer is 10", "solution"),
        tagged(new_markdown_cell, "For teachers: 90 minutes", "teacher"),
    ]
    (folder / "img").mkdir(parents=True)
    (folder / "img" / "dot.png").write_bytes(b"a picture")
    path = folder / f"{NAME}.ipynb"
    path.write_text(nbformat.writes(new_notebook(cells=cells)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy lesson in place of all others, its exercises where this process and the kernels find them."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_exercises.py").write_text(TOY, encoding="utf-8")
    path = toy_master(folder / "notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.setattr(masters, "lessons", lambda: [path])
        patch.setattr(course, "lessons", lambda: [path])
        (folder / "temporary").mkdir()
        patch.setattr(tempfile, "tempdir", str(folder / "temporary"))
        yield path


def hand_in(folder: Path, student: str, square: str | None, ten: str | None) -> Path:
    """The students' copy of the toy lesson with these cells in place of the stubs; None: the cell is deleted."""
    nb = masters.student_copy(nbformat.read(masters.lessons()[0], as_version=4))
    theirs = {"exercise-9-1": square, "exercise-9-2": ten}
    nb.cells = [cell for cell in nb.cells if theirs.get(cell.id, "") is not None]
    for cell in nb.cells:
        cell.source = theirs.get(cell.id, cell.source)
        if cell.id in theirs:
            cell.outputs = [new_output("execute_result", FACTS, execution_count=1)]
    nb.cells.insert(3, new_code_cell("import numpy as np\nimport no_such_module"))
    path = folder / student / f"{NAME}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    return path


def left_behind() -> list[str]:
    """The processes of kernels for grading that are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if "aigc-grade-" in process.environ().get("AIGC_RUN_DIR", "") and process.status() != "zombie":
                found.append(f"{process.pid} {process.cmdline()}")
        except (psutil.Error, OSError):
            pass
    return found


@pytest.fixture(scope="module")
def graded(toy, tmp_path_factory):
    """The rows of grades.csv by student and exercise, and the folder of the results."""
    folder = tmp_path_factory.mktemp("class")
    for student, (square, ten, *_) in CLASS.items():
        hand_in(folder / "in", student, square, ten)
    (folder / "in" / "=1+1").mkdir()
    (folder / "in" / "=1+1" / f"{NAME}.ipynb").write_text('{"cells": [', encoding="utf-8")
    out = folder / "out"
    assert grading.grade(folder / "in", out, seconds=SECONDS, memory=MEGABYTES, jobs=2) == 1, "one cannot be read"
    with open(out / "grades.csv", encoding="utf-8-sig", newline="") as file:
        rows = {(row["student"], row["exercise"]): row for row in csv.DictReader(file)}
    return rows, out


@pytest.mark.parametrize("student", CLASS)
def test_each_student_of_a_class_gets_their_own_grade(student, graded):
    """A crash, an endless loop, an eaten gigabyte: each costs one exercise of one student."""
    for number, (status, words) in zip(("9.1", "9.2"), CLASS[student][2:], strict=True):
        row = graded[0][student, number]
        assert row["status"] == status, row
        assert words in (row["mistake"], "") or words in row["text"], row
        assert row["lesson"] == NAME and float(row["seconds"]) < SECONDS + 5


def test_no_process_and_no_folder_is_left(graded):
    assert not left_behind()
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_tables_are_for_spreadsheets(graded):
    rows, out = graded
    assert (out / "grades.csv").read_bytes().startswith(b"\xef\xbb\xbf"), "Excel reads Chinese names by this mark"
    assert rows["'=1+1", "9.1"]["status"] == "unread" and "not a notebook" in rows["'=1+1", "9.1"]["text"]
    assert len(rows) == 2 * len(CLASS) + 2
    with open(out / "summary.csv", encoding="utf-8-sig", newline="") as file:
        wide = {row["student"]: row for row in csv.DictReader(file)}
    assert wide["known"] == {"student": "known", "right": "0", "9.1": "doubled", "9.2": "hundred"}
    assert wide["李雷"]["right"] == "2" and wide["looping"]["9.1"] == "slow"


def test_the_page_tells_what_the_class_thinks(graded):
    page = (graded[1] / "class.html").read_text(encoding="utf-8")
    assert not re.search(r"<(?:script|link|img|iframe)\b|https?:|url\(", page), "nothing is loaded, nothing is run"
    assert "&lt;script&gt;" in page and "The square of &lt;x&gt;" in page and "You &lt;doubled&gt; it." in page
    counts = {"right": 0, "wrong": 0, "untried": 0}
    for *_, (status, _), _ in CLASS.values():
        counts[{"right": "right", "untried": "untried"}.get(status, "wrong")] += 1
    counts["untried"] += 1  # the one that cannot be read
    assert f'aria-label="{", ".join(f"{count} {name}" for name, count in counts.items())}"' in page
    table = page[page.index("most frequent misconceptions") :]
    rows = [html.unescape(re.sub("<[^>]*>", "|", row)) for row in re.findall(r"<tr>(<td>.*?)</tr>", table)]
    tried = counts["right"] + counts["wrong"]
    assert "3 of " + str(tried) in rows[0] and "9.1 · doubled" in rows[0] and "forged, known, same" in rows[0]
    help_for = page[page.index("Who may need help") : page.index("Other answers")]
    assert "untried" in help_for and "known" in help_for and "李雷" not in help_for and "greedy" not in help_for


# ---- one kernel ----


def test_all_runs_every_cell_and_an_earlier_exercise_costs_no_later_one(toy, tmp_path):
    """With --all, answers may rest on other cells. What an exercise leaves behind gets the next one a second try."""
    hoard = "kept = bytearray(b'x') * 700_000_000\n"
    path = hand_in(
        tmp_path, "hoarder", hoard + RIGHT, hoard.replace("kept", "more") + "import time; time.sleep(0.5)\nmy_ten = n"
    )
    nb = nbformat.read(path, as_version=4)
    nb.cells.insert(2, new_code_cell("n = 10"))
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    assert grading.grade(tmp_path, tmp_path / "out", seconds=SECONDS, memory=MEGABYTES, everything=True) == 0
    table = (tmp_path / "out" / "grades.csv").read_text(encoding="utf-8-sig")
    assert table.count(",right,") == 2, table


def test_a_stopped_kernel_is_gone_at_once(toy):
    stop = threading.Event()
    with pytest.raises(kernel.Stopped), kernel.Kernel({"a.ipynb": b"{}"}, MEGABYTES, stop) as one:
        assert one.run("import os; assert os.listdir() == ['a.ipynb']", SECONDS)["status"] == "ok"
        assert one.run("input()", SECONDS)["ename"] == "StdinNotImplementedError"
        start = time.monotonic()
        threading.Timer(0.5, stop.set).start()
        one.run(STUBBORN, SECONDS)
    assert time.monotonic() - start < SECONDS / 2 and not left_behind()


# ---- what is run of a notebook ----


def sources(code, everything=False):
    (master,) = masters.masters()
    return [(step.task and step.task.check, step.sources) for step in submissions.plan(master, code, everything)[1:]]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ([("exercise-9-1", "my_square = 1")], ["my_square = 1"]),
        ([("lost", "my_square = 1\ncheck_square(my_square)")], ["my_square = 1\n"]),
        ([("lost", "def my_square(x): return x")], ["def my_square(x): return x"]),
        (
            [("exercise-9-1", "def my_square(x): ..."), ("new", "a = 1\ncheck_square(a)")],
            ["def my_square(x): ...", "a = 1\n"],
        ),
        ([("lost", "print(my_square)"), ("other", "# check_square(my_square)")], None),
        ([("exercise-9-1", "%time x = 1\ncheck_square(my_square)")], ["%time x = 1\ncheck_square(my_square)"]),
        ([("exercise-9-1", "a = 1; check_square(\n  a)")], ["a = 1; check_square(\n  a)"]),
    ],
    ids=["by id", "by check", "by answer", "answered below", "no longer there", "no plain Python", "one line"],
)
def test_where_an_answer_is_looked_for(code, found, toy):
    assert dict(sources(code)).get("check_square") == (tuple(found) if found else None)


def test_a_plan_has_the_imports_of_students_and_the_exercises_in_their_order(toy):
    code = [
        ("a", "import math\nx = 1"),
        ("exercise-9-2", "my_ten = 1"),
        ("exercise-9-1", "b"),
        ("c", "import math\n\nprint(SEED)"),
    ]
    imports, *exercises = sources(code)
    assert imports[1][0].count("import") == 1 and "x = 1" not in imports[1][0]
    assert [check for check, _ in exercises] == ["check_ten", "check_square"]
    assert [step for step in sources(code, everything=True) if step[0]] == exercises
    assert len(sources(code, everything=True)) == 4
    both = sources([("one", "my_square, my_ten = 1, 2\ncheck_square(my_square)\ncheck_ten(my_ten)")], everything=True)
    assert [check for check, _ in both] == ["check_square", "check_ten"] and both[1][1] == ()


# ---- whose is it, and of which lesson ----


def test_the_downloads_of_learning_platforms_are_understood(toy, tmp_path):
    given = {
        "Li Lei_123_assignsubmission_file_/09_toy.ipynb": "Li Lei_123_assignsubmission_file_",
        "Han Mei/deep/er/09_toy (1).ipynb": "Han Mei",
        "tom_77_09_toy-2.ipynb": "tom_77",
        "renamed/homework.ipynb": "renamed",
        "09_toy.ipynb": None,
        "x/other.ipynb": None,
        "x/.ipynb_checkpoints/09_toy-checkpoint.ipynb": "",
        "__MACOSX/Li Lei/._09_toy.ipynb": "",
    }
    for name in given:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("check_ten" if "homework" in name else "{}", encoding="utf-8")
    older = tmp_path / "Han Mei" / "09_toy.ipynb"
    older.write_text("{}", encoding="utf-8")
    os.utime(older, (1, 1))
    found, left_out = submissions.find(tmp_path, masters.masters())
    assert {each.path.relative_to(tmp_path).as_posix(): each.student for each in found} == {
        name: student for name, student in given.items() if student
    }
    assert {line.split(":")[0] for line in left_out} == {"09_toy.ipynb", "x/other.ipynb", "Han Mei/09_toy.ipynb"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a notebook"),
        (b"[1, 2]", "not a notebook"),
        (b'{"cells": [1]}', "not a notebook"),
        (b'{"cells": [{"cell_type": "code"}]}', "not a notebook"),
        (b'{"worksheets": []}', "not a notebook"),
        (b"\xff\xfe\x00", "not a notebook"),
        (b"[" * 100_000, "not a notebook"),
        (200_000_000, "200 MB, of 50 allowed"),
    ],
    ids=["empty", "a list", "no cells", "no source", "old format", "no text", "nested", "200 MB"],
)
def test_a_notebook_that_cannot_be_read_is_told_in_one_line(content, words, toy, tmp_path):
    path = tmp_path / "in" / "anna" / f"{NAME}.ipynb"
    path.parent.mkdir(parents=True)
    if isinstance(content, int):
        with open(path, "wb") as file:
            file.truncate(content)
    else:
        path.write_bytes(content)
    assert grading.grade(tmp_path / "in", tmp_path / "out") == 1
    with open(tmp_path / "out" / "grades.csv", encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["unread"] * 2 and words in rows[0]["text"]
    assert len(rows[0]["text"]) <= report.LONGEST and str(tmp_path) not in rows[0]["text"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["grade", "IN/none"], "there is no folder"),
        (["grade", "IN"], "no file that ends in .ipynb"),
        (["grade", "IN", "--seconds", "0"], "--seconds"),
        (["grade", "IN", "--memory", "nan"], "--memory"),
        (["grade", "IN", "--jobs", "-1"], "--jobs"),
        (["grade"], "SUBMISSIONS"),
        (["make", "OUT", "77"], "no lesson 77"),
        ([], "COMMAND"),
    ],
)
def test_a_mistake_of_the_teacher_takes_one_line(words, named, toy, tmp_path, capsys):
    (tmp_path / "IN").mkdir()
    try:
        code = cli.main(["class", *(word.replace("IN", str(tmp_path / "IN")) for word in words)])
    except SystemExit as leaving:
        code = leaving.code
    captured = capsys.readouterr()
    assert code == 2 and re.fullmatch(r"aigc: .+\n", captured.err) and named in captured.err and not captured.out


# ---- what is handed out ----


def test_students_get_the_lesson_without_answers_and_outputs(toy, tmp_path, capsys):
    out = tmp_path / "students"
    assert cli.main(["class", "make", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{NAME}.ipynb" in printed and "dot.png" in printed and f"{NAME}.ipynb: 01_next.ipynb" in printed
    assert (out / "img" / "dot.png").read_bytes() == b"a picture"
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [f"{NAME}.ipynb", "dot.png"]
    text = (out / f"{NAME}.ipynb").read_text(encoding="utf-8")
    assert "The answer" not in text and "For teachers" not in text
    master, copy = (json.loads(path.read_text(encoding="utf-8")) for path in (toy, out / f"{NAME}.ipynb"))
    kept = [cell for cell in master["cells"] if not {"solution", "teacher"} & set(cell["metadata"].get("tags", []))]
    assert len(kept) == len(master["cells"]) - 3
    for cell in kept:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    assert copy == {**master, "cells": kept}

    assert cli.main(["class", "make", str(out)]) == 0, "the same again is no harm"
    work = text.replace("my_ten = None", "my_ten = 10")
    (out / f"{NAME}.ipynb").write_text(work, encoding="utf-8")
    assert cli.main(["class", "make", str(out)]) == 2
    assert re.fullmatch(r"aigc: .*09_toy.ipynb is there already .*\n", capsys.readouterr().err)
    assert (out / f"{NAME}.ipynb").read_text(encoding="utf-8") == work


def test_masters_are_not_overwritten(toy):
    with pytest.raises(CourseError, match="is there already"):
        masters.make(toy.parent)


def test_an_exercise_without_its_check_is_named(toy, tmp_path):
    nb = nbformat.read(toy, as_version=4)
    nb.cells[4].source = "def my_square(x): ..."
    path = tmp_path / "09_bad.ipynb"
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    with pytest.raises(CourseError, match=r"09_bad\.ipynb: the exercise exercise-9-1"):
        masters.read_master(path)


@pytest.mark.skipif(sys.platform == "win32", reason="other names are allowed there")
def test_fields_of_tables_are_no_formulas():
    assert [report.cell(text) for text in ("=1", "+1", "-1", "@a", "\t=1", "a=1", 1.5, "李")] == [
        *("'=1", "'+1", "'-1", "'@a", "'=1"),
        *("a=1", "1.5", "李"),
    ]
    assert report.plain("a\n\x1b[31mb\u202e") == "a [31mb" and len(report.plain("x" * 10**7)) == report.LONGEST
