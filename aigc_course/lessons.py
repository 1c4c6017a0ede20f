"""What a lesson calls: begin, show the live source, verify a claim, record a figure, and finish."""

import inspect
import json
import math
import os
import re
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoints
from .runtime import CourseError, course_dir, pick_profile

RELATIONS = {"==": "=", "<=": "≤", ">=": "≥"}


class LessonError(CourseError, AssertionError):
    """A claim of the lesson does not hold, or a figure left its band."""


@dataclass(frozen=True)
class Claim:
    """One verified statement: the ``tag`` of its equation, the outcome, and the line that was printed."""

    tag: str
    passed: bool
    line: str


@dataclass(frozen=True)
class Figure:
    """One measured number, the ``control`` that its band must exclude, and the band itself once ``finish`` knows it."""

    name: str
    value: float
    unit: str
    control: float
    low: float | None = None
    high: float | None = None
    passed: bool = False


class _Ledger:
    """What this kernel's lesson has verified and recorded so far."""

    def __init__(self):
        self.lesson, self.profile, self.seed = None, None, None
        self.claims: dict[tuple[str, str], Claim] = {}
        self.figures: dict[str, Figure] = {}


_ledger = _Ledger()


def begin(lesson: str, profile: str | None = None, seed: int = 0) -> str:
    """Open the ledger of ``lesson`` (its file's name without the ending); returns the profile, "quick" or "full"."""
    if not (course_dir() / "notebooks" / f"{lesson}.ipynb").is_file():
        raise CourseError(f"there is no lesson {lesson!r} in notebooks/")
    _ledger.__init__()
    _ledger.lesson, _ledger.profile, _ledger.seed = lesson, pick_profile(profile), seed
    return _ledger.profile


def show(*objects: Callable) -> None:
    """Display the live source of each function or class, with its file and line."""
    from IPython.display import display

    for thing in map(inspect.unwrap, objects):
        lines, first = inspect.getsourcelines(thing)
        path = Path(inspect.getsourcefile(thing))
        if path.is_relative_to(course_dir()):
            path = path.relative_to(course_dir())
        code = f"# {path.as_posix()}, line {first}\n{textwrap.dedent(''.join(lines)).rstrip()}"
        display({"text/markdown": f"```python\n{code}\n```", "text/plain": code}, raw=True)


def verify(
    tag: str,
    left: Any,
    right: Any,
    *,
    relation: str = "==",
    atol: float = 0.0,
    rtol: float = 0.0,
    stderr: Any = None,
    note: str = "",
) -> None:
    """Check the claim with the equation number ``tag`` and enter the outcome in the ledger.

    ``left`` and ``right`` are numbers or tensors that broadcast, computed by different roads. They are equal, or stand
    in ``relation`` "<=" or ">=", up to ``atol + rtol * |right|``; with ``stderr`` they are a Monte Carlo figure and its
    target, and may differ by 4 of these standard errors. ``note`` tells several checks of one tag apart.

    Raises ``LessonError`` if the claim does not hold; nothing holds of a NaN or of infinity.
    """
    if relation not in RELATIONS:
        raise CourseError(f"verify({tag!r}): the relation {relation!r} is not one of {', '.join(RELATIONS)}")
    if left is right and isinstance(left, torch.Tensor):
        raise CourseError(f"verify({tag!r}): both sides are the same object, which proves nothing")
    left, right = _exact(left), _exact(right)
    slack = atol + rtol * right.abs()
    finite = all(bool(side.isfinite().all()) for side in (left, right, slack))
    if stderr is not None:
        stderr = _exact(stderr)
        if not (stderr > 0).all() or not stderr.isfinite().all():
            raise CourseError(f"verify({tag!r}): a standard error must be positive and finite")
        slack = slack + 4 * stderr
    difference = left - right
    excess = {"==": difference.abs(), "<=": difference, ">=": -difference}[relation]
    passed = finite and bool((excess <= slack).all()) and difference.numel() > 0
    if not difference.numel():
        measured = "there is nothing to compare"
    elif not finite:
        measured = "a side is infinite or not a number"
    elif stderr is not None:
        measured = f"largest difference {float((difference / stderr).abs().max()):.1f} standard errors, allowed 4"
    elif relation == "==":
        measured = f"largest difference {float(excess.max()):.2g}, allowed {float(slack.max()):.2g}"
    else:
        margin = f"smallest margin {float(-excess.max()):.2g}, allowed {float(-slack.max()):.2g}"
        measured = f"left {RELATIONS[relation]} right, {margin}"
    line = f"{'✓' if passed else '✗'} ({tag}) {note + ': ' if note else ''}{measured}"
    _ledger.claims[tag, note] = Claim(tag, passed, line)
    print(line)
    if not passed:
        raise LessonError(f"claim ({tag}) does not hold: {line[2:]}")


def _exact(side: Any) -> torch.Tensor:
    if isinstance(side, complex) or (isinstance(side, torch.Tensor) and side.is_complex()):
        raise CourseError("verify compares real numbers: verify real and imaginary part, or the modulus")
    # as_tensor alone would round a Python float to float32
    return (
        side.detach().cpu().double() if isinstance(side, torch.Tensor) else torch.as_tensor(side, dtype=torch.float64)
    )


def record(name: str, value: float, *, control: float, unit: str = "") -> None:
    """Enter a measured figure in the ledger; ``finish`` holds it to its band.

    ``control`` is the same figure of something untrained or spoilt: a band that contained it would prove nothing.
    """
    _ledger.figures[name] = Figure(name, float(value), unit, float(control))
    print(f"{name}: {float(value):.4g} {unit}".rstrip())


def finish() -> None:
    """Hold the lesson to its word, as its last cell: every tagged equation verified, every figure in its band.

    Writes what was verified and recorded as ``<lesson>.json`` into the folder that ``AIGC_RECORD_DIR`` names, if it
    does, and prints a summary. Raises ``LessonError`` if anything is missing, red or out of its band.
    """
    if _ledger.lesson is None:
        raise CourseError("finish() has no lesson: run the cell that calls begin() first")
    tags = lesson_tags(_ledger.lesson)
    verified = {claim.tag for claim in _ledger.claims.values()}
    problems = [f"({tag}) was not verified" for tag in tags if tag not in verified]
    problems += [f"({tag}) was verified but no equation carries it" for tag in sorted(verified - set(tags))]
    problems += [f"({claim.tag}) does not hold" for claim in _ledger.claims.values() if not claim.passed]
    bands = _bands()
    figures = [_banded(figure, bands) for figure in _ledger.figures.values()]
    problems += [f"{name!r} has a band but was not recorded" for name in bands if name not in _ledger.figures]
    problems += [f"{f.name!r} has no band" for f in figures if bands and f.low is None]
    problems += [f"{f.name!r} is {f.value:.6g}, {_why(f)}" for f in figures if not f.passed]
    _write_record(figures, passed=not problems)
    if problems:
        raise LessonError(f"{_ledger.lesson}: {'; '.join(problems)}")
    for f in figures:
        band = "no band for this profile yet" if f.low is None else f"band {f.low:.4g} to {f.high:.4g}"
        print(f"{f.name}: {f.value:.4g} {f.unit} ({band}; control {f.control:.4g})")
    print(f"numbered claims verified: {len(tags)}; figures recorded: {len(figures)}")


def lesson_tags(lesson: str) -> list[str]:
    r"""The numbers of all ``\tag{…}`` in the lesson's text, in order."""
    path = course_dir() / "notebooks" / f"{lesson}.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return list(dict.fromkeys(re.findall(r"\\tag\*?\s*\{([^}]+)\}", text)))


def band(values: list[float]) -> tuple[float, float]:
    """The band that repeats of a figure set: mean ± 4 standard deviations, and never narrower than ± 0.1 % of it."""
    mean, half = statistics.mean(values), 4 * statistics.stdev(values)
    half = max(half, 1e-3 * abs(mean))
    return mean - half, mean + half


def _bands() -> dict[str, list[float]]:
    """The values that give this lesson's bands in this profile; none while they are being measured."""
    path = course_dir() / "data" / "bands" / f"{_ledger.lesson}.json"
    if os.environ.get("AIGC_BANDS") == "measure" or not path.is_file():
        return {}
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))["profiles"].get(_ledger.profile, {})
        for values in measured.values():
            band(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = f"in the course's folder, run: git checkout -- data/bands/{path.name}"
        raise CourseError(f"{path}: expected the measured bands, found no such table ({error!r}); {remedy}") from error
    return measured


def _banded(figure: Figure, bands: dict[str, list[float]]) -> Figure:
    finite = math.isfinite(figure.value) and math.isfinite(figure.control)
    if figure.name not in bands:
        return replace(figure, passed=finite)
    low, high = band(bands[figure.name])
    passed = finite and low <= figure.value <= high and not low <= figure.control <= high
    return replace(figure, low=low, high=high, passed=passed)


def _why(figure: Figure) -> str:
    if not (math.isfinite(figure.value) and math.isfinite(figure.control)):
        return f"its control {figure.control:.6g}: both must be finite"
    band = f"the band {figure.low:.6g} to {figure.high:.6g}"
    inside = figure.low <= figure.value <= figure.high
    return f"and {band} holds the control {figure.control:.6g}" if inside else f"outside {band}"


def _write_record(figures: list[Figure], *, passed: bool) -> None:
    folder = os.environ.get("AIGC_RECORD_DIR")
    if not folder:
        return
    facts = {
        "lesson": _ledger.lesson,
        "profile": _ledger.profile,
        "seed": _ledger.seed,
        "passed": passed,
        "claims": [asdict(claim) for claim in _ledger.claims.values()],
        "figures": [asdict(figure) for figure in figures],
    }
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    checkpoints.write_atomically(Path(folder) / f"{_ledger.lesson}.json", text.encode("utf-8"))
