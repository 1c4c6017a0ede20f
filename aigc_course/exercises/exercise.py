"""What an exercise is, and how an answer to it is judged.

An exercise is called with the reader's answer and returns a ``Verdict``. It never compares with one stored number: a
function is run on fresh random inputs beside the reference, and beside what people write who make a known mistake; if
the answer gives what such a mistake gives, that is what the reader hears.
"""

import copy
import html
import math
import numbers
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime import CourseError

KINDS = ("derivation", "by hand", "prediction", "repair", "open")
MIME = "application/vnd.aigc.verdict+json"  # what ``aigc class grade`` reads from an executed notebook
MARKS = {"right": "✓", "untried": "…"}


@dataclass(frozen=True)
class Verdict:
    """What is said of an answer: ``status`` is "right", "wrong", "raised", "slow" or "untried"; ``mistake`` is its key,
    where it is a known one.
    """

    exercise: str
    status: str
    text: str
    mistake: str = ""

    def __repr__(self) -> str:
        return f"{MARKS.get(self.status, '✗')} Exercise {self.exercise}: {self.text}"

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, Any]:
        facts = {"exercise": self.exercise, "status": self.status, "mistake": self.mistake, "text": self.text}
        # JupyterLab breaks lines of plain text within words, those of Markdown between them
        line = re.sub(r"([\\`*_\[\]$~|#])", r"\\\1", html.escape(repr(self), quote=False))
        return {"text/plain": repr(self), "text/markdown": line, MIME: facts}


class Wrong(Exception):
    """Raised by a judge: the sentence for the reader, and the ``key`` of the mistake if it is a known one."""

    def __init__(self, text: str, key: str = ""):
        super().__init__(text)
        self.key = key


class Untried(Exception):
    """Raised by a judge for an answer that nobody has begun."""


class _Slow(BaseException):
    """Not an ``Exception``, so that an answer that catches those does not catch it."""


@dataclass(frozen=True)
class Mistake:
    """A known mistake: what the reader hears, and what an answer ``gives`` that makes it: a function for a ``Function``
    or a ``Goal``'s judge, a number for a ``Number``, a string for a ``Choice``.
    """

    key: str
    hint: str
    gives: Any = None


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """``number`` as in the lesson ("2.1"), ``kind`` one of ``KINDS``; ``praise`` follows the word "right"."""

    number: str
    title: str
    kind: str
    mistakes: Sequence[Mistake]
    praise: str = ""
    seconds: float = 20.0  # an answer that takes longer is stopped

    def __post_init__(self):
        if self.kind not in KINDS:
            raise CourseError(f"exercise {self.number} is of kind {self.kind!r}: choose from {', '.join(KINDS)}")

    def __call__(self, answer: Any) -> Verdict:
        status, text, key = "right", f"right. {self.praise}".rstrip(), ""
        try:
            if answer is None or answer is ...:
                raise Untried
            with _limited(self.seconds):
                self.judge(answer)
        except Untried:
            status, text = "untried", "not tried yet."
        except _Slow:
            status, text = "slow", f"stopped after {self.seconds:g} seconds. Is there a loop that never ends?"
        except Wrong as wrong:
            status, text, key = "wrong", str(wrong), wrong.key
        except Exception as error:  # the answer's own
            status, text = "raised", _told(error)
        return Verdict(self.number, status, text, key)

    def judge(self, answer: Any) -> None:
        """Return for a right answer, raise ``Wrong`` for another."""
        raise NotImplementedError

    def wrong(self, key: str, detail: str = "") -> Wrong:
        """The mistake ``key`` in the words of this exercise, and a detail in numbers."""
        hint = next(mistake.hint for mistake in self.mistakes if mistake.key == key)
        return Wrong(f"{hint} {detail}".rstrip(), key)


@dataclass(frozen=True, kw_only=True)
class Function(Exercise):
    """An answer that is a function.

    ``cases(rng)`` gives the arguments of each trial call, ``reference`` the right function. What is compared is
    ``outcome(function, *arguments)``: what the function returns unless told otherwise; a tensor, a number, or a tuple
    or dict of these.
    """

    reference: Callable
    cases: Callable[[torch.Generator], Sequence[tuple]]
    outcome: Callable = field(default=lambda function, *arguments: function(*arguments))
    atol: float = 1e-5
    rtol: float = 1e-4

    def judge(self, answer: Any) -> None:
        if not callable(answer):
            raise Wrong(f"the answer is {_kind_of(answer)}: hand over the function itself, without calling it")
        rng = torch.Generator()
        rng.seed()
        cases = list(self.cases(rng))
        found = [self._outcome(answer, case) for case in cases]
        if all(result is None or result is ... or result is NotImplemented for result in found):
            raise Untried
        wanted = [self._outcome(self.reference, case) for case in cases]
        for result, right in zip(found, wanted, strict=True):
            _same_form(result, right)
        if all(map(self._close, found, wanted)):
            return
        detail = next(_deviation(a, b) for a, b in zip(found, wanted, strict=True) if not self._close(a, b))
        for mistake in self.mistakes:
            if mistake.gives is None:
                continue
            theirs = [self._outcome(mistake.gives, case) for case in cases]
            if all(map(self._close, found, theirs)):
                raise self.wrong(mistake.key, detail)
        raise Wrong(f"{_general(found, wanted)}{detail}")

    def _outcome(self, function: Callable, case: tuple) -> Any:
        return _plain(self.outcome(function, *copy.deepcopy(case)))

    def _close(self, a: Any, b: Any) -> bool:
        a, b = _flat(a), _flat(b)
        return len(a) == len(b) and all(
            x.shape == y.shape and torch.allclose(x, y, rtol=self.rtol, atol=self.atol, equal_nan=True)
            for x, y in zip(a, b, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Number(Exercise):
    """An answer that is one number, ``truth()`` up to a share ``rtol`` of it or ``atol``; mistakes give numbers, or
    functions that compute them."""

    truth: Callable[[], float]
    rtol: float = 0.02
    atol: float = 0.0

    def judge(self, answer: Any) -> None:
        if isinstance(answer, bool) or not (
            isinstance(answer, numbers.Real) or (isinstance(answer, Tensor) and answer.numel() == 1)
        ):
            raise Wrong(f"the answer is {_kind_of(answer)}: one number is asked for")
        value, truth = float(answer), float(self.truth())
        if not math.isfinite(value) or abs(value - truth) > self.atol + self.rtol * abs(truth):
            for mistake in self.mistakes:
                if mistake.gives is None:
                    continue
                other = float(mistake.gives() if callable(mistake.gives) else mistake.gives)
                if abs(value - other) <= self.atol + self.rtol * abs(other):
                    raise self.wrong(mistake.key)
            raise Wrong(f"{value:.4g} is {'too high' if value > truth else 'too low'}.")


@dataclass(frozen=True, kw_only=True)
class Choice(Exercise):
    """An answer that is one of several words; each mistake gives one of the others."""

    truth: str

    def judge(self, answer: Any) -> None:
        options = [self.truth, *(mistake.gives for mistake in self.mistakes)]
        chosen = answer.strip().lower() if isinstance(answer, str) else answer
        if chosen not in options:
            raise Wrong(f"{answer!r} is not one of {', '.join(sorted(options))}")
        if chosen != self.truth:
            raise self.wrong(next(mistake.key for mistake in self.mistakes if mistake.gives == chosen))


@dataclass(frozen=True, kw_only=True)
class Goal(Exercise):
    """An answer with a measurable goal: ``measure(exercise, answer)`` raises ``Wrong`` or returns what it measured."""

    measure: Callable[["Goal", Any], Any]

    def judge(self, answer: Any) -> None:
        self.measure(self, answer)


# ---- around the answer ----


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Stop what runs inside after ``seconds``, where the system knows how (not on Windows, not outside the main
    thread)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number, frame):
        raise _Slow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _told(error: Exception) -> str:
    """The error in one line, with the line of the answer in which it arose, if that can be told."""
    if isinstance(error, NotImplementedError):
        return "your answer raised NotImplementedError: fill in the part that is left open."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "aigc_course" not in frame.filename]
    where = f" in its line {frames[-1].lineno}" if frames and "site-packages" not in frames[-1].filename else ""
    message = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"your answer raised {type(error).__name__}{where}: {message}"


# ---- comparing ----


def _plain(value: Any) -> Any:
    """Tensors detached, on the CPU and in double precision; the form is kept."""
    if isinstance(value, Tensor):
        return value.detach().cpu().to(torch.float64)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_plain(item) for item in value)
    if isinstance(value, numbers.Real):
        return torch.tensor(float(value), dtype=torch.float64)
    return value


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, Mapping):
        return [part for key in sorted(value) for part in _flat(value[key])]
    if isinstance(value, tuple):
        return [part for item in value for part in _flat(item)]
    return [value]


def _same_form(found: Any, wanted: Any) -> None:
    if found is None:
        raise Wrong("your function returns nothing for some inputs: is a return missing?")
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping) or set(found) != set(wanted):
            raise Wrong(f"a dict with the keys {', '.join(map(repr, wanted))} is asked for, not {_kind_of(found)}")
        for key in wanted:
            _same_form(found[key], wanted[key])
    elif isinstance(wanted, tuple):
        if not isinstance(found, tuple) or len(found) != len(wanted):
            raise Wrong(f"{len(wanted)} values are asked for, not {_kind_of(found)}")
        for ours, right in zip(found, wanted, strict=True):
            _same_form(ours, right)
    elif not isinstance(found, Tensor):
        raise Wrong(f"your function returns {_kind_of(found)}: a tensor is asked for")


def _kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    if isinstance(value, Mapping):
        return f"a dict with the keys {', '.join(map(repr, value))}"
    return f"of the type {type(value).__name__}"


def _deviation(found: Any, wanted: Any) -> str:
    """The greatest deviation, in numbers."""
    for a, b in zip(_flat(found), _flat(wanted), strict=True):
        if a.shape != b.shape:
            return f"(shape {tuple(a.shape)}, expected {tuple(b.shape)})"
        if not torch.allclose(a, b, rtol=1e-6, atol=1e-8, equal_nan=True):
            at = int((a - b).abs().nan_to_num(math.inf).argmax())
            return f"(your {a.flatten()[at]:.4g} stands where {b.flatten()[at]:.4g} is right)"
    return ""


def _general(found: Sequence[Any], wanted: Sequence[Any]) -> str:
    """What can be said without knowing the mistake."""
    a = torch.cat([part.flatten() for value in found for part in _flat(value)])
    b = torch.cat([part.flatten() for value in wanted for part in _flat(value)])
    shapes = [[tuple(part.shape) for value in values for part in _flat(value)] for values in (found, wanted)]
    if shapes[0] != shapes[1]:
        return "the shape is another one than asked for. "
    if not a.isfinite().all() and b.isfinite().all():
        return "some of your numbers are infinite or not a number. "
    if torch.allclose(a, -b, rtol=1e-4, atol=1e-6):
        return "right but for the sign. "
    large = b.abs() > 1e-6 * b.abs().max()
    factor = (a[large] / b[large]).median() if large.any() else torch.tensor(1.0)
    if torch.allclose(a, factor * b, rtol=1e-4, atol=1e-6):
        return f"your numbers are {factor:.4g} times the right ones. "
    right = torch.isclose(a, b, rtol=1e-4, atol=1e-6).double().mean()
    return "your numbers are not the right ones. " if right < 0.1 else f"{right:.0%} of your numbers are right. "
