"""The table of faults: what each row must hold, how often it is injected, and how often it held."""

import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest

from aigc_course import course
from aigc_course.runtime import CourseError
from faults.tiny import KINDS

FOLDER = Path(__file__).parent
FULL = os.environ.get("AIGC_FAULTS") == "full"


@dataclass
class Row:
    """One kind of fault: ``full`` cases in `make faults`, ``draw`` in `make test`, and what became of them."""

    title: str
    full: int
    draw: int
    injected: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def n(self) -> int:
        return self.full if FULL else self.draw

    @property
    def held(self) -> int:
        return self.injected - len(self.broken)

    def line(self) -> str:
        return f"{self.title:<40} {self.injected:>8} {self.held:>6} {self.n:>6} {self.seconds:>8.0f}"


STEPS, LESSONS, STRATEGIES = len(KINDS), len(course.lessons()), 8  # kinds of training step, lessons, ways to decode
ROWS = {
    "1": Row("killed while saving", 200, 10),
    "2": Row("killed in mid-epoch, resumed", 5 * STEPS, STEPS),
    "3": Row("one bit of a checkpoint flipped", 500, 40),
    "4": Row("checkpoint truncated", 300, 30),
    "5": Row("pickle payloads", 20, 20),
    "6": Row("hostile safetensors", 40, 40),
    "7": Row("damaged data files", 558, 60),
    "8": Row("gzip bombs", 10, 2),
    "9": Row("disk full", 20, 3),
    "10": Row("read-only folders", 10, 3),
    "11": Row("loss turns NaN or infinite", 10 * STEPS, 2 * STEPS),
    "12": Row("Ctrl-C in a cell", 5, 1),
    "13": Row("a kernel dies, a cell never ends", 6, 2),
    "14": Row("one of two ranks is lost", 9, 3),
    "15a": Row("tokenizer against tiktoken", 10_000, 300),
    "15b": Row("hostile prompts", 60, 10),
    "16": Row("prompts around the context's length", 5 * STRATEGIES, 5 * STRATEGIES),
    "17": Row("two kernels, one run folder", 5, 1),
    "18": Row("a lesson's cells run twice", LESSONS, 1),
    "19": Row("another locale, path and encoding", 3, 1),
    "20": Row("what a lesson's file may not hold", LESSONS, LESSONS),
}


class Fault:
    """Counts the cases of one row; ``rng`` draws them, the same in every session."""

    def __init__(self, row: Row, key: str):
        self.row, self.n, self.rng, self.skipped = row, row.n, random.Random(f"fault {key}"), False

    def skip(self, why: str) -> NoReturn:
        """Leave out the rest of the row, which cannot be injected on this system; `make faults` tells it by failing."""
        self.skipped = True
        pytest.skip(why)

    @contextmanager
    def case(self, name: object) -> Iterator[None]:
        """One injected fault: it held if the block raises nothing. A case that broke does not stop the next."""
        self.row.injected += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            reason = (str(error).splitlines() or [""])[0]
            self.row.broken.append(f"{name}: {type(error).__name__}: {reason}")


@pytest.fixture
def fault(request) -> Iterator[Fault]:
    """The row that ``@pytest.mark.fault("3")`` names; each of its cases must have been injected, and have held."""
    (key,) = request.node.get_closest_marker("fault").args
    row = ROWS[key]
    row.injected, row.broken, start = 0, [], time.perf_counter()
    asked = Fault(row, key)
    yield asked
    row.seconds = time.perf_counter() - start
    assert asked.skipped or row.injected == row.n, f"{row.injected} cases were injected, not {row.n}"
    assert not row.broken, f"{len(row.broken)} of {row.n} did not hold:\n" + "\n".join(row.broken[:20])


def clear_error(call: Callable[[], object], *named: str, kind: type = CourseError) -> str:
    """The message of the one error of ``kind`` that ``call`` must raise: one line that holds each of ``named``."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert message and "\n" not in message, repr(message)
    assert not (missing := [word for word in named if word not in message]), f"{missing} not in: {message}"
    return message


def whole(session) -> bool:
    """Whether ``session`` is one of all of tests/faults, not of a file or two."""
    return {path.name for path in FOLDER.glob("test_*.py")} <= {item.path.name for item in session.items}


def pytest_sessionfinish(session) -> None:
    """`make faults` fails if a row was left out, even by a test that was skipped."""
    if FULL and whole(session):
        session.exitstatus = session.exitstatus or int(any(row.held < row.n for row in ROWS.values()))


def pytest_terminal_summary(terminalreporter) -> None:
    ran = {key: row for key, row in ROWS.items() if row.injected or FULL}
    if not any(row.injected for row in ran.values()):
        return
    tokenizer = {"15a"}  # ten thousand strings would drown the rest
    for title, keys in {"faults": ran.keys() - tokenizer, "the tokenizer": ran.keys() & tokenizer}.items():
        rows = {key: row for key, row in ran.items() if key in keys}
        if not rows:
            continue
        terminalreporter.section(f"{title}, {'full counts' if FULL else 'a draw'}")
        terminalreporter.line(f"{'row':>4}  {'fault':<40} {'injected':>8} {'held':>6} {'asked':>6} {'seconds':>8}")
        for key, row in rows.items():
            terminalreporter.line(f"{key:>4}  {row.line()}{'' if row.held == row.n else '  <--'}")
        total = Row("all", *(sum(getattr(row, name) for row in rows.values()) for name in ("full", "draw", "injected")))
        total.broken = [line for row in rows.values() for line in row.broken]
        total.seconds = sum(row.seconds for row in rows.values())
        terminalreporter.line(f"{'':>4}  {total.line()}")
