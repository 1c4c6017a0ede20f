"""Grading: find the notebooks, run each student's answers apart from all others, and let the lesson's checks judge."""

import shutil
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ..checkpoints import writable
from ..exercises.exercise import MIME
from ..runtime import CourseError, course_dir
from . import report
from .kernel import START, Kernel, Lost, Stopped
from .masters import Master, Task, masters
from .report import Grade
from .submissions import LARGEST, Step, Submission, Unread, code_of, find, plan

NOTEBOOK = 10  # a notebook may take so many times what an exercise may
JUDGED = ("right", "wrong", "raised", "slow", "untried")


def grade(
    submissions: Path,
    out: Path | None = None,
    *,
    seconds: float = 60.0,
    memory: float = 4000.0,
    jobs: int = 1,
    everything: bool = False,
    lessons: Sequence[Master] | None = None,
) -> int:
    """Grade every notebook below ``submissions`` into ``out``: grades.csv, summary.csv and class.html.

    An exercise may take ``seconds`` and a kernel ``memory`` MB; ``jobs`` notebooks are graded at a time. Of a notebook
    the exercises are run, after the lesson's own imports and the student's; with ``everything``, all its cells. Returns
    0, or 1 if a notebook was left out or could not be read. Raises ``CourseError`` if there is nothing to grade.
    """
    for name, value in {"--seconds": seconds, "--memory": memory, "--jobs": jobs}.items():
        if not value > 0:
            raise CourseError(f"{name} is {value:g}: give a number above 0")
    known = list(masters() if lessons is None else lessons)
    found, left_out = find(Path(submissions), known)
    if not found:
        why = f": {left_out[0]}" if left_out else ", no file that ends in .ipynb"
        raise CourseError(f"{submissions} holds no notebook to grade{why}")
    out = writable(Path(out or course_dir() / "build" / "class"), "--out")
    report.claim(out)
    for line in left_out:
        print(f"left out: {line}")
    grades: list[Grade] = []
    try:
        _grade_all(found, grades, seconds, memory, jobs, everything)
    finally:
        if grades:  # what there is, if it is stopped
            page = report.write(out, grades, known, left_out, len(found))
            right = sum(grade.status == "right" for grade in grades)
            print(f"{len(grades)} exercises graded, {right} right. The class: {page}")
    return 1 if left_out or any(grade.status == "unread" for grade in grades) else 0


def _grade_all(found, grades, seconds, memory, jobs, everything) -> None:
    stop, start, live = threading.Event(), time.monotonic(), sys.stderr.isatty()
    with ThreadPoolExecutor(jobs) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of what students wrote
        waiting = {pool.submit(_grade_one, each, seconds, memory, everything, stop): each for each in found}
        try:
            _bar(live, 0, len(found), start, "")
            for done, future in enumerate(as_completed(waiting), 1):
                theirs = future.result()
                grades += theirs
                right, each = sum(grade.status == "right" for grade in theirs), waiting[future]
                told = f"{each.student} · {each.master.name}: {right} of {len(theirs)} right"
                _bar(live, done, len(found), start, told)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
        finally:
            grades.sort(key=lambda grade: (grade.student, grade.lesson, grade.exercise))
            print(end="\n" if live else "", file=sys.stderr)


def _bar(live: bool, done: int, total: int, start: float, told: str) -> None:
    gone = time.monotonic() - start
    left = f"{gone:.0f} s, about {gone / done * (total - done):.0f} s left" if done else "the first one"
    line = f"{done}/{total} notebooks · {left} · {report.plain(told)}"
    if live:
        bar = f"[{'#' * (20 * done // total)}{'.' * (20 - 20 * done // total)}] {line}"
        print(f"\r\033[K{bar[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
    elif done:
        print(line, file=sys.stderr, flush=True)


def _grade_one(each: Submission, seconds, memory, everything, stop) -> list[Grade]:
    """The grades of one notebook; whatever is wrong with it stays its own affair."""
    try:
        data = each.path.read_bytes() if each.path.stat().st_size <= LARGEST else None
        code = code_of(each.path, data)
        return Grader(each, code, data, seconds, memory, everything, stop).grades()
    except Unread as error:
        told = str(error)
    except (CourseError, Stopped):
        raise
    except Exception as error:
        told = f"it could not be graded: {type(error).__name__}: {error}"
    return [
        Grade(each.student, each.master.name, task.exercise.number, "unread", text=report.plain(told))
        for task in each.master.tasks
    ]


class Grader:
    """One notebook: its steps, run in as many kernels as it takes."""

    def __init__(self, each: Submission, code, data: bytes, seconds, memory, everything, stop):
        self.each, self.data, self.seconds, self.memory, self.stop = each, data, seconds, memory, stop
        self.steps = plan(each.master, code, everything)
        self.done: dict[str, Grade] = {}
        self.skipped: set[int] = set()
        self.spent = 0.0

    def grades(self) -> list[Grade]:
        for task in self.each.master.tasks:
            if not any(step.task is task for step in self.steps):
                self._enter(task, "missing", "no cell of the notebook is this exercise's.")
        while any(step.task and step.task.check not in self.done for step in self.steps):
            self._go()
        return [self.done[task.check] for task in self.each.master.tasks]

    def _enter(self, task: Task, status: str, text: str, mistake: str = "", seconds: float = 0.0) -> None:
        at = (self.each.student, self.each.master.name, task.exercise.number)
        self.done[task.check] = Grade(*at, status, mistake, round(seconds, 2), report.plain(text))

    def _go(self) -> None:
        """Run what is left in a fresh kernel, as far as that lives."""
        fresh = True
        with Kernel({self.each.path.name: self.data}, self.memory, self.stop) as kernel:
            for index, step in enumerate(self.steps):
                if index in self.skipped or (step.task and step.task.check in self.done):
                    continue
                limit = min(self.seconds, NOTEBOOK * self.seconds - self.spent) if step.students else START
                if limit <= 0 and step.task:
                    whole = NOTEBOOK * self.seconds
                    self._enter(step.task, "slow", f"the {whole:g} seconds of the whole notebook were over before.")
                if limit <= 0:
                    continue
                start = time.monotonic()
                try:
                    self._run(kernel, step, limit)
                except Lost as lost:
                    if not step.students:
                        first = f"the first cells of {self.each.master.name} do not run"
                        raise CourseError(f"{first}: {lost} (--memory allows more)") from lost
                    if step.task is None:
                        self.skipped.add(index)
                    # what an earlier exercise left behind may have done it: then there is a second try, in a fresh one
                    elif fresh or lost.status == "slow":
                        self._enter(step.task, lost.status, str(lost), seconds=time.monotonic() - start)
                    return
                finally:
                    self.spent += time.monotonic() - start if step.students else 0.0
                fresh = fresh and step.task is None

    def _run(self, kernel: Kernel, step: Step, limit: float) -> None:
        start, error = time.monotonic(), ""
        for source in step.sources:
            reply = kernel.run(source, _left(start, limit))
            error = error or _error(reply)
        if not step.students and error:
            raise CourseError(f"the first cells of {self.each.master.name} do not run: {error}")
        if step.task:
            answer = kernel.run("", _left(start, limit), step.task.expression)
            status, mistake, text = judge(step.task, answer["value"], error)
            self._enter(step.task, status, text, mistake, time.monotonic() - start)


def _left(start: float, limit: float) -> float:
    return max(0.1, start + limit - time.monotonic())


def _error(reply: dict[str, Any]) -> str:
    if reply.get("status") == "ok":
        return ""
    return f"{reply.get('ename', 'it')}: {str(reply.get('evalue', '')).strip() or 'no message'}"


def judge(task: Task, value: dict[str, Any], error: str) -> tuple[str, str, str]:
    """Status, mistake and text from what the check gave, and from the ``error`` that the cell itself raised."""
    facts = value.get("data", {}).get(MIME) if value.get("status") == "ok" else None
    if isinstance(facts, dict) and facts.get("exercise") == task.exercise.number and facts.get("status") in JUDGED:
        status, mistake = facts["status"], facts.get("mistake")
        if status != "wrong" or mistake not in {known.key for known in task.exercise.mistakes}:
            mistake = ""
        if status == "right" or mistake or not error:
            return status, mistake, str(facts.get("text", ""))
    if error:
        return "raised", "", f"the cell raised {error}"
    if value.get("ename") == "NameError":
        return "raised", "", f"{_error(value)}: was the name of the answer changed, or is it made in another cell?"
    return "raised", "", f"the check gave no verdict ({_error(value) or 'its result is of another kind'})"
