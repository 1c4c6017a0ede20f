"""What a run of the benchmarks leaves: a page, every sample, and a chart."""

import json
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from aigc_course import doctor, linear, plots

from .clock import FOREIGN, RESOLUTION, TRIES, Pair, Result, Row
from .roofline import Rates, share

PACKAGES = ("torch", "torchvision", "transformers", "scikit-learn", "numpy")
LESSON, COURSE = (90, 60), (480, 300)  # seconds: required, and the aim
HEAD = (
    "workload | peer | ours, median | theirs, median | ratio (least–greatest) | required | aim | met? | of the roofline"
)
RATES = {
    "fp32": "fp32 matrix product, the best of all roads",
    "fp32_public": "fp32 matrix product, the best road that torch documents",
    "fp32_torch": "fp32 matrix product, torch's own `a @ b`",
    "bf16": "bf16 matrix product",
    "fp64": "fp64 matrix product",
    "memory": "memory, reading 400 MB",
}


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """The seconds of each lesson at the quick profile, which of them ``failed``, the seconds that ``aigc course`` took
    from its start to its end, and the CPU seconds that other processes used meanwhile."""

    seconds: dict[str, float]
    failed: list[str]
    total: float
    foreign: float

    @property
    def met(self) -> bool:
        """Whether all lessons passed within the required times."""
        each = bool(self.seconds) and max(self.seconds.values()) <= LESSON[0]
        return each and not self.failed and self.total <= COURSE[0]


def facts(threads: int) -> dict[str, str]:
    """The machine, the versions and the date, as the page names them."""
    found = {row.topic: row.value for row in doctor.report()}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "system": f"{platform.system()}, {platform.machine()}",
        "processor": found["processor"],
        "memory": found["memory"],
        "threads": str(threads),
        "linear layers": f"the course takes the way of {linear.road()} by itself",
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
    }


def write(
    results: Sequence[Result],
    rates: Rates,
    lessons: Lessons | None,
    facts: dict[str, str],
    folder: Path,
    sizes: str = "",
) -> None:
    """Write RESULTS.md, results.json and ratios.png into ``folder``.

    ``sizes`` is the Markdown on cost against size, which goes with a picture cost.png that lies there already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "facts": facts,
        "rates": asdict(rates),
        "rows": [_plain(result) for result in results],
        "lessons": lessons and asdict(lessons),
        "sizes": sizes,
    }
    text = json.dumps(stored, indent=1, ensure_ascii=False)
    (folder / "results.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / "RESULTS.md").write_text(page(results, rates, lessons, facts, sizes), encoding="utf-8")
    (folder / "ratios.png").write_bytes(chart(results))


def read(folder: Path) -> tuple[list[Result], Rates, Lessons | None, dict[str, str], str]:
    """What ``write`` was given, out of results.json; the rows cannot be timed again."""
    stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    results = [Result(**{**row, "row": Row(pair=_no_pair, **row["row"])}) for row in stored["rows"]]
    lessons = stored["lessons"] and Lessons(**stored["lessons"])
    return results, Rates(**stored["rates"]), lessons, stored["facts"], stored["sizes"]


def page(
    results: Sequence[Result], rates: Rates, lessons: Lessons | None, facts: dict[str, str], sizes: str = ""
) -> str:
    """RESULTS.md."""
    parts = [f"# Measured on {facts['date']}", METHOD.format(FOREIGN, RESOLUTION * 1e3, TRIES, **facts)]
    parts.append(_table(("this run", ""), [(name, value) for name, value in facts.items() if name != "date"], "ll"))
    parts += ["## The course beside its peers", results_table(results, rates), MARKS]
    bars = ", ".join(f"{result.row.key} {_times(result.ratio)}" for result in results if result.ratio)
    parts.append(f"![How many times as fast as its peer each workload is: {bars}.](ratios.png)")
    if missed := [result for result in results if not result.met]:
        parts += ["## Where a required ratio is not met", *(paragraph(result) for result in missed)]
    parts += ["## What this machine can do", ROOFLINE, rates_table(rates)]
    parts += ["## The lessons", *lessons_part(lessons)]
    if sizes:
        drawn = "![Seconds and memory of generation, of training steps and of EM, against their size.](cost.png)"
        parts += ["## Cost against size", sizes.strip(), drawn]
    return "\n\n".join(parts) + "\n"


def results_table(results: Sequence[Result], rates: Rates) -> str:
    """One line a row of the benchmarks."""
    lines = []
    for result in results:
        row = result.row
        line = [row.workload + "‡" * row.helper, row.peer + "†" * row.written_here]
        if result.error:
            line += ["failed", "failed", "none"]
        else:
            least, greatest = map(_times, result.spread)
            line += [f"{_time(s, result.units)} / {result.unit}" for s in (result.ours, result.theirs)]
            line.append(f"{_times(result.ratio)} ({least}–{greatest})")
        found = share(result, rates)
        line += [_times(row.required), _times(row.aim), verdict(result)]
        line += [f"{found[0]:.0%} of {found[1]}" if found else "–", str(result.rejected)]
        lines.append(line)
    return _table([*HEAD.split(" | "), "rejected couples"], lines, "llrrrrrlrr")


def verdict(result: Result) -> str:
    """ "yes", "yes, and the aim", or "no", with what is missing."""
    if result.error:
        return "no: failed"
    if not result.complete:
        return f"no: {len(result.ours)} of {result.row.repeats} couples were clean"
    if result.met and result.ratio >= result.row.aim:
        return "yes, and the aim"
    return "yes" if result.met else "no"


def paragraph(result: Result) -> str:
    """Why a row is not met: its error, too few clean couples, or the profile of our side."""
    row, title = result.row, f"### {result.row.workload}, beside {result.row.peer}"
    if result.error:
        return f"{title}\n\nThe row failed: `{result.error}`."
    said = f"It reached {_times(result.ratio)}; {_times(row.required)} is required."
    if not result.complete:
        said += f" Only {len(result.ours)} couples of samples were clean, and {row.repeats} are asked for."
    if result.profile:
        said += f" One sample of ours under torch's profiler, its operators by their own CPU time:\n\n{result.profile}"
    return f"{title}\n\n{said}"


def rates_table(rates: Rates) -> str:
    """One line a rate."""
    units = {"memory": "GB/s"}
    lines = [
        (RATES[f.name], f"{getattr(rates, f.name):,.3g} {units.get(f.name, 'GF/s')}" if getattr(rates, f.name) else "–")
        for f in fields(rates)
    ]
    return _table(("what", "rate"), lines, "lr")


def lessons_part(lessons: Lessons | None) -> list[str]:
    """A sentence on how they were run, and one line a lesson."""
    if lessons is None:
        return ["The lessons were not timed in this run."]
    lines = [
        (name, f"{seconds:.1f} s", *map(_seconds, LESSON), _within(seconds, LESSON, name in lessons.failed))
        for name, seconds in lessons.seconds.items()
    ]
    every = _within(lessons.total, COURSE, bool(lessons.failed) or not lessons.seconds)
    lines.append(("all, one after the other", f"{lessons.total:.1f} s", *map(_seconds, COURSE), every))
    said = (
        "The lessons were executed once, at the quick profile, by `aigc course`, with none of their results stored "
        "before; the last line includes its start and the writing of its pages. Other processes used "
        f"{lessons.foreign:.1f} s of CPU time meanwhile."
    )
    return [said, _table(("lesson", "took", "required", "aim", "met?"), lines, "lrrrl")]


def chart(results: Sequence[Result]) -> bytes:
    """A PNG, 1,000 pixels wide: a bar for each row's ratio, marks for what is required and for the aim."""
    blue, vermilion, black = plots.COLOURS[0], plots.COLOURS[1], plots.COLOURS[6]
    with plots.canvas(width=10.0, height=1.6 + 0.55 * len(results)) as (figure, axes):
        for y, result in enumerate(results):
            said = "failed"
            if ratio := result.ratio:
                hatch = "//" * result.row.written_here + ".." * result.row.helper
                colour = blue if result.met else vermilion
                axes.barh(y, ratio - 1, left=1, height=0.6, color=colour, alpha=0.55, hatch=hatch, edgecolor="white")
                axes.hlines(y, *result.spread, color=black, linewidth=1.2)
                said = _times(ratio) if result.met else f"{_times(ratio)}, not met"
            axes.annotate(said, (1.01, y), xycoords=("axes fraction", "data"), va="center")
        ys, required, aims = range(len(results)), [r.row.required for r in results], [r.row.aim for r in results]
        axes.scatter(required, ys, s=160, marker="|", linewidth=2.5, color=black, zorder=3)
        axes.scatter(aims, ys, s=36, marker="D", facecolor="white", edgecolor=black, zorder=3)
        all_ratios = [1, *required, *aims, *(end for result in results if result.ratio for end in result.spread)]
        left, right = min(all_ratios) * 0.8, max(all_ratios) * 1.25
        axes.set(xscale="log", xlim=(left, right), ylim=(len(results) - 0.4, -0.6))
        ticks = [tick for power in (0.01, 0.1, 1, 10, 100) for tick in (power, 2 * power, 5 * power)]
        ticks = [tick for tick in ticks if left <= tick <= right]
        axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axes.set_yticks(ys, [_label(result.row) for result in results], fontsize=9)
        axes.minorticks_off()
        axes.axvline(1, color=plots.GREY, zorder=0)
        axes.set_xlabel("seconds of the peer over seconds of the course (log scale)")
        figure.suptitle("How many times as fast as its peer", x=0.01, ha="left", fontsize=12)
        _legend(figure, blue, vermilion, black)
        return plots.png(figure)


def _legend(figure: Any, met: str, missed: str, mark: str) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Patch(facecolor=met, alpha=0.55, label="required ratio met"),
        Patch(facecolor=missed, alpha=0.55, label="not met"),
        Line2D([], [], color=mark, marker="|", linestyle="", markersize=12, markeredgewidth=2.5, label="required"),
        Line2D([], [], color=mark, marker="D", linestyle="", markersize=6, markerfacecolor="white", label="aim"),
        Line2D([], [], color=mark, linewidth=1.2, label="least to greatest"),
        Patch(facecolor="white", edgecolor=mark, hatch="//", label="† peer written here"),
        Patch(facecolor="white", edgecolor=mark, hatch="..", label="‡ oneDNN helper"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=9)


def _label(row: Row) -> str:
    """The row's name, on as many lines as it takes beside a chart."""
    names = (f"{row.workload}{'‡' * row.helper}", f"beside {row.peer}{'†' * row.written_here}")
    return "\n".join(textwrap.fill(name, 54) for name in names)


def _plain(result: Result) -> dict[str, Any]:
    """A result as JSON holds it: all of it but the function that sets up its pair."""
    plain = {f.name: getattr(result, f.name) for f in fields(result)}
    return plain | {"row": {f.name: getattr(result.row, f.name) for f in fields(Row) if f.name != "pair"}}


def _no_pair() -> Pair:
    raise RuntimeError("this row was read from results.json: take it from benchmarks.images, mixtures or language")


def _within(seconds: float, limits: tuple[float, float], failed: bool) -> str:
    required, aim = limits
    if failed:
        return "no: failed"
    return "no" if seconds > required else "yes, and the aim" if seconds <= aim else "yes"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], align: str) -> str:
    """A Markdown table; ``align`` has an l or an r a column."""
    rule = ["---:" if side == "r" else "---" for side in align]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in (head, rule, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _times(ratio: float) -> str:
    return f"{ratio:.3g}x" if ratio < 1000 else f"{ratio:,.0f}x"


def _seconds(seconds: float) -> str:
    return f"{seconds} s"


def _time(samples: Sequence[float], units: int) -> str:
    """The median of ``samples`` for one of its ``units``, in seconds or milliseconds."""
    seconds = median(samples) / units
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


METHOD = """\
`make bench` (`python -m benchmarks`) wrote this page, the chart beside it and `results.json`, which holds every sample.

Each row times a workload of the course beside what a reader would otherwise use for it: the same architecture, batch,
optimizer settings and number format unless the row says otherwise. Both sides run in turns in one process, ours,
theirs, ours, theirs, with {threads} threads, after one couple of samples that does not count. After each couple, a row
checks that the two sides computed the same, as far as that can be said of them. A couple is rejected, counted and
taken again if during either of them other processes used more than {0:g} of one core (beyond the {1:.0f} ms that
the machine's own clock may be off); a row gives up after {2} times as many couples as it wants. The ratio, their
seconds over ours, is that of the medians of the couples that are left; beside it stand the least and the greatest ratio
of a single couple. Python's garbage collector runs before each sample and not during one; freed memory is kept for
both sides alike, as `fit` has it (`runtime.keep_freed_memory`)."""

MARKS = """\
- † The peer is a script of this folder, written for the comparison in the way its users write it.
- ‡ The course's side uses its oneDNN helper, forced on here as it is forced off in the
  rows without the mark; by itself the course takes it only where it proves itself, see "linear layers" above."""

ROOFLINE = """\
These rates were measured in the same run, with as many threads. A row's share of the roofline is the time that its
multiplications and additions would take at the matrix rate of its number format (for fp32, that of the best road), or
the bytes that it has to read at the rate of memory, whichever is longer, over the time that it took."""
