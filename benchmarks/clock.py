"""Two ways of doing the same work, timed in turns."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import psutil

from aigc_course import linear

FOREIGN = 0.1  # cores that other processes may use during a sample
RESOLUTION = 0.03  # seconds: the machine's clock counts in steps of 10 ms a core
TRIES = 3  # couples taken for each that is asked for, at most


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Both sides of a row, set up. Each call is one sample: ``units`` times the ``unit`` of work.

    Where ours is much the shorter, it does that ``times`` over. ``check`` is given what the two returned. ``flops`` in
    the number format ``format``, and ``bytes`` that must be read, are those of one sample of ours, where they limit it.
    """

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    check: Callable[[Any, Any], None] | None = None
    units: int = 1
    unit: str = "epoch"
    times: int = 1
    flops: float | None = None
    bytes: float | None = None
    format: str = "fp32"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table: ``pair()`` sets up both sides and sees that they do the same; ``required`` and ``aim`` are
    ratios of their seconds to ours. ``written_here`` marks a peer that is a script of this folder; with ``helper`` our
    side goes through oneDNN's linear layer, without it through torch's."""

    key: str
    workload: str
    peer: str
    pair: Callable[[], Pair]
    required: float
    aim: float
    written_here: bool = False
    helper: bool = False
    repeats: int = 5


def both(rows: list[Row]) -> list[Row]:
    """Each row twice: through torch's public linear layer, and through oneDNN's."""
    return [twin for row in rows for twin in (row, replace(row, key=f"{row.key}-onednn", helper=True))]


@dataclass(frozen=True)
class Sample:
    """One side of a row, run once: its seconds, and the CPU seconds that other processes used meanwhile."""

    seconds: float
    foreign: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a row: the seconds of both sides in each clean couple of samples, how many couples were
    ``rejected``, the ``profile`` of our side (Markdown) if it is slower than required, the ``error`` if it failed, and
    the seconds that all of it took. The rest is the pair's."""

    row: Row
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    rejected: int = 0
    profile: str | None = None
    error: str | None = None
    took: float = 0.0
    units: int = 1
    unit: str = "epoch"
    flops: float | None = None
    bytes: float | None = None
    format: str = "fp32"

    @property
    def ratio(self) -> float | None:
        """The median of their seconds over the median of ours; None for a row that failed."""
        return None if self.error else median(self.theirs) / median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest ratio of a couple."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        return min(ratios), max(ratios)

    @property
    def complete(self) -> bool:
        """Whether there are as many clean couples as the row asks for."""
        return len(self.ours) >= self.row.repeats

    @property
    def met(self) -> bool:
        """Whether as many clean couples as the row asks for show the ratio that it requires."""
        return self.error is None and self.complete and self.ratio >= self.row.required


def quiet(sample: Sample) -> bool:
    """Whether the other processes left the machine alone: a tenth of one core, beyond the clock's 30 ms, is allowed."""
    return sample.foreign <= FOREIGN * sample.seconds + RESOLUTION


def compare(row: Row, quiet: Callable[[Sample], bool] = quiet) -> Result:
    """Time both sides of ``row`` in turns, ours first, after one couple that is not timed.

    A couple of which a sample was not ``quiet`` is rejected, and another one taken in its place, up to ``TRIES`` times
    the row's repeats in all. Whatever the pair raises, also for results that do not agree, ends up in ``Result.error``.
    """
    start = time.perf_counter()
    result: dict[str, Any] = {"ours": [], "theirs": [], "rejected": 0}
    try:
        with linear.taking("onednn" if row.helper else "torch"):
            pair = row.pair()
            result |= {name: getattr(pair, name) for name in ("units", "unit", "flops", "bytes", "format")}
            _couple(pair)
            with short_collections():
                while (
                    len(result["ours"]) < row.repeats and len(result["ours"]) + result["rejected"] < TRIES * row.repeats
                ):
                    ours, theirs = _couple(pair)
                    if quiet(ours) and quiet(theirs):
                        result["ours"].append(ours.seconds / pair.times)
                        result["theirs"].append(theirs.seconds)
                    else:
                        result["rejected"] += 1
            if not result["ours"]:
                raise RuntimeError(f"other processes used the machine during each of {result['rejected']} couples")
            if Result(row=row, **result).ratio < row.required:
                result["profile"] = _profiled(pair.ours)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return Result(row=row, took=time.perf_counter() - start, **result)


def sample(work: Callable[[], Any]) -> tuple[Sample, Any]:
    """Run ``work`` once, without garbage collections meanwhile; what it took, and what it returned."""
    gc.collect()
    gc.disable()
    try:
        machine, own, start = machine_seconds(), time.process_time(), time.perf_counter()
        value = work()
        seconds, own = time.perf_counter() - start, time.process_time() - own
        return Sample(seconds, machine_seconds() - machine - own), value
    finally:
        gc.enable()


@contextmanager
def short_collections() -> Iterator[None]:
    """Inside, garbage collections pass over what there was before: the packages alone would take them half a second."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _profiled(work: Callable[[], Any]) -> str:
    """The profile, or why there is none: what was timed is not lost by it."""
    try:
        return profile(work)
    except Exception as error:
        return f"There is no profile: {type(error).__name__}: {error}"


def profile(work: Callable[[], Any], top: int = 8) -> str:
    """A Markdown table of the ``top`` operators of one run of ``work`` by the CPU time of the operator itself."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    inside = sum(event.self_cpu_time_total for event in events) / 1e6
    lines = [(event.key, f"{event.count:,}", event.self_cpu_time_total / 1e6) for event in events[:top]]
    lines.append(("outside torch's operators", "", max(seconds - inside, 0.0)))
    table = ["| operator | calls | itself, ms | share |", "|---|---:|---:|---:|"]
    return "\n".join(table + [f"| {n} | {calls} | {s * 1e3:.1f} | {s / seconds:.0%} |" for n, calls, s in lines])


def _couple(pair: Pair) -> tuple[Sample, Sample]:
    """One sample of ours, then one of theirs, which must agree."""
    (ours, our_value), (theirs, their_value) = sample(pair.ours), sample(pair.theirs)
    if pair.check:
        pair.check(our_value, their_value)
    return ours, theirs


def machine_seconds() -> float:
    """CPU seconds that all cores have spent on any process since the machine started, or lost to its host."""
    times = psutil.cpu_times()
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
