"""What grading found, as tables for a spreadsheet and as one page on the class that reads offline."""

import csv
import html
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .masters import Master

COLUMNS = ("student", "lesson", "exercise", "status", "mistake", "seconds", "text")
FILES = ("grades.csv", "summary.csv", "class.html")
UNTRIED = ("untried", "missing", "unread")  # every other status but "right" counts as wrong
LONGEST = 600  # characters of what is said of an answer


@dataclass(frozen=True)
class Grade:
    """How an exercise went: ``status`` is one of the verdict's ("right", "wrong", "raised", "slow", "untried"), or
    "missing" (no such cell), "crashed", "memory", or "unread" (the notebook cannot be read).
    """

    student: str
    lesson: str
    exercise: str
    status: str
    mistake: str = ""
    seconds: float = 0.0
    text: str = ""


def plain(text: str) -> str:
    """One line of at most ``LONGEST`` printable characters."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text[: 8 * LONGEST]).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def cell(value: object) -> str:
    """A field of a table that no spreadsheet takes for a formula."""
    text = plain(str(value))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def claim(out: Path) -> None:
    """Raise ``OSError`` before the work, not after it, if an older table is open in a program that keeps others out."""
    for name in FILES:
        if (out / name).exists():
            with open(out / name, "ab"):
                pass


def write(
    out: Path, grades: Sequence[Grade], masters: Sequence[Master], left_out: Sequence[str], notebooks: int
) -> Path:
    """Write the ``FILES`` into ``out``; returns the path of the page."""
    table, summary, page = (out / name for name in FILES)
    _table(table, [COLUMNS, *([getattr(grade, name) for name in COLUMNS] for grade in grades)])
    by_student: dict[str, dict[str, Grade]] = defaultdict(dict)
    for grade in grades:
        by_student[grade.student][grade.exercise] = grade
    asked = sorted({grade.exercise for grade in grades})
    rows = [
        [student, sum(grade.status == "right" for grade in theirs.values()), *(_short(theirs.get(x)) for x in asked)]
        for student, theirs in by_student.items()
    ]
    _table(summary, [["student", "right", *asked], *rows])
    done = len({(grade.student, grade.lesson) for grade in grades})
    facts = f"{len(by_student)} students, {done} notebooks, {len(grades)} exercises"
    facts += "" if done == notebooks else f" (stopped early: {notebooks - done} notebooks are not graded yet)"
    text = PAGE.replace("FACTS", html.escape(facts)).replace("BODY", "\n".join(_sections(grades, masters, left_out)))
    page.write_text(text, encoding="utf-8", errors="replace")
    return page


def _table(path: Path, rows: Iterable[Iterable[object]]) -> None:
    # With the mark at the beginning, Excel reads names in Chinese.
    with open(path, "w", encoding="utf-8-sig", newline="", errors="replace") as file:
        csv.writer(file).writerows([[cell(value) for value in row] for row in rows])


def _short(grade: Grade | None) -> str:
    return "" if grade is None else grade.mistake or grade.status


def _sections(grades: Sequence[Grade], masters: Sequence[Master], left_out: Sequence[str]) -> Iterable[str]:
    exercises = {task.exercise.number: task.exercise for master in masters for task in master.tasks}
    by_exercise: dict[str, list[Grade]] = defaultdict(list)
    for grade in sorted(grades, key=lambda grade: grade.exercise):
        by_exercise[grade.exercise].append(grade)

    yield "<h2>The exercises</h2>"
    yield '<p><span class="key right">right</span> <span class="key wrong">wrong, or it did not run</span> '
    yield '<span class="key untried">not tried</span></p>'
    rows = []
    for number, theirs in by_exercise.items():
        kinds = {"right": "right", **dict.fromkeys(UNTRIED, "untried")}
        counts = Counter(kinds.get(grade.status, "wrong") for grade in theirs)
        rows.append([f"{number} · {exercises[number].title}", _bar(counts), f"{counts['right']} of {len(theirs)}"])
    yield _rows(["Exercise", "Answers", "Right"], rows, raw=(1,))

    yield "<h2>The most frequent misconceptions</h2>"
    known: dict[tuple[str, str], list[str]] = defaultdict(list)
    for grade in grades:
        if grade.mistake:
            known[grade.exercise, grade.mistake].append(grade.student)
    rows = []
    for (number, key), students in sorted(known.items(), key=lambda item: (-len(item[1]), item[0])):
        hint = next(mistake.hint for mistake in exercises[number].mistakes if mistake.key == key)
        tried = sum(grade.status not in UNTRIED for grade in by_exercise[number])
        rows.append([f"{len(students)} of {tried}", f"{number} · {key}", hint, ", ".join(students)])
    yield _rows(["Of those who tried", "Mistake", "What they were told", "Who"], rows)

    yield "<h2>Who may need help</h2><p>Students with fewer than half of their exercises right.</p>"
    by_student: dict[str, list[Grade]] = defaultdict(list)
    for grade in grades:
        by_student[grade.student].append(grade)
    rows = []
    for student, theirs in by_student.items():
        right = sum(grade.status == "right" for grade in theirs)
        if 2 * right < len(theirs):
            lacking = ", ".join(f"{grade.exercise} {_short(grade)}" for grade in theirs if grade.status != "right")
            rows.append((right / len(theirs), [student, f"{right} of {len(theirs)}", lacking]))
    yield _rows(["Student", "Right", "What is not"], [row for _, row in sorted(rows)])

    yield "<h2>Other answers that are not right</h2>"
    rows = [
        [grade.exercise, grade.student, grade.status, grade.text]
        for grade in grades
        if grade.status not in ("right", "untried", "missing") and not grade.mistake
    ]
    yield _rows(["Exercise", "Student", "Status", "What was said"], sorted(rows))
    if left_out:
        yield "<h2>Notebooks that were left out</h2>"
        yield "<ul>" + "".join(f"<li>{html.escape(plain(line))}</li>" for line in left_out) + "</ul>"


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]], raw: Sequence[int] = ()) -> str:
    """A table; every field is escaped but those of the columns ``raw``."""
    if not rows:
        return "<p>None.</p>"
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{v if i in raw else html.escape(plain(v))}</td>" for i, v in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _bar(counts: Counter) -> str:
    parts = [(name, counts[name]) for name in ("right", "wrong", "untried") if counts[name]]
    told = ", ".join(f"{count} {name}" for name, count in parts)
    spans = "".join(f'<span class="{name}" style="flex:{count}">{count}</span>' for name, count in parts)
    return f'<div class="bar" role="img" aria-label="{told}">{spans}</div>'


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AIGC: the class</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem; border-bottom: 1px solid #8886; }
main { overflow-x: auto; }
td:last-child { overflow-wrap: anywhere; }
.bar { display: flex; min-width: 16rem; }
.bar span, .key { padding: 0 .5rem; color: #000; }
.right { background: #56b4e9; }
.wrong { background: #e69f00; }
.untried { background: #cccccc; }
@media print { .bar span, .key { border: 1px solid #000; } }
</style>
</head>
<body><main><h1>The class</h1>
<p>FACTS</p>
BODY
</main></body>
</html>
"""
