"""The clock of the benchmarks rejects what others disturbed, counts it, and the page says what was found."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import clock, report
from benchmarks.clock import Pair, Result, Row, Sample, compare
from benchmarks.roofline import Rates, share

RATES = Rates(fp32=200, fp32_public=180, fp32_torch=100, bf16=600, fp64=50, memory=40)
FACTS = {"date": "2026-01-02", "processor": "a processor, 2 cores", "memory": "16 GiB", "threads": "2", "torch": "2.15"}
SPIN = "import time\nprint(flush=True)\nend = time.perf_counter() + 60\nwhile time.perf_counter() < end: pass"


def row(pair=None, **changes) -> Row:
    fields = {"key": "work", "workload": "A workload", "peer": "a peer", "required": 1.5, "aim": 3.0} | changes
    return Row(pair=pair or (lambda: Pair(ours=int, theirs=int)), **fields)


def always(sample) -> bool:
    return True


def spin(seconds: float) -> None:
    """Use one core for ``seconds`` of this process's own CPU time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@contextmanager
def busy_process():
    """Another process that uses a core, at this one's priority."""
    process = subprocess.Popen([sys.executable, "-c", SPIN], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def test_the_two_sides_take_turns():
    order = []
    pair = Pair(ours=lambda: order.append("A"), theirs=lambda: order.append("B"), check=lambda a, b: order.append("?"))
    result = compare(row(lambda: pair, repeats=3), quiet=always)
    assert "".join(order[:12]) == "AB?" * 4, "a couple to warm up, then three"
    assert len(result.ours) == len(result.theirs) == 3 and result.rejected == 0 and result.complete


@pytest.mark.parametrize("work", [time.sleep, spin])
def test_twice_the_work_is_a_ratio_of_two(work):
    """In wall time, or in CPU time with the samples that others disturbed left out where the machine allows it."""
    pair = Pair(ours=lambda: work(0.05), theirs=lambda: work(0.1))
    result = compare(row(lambda: pair), quiet=always)
    for _ in range(5):  # a busy machine stretches a loop
        if abs(result.ratio - 2) < 0.2:
            break
        result = compare(row(lambda: pair), quiet=always)
    assert result.ratio == pytest.approx(2, abs=0.2)
    least, greatest = result.spread
    assert least <= result.ratio <= greatest and result.met and result.profile is None


def test_the_ratio_is_that_of_the_medians():
    result = Result(row=row(repeats=3), ours=[1.0, 2.0, 4.0], theirs=[6.0, 5.0, 30.0])
    assert result.ratio == 3 and result.spread == (2.5, 7.5) and result.met
    assert not replace(result, row=row(repeats=4)).met, "a clean couple is missing"
    assert not replace(result, row=row(repeats=3, required=3.1)).met


@pytest.mark.parametrize(
    ("seconds", "foreign", "expected"),
    [
        (0.5, 0.0, True),
        (0.5, 0.07, True),
        (0.5, 0.09, False),
        (3.0, 0.32, True),
        (3.0, 0.34, False),
        (0.3, -0.02, True),
    ],
)
def test_a_tenth_of_a_core_is_allowed(seconds, foreign, expected):
    assert clock.quiet(Sample(seconds, foreign)) is expected


@pytest.mark.parametrize(("own", "foreign"), [(0.0, 2.0), (1.4, 0.6), (2.0, 0.0)])
@pytest.mark.parametrize("kind", ["user", "nice", "system", "irq", "softirq", "steal"])
def test_what_this_process_used_is_not_foreign(monkeypatch, kind, own, foreign):
    """The machine spends two seconds in one of its ways; what it is idle or waits for a disk does not count."""
    names = ("user", "nice", "system", "irq", "softirq", "steal", "idle", "iowait")
    readings = [dict.fromkeys(names, 7.0), dict.fromkeys(names, 7.0) | {kind: 9.0, "idle": 90.0, "iowait": 80.0}]
    monkeypatch.setattr(clock.psutil, "cpu_times", lambda: SimpleNamespace(**readings.pop(0)))
    passed = iter([3.0, 3.0 + own])
    monkeypatch.setattr(clock.time, "process_time", lambda: next(passed))
    with clock.short_collections():
        assert clock.sample(int)[0].foreign == pytest.approx(foreign)


def test_a_disturbed_couple_is_rejected_and_counted():
    """A real process uses a core during the second couple's first half, and that couple is not among the results."""
    starts, seen = [], []

    def ours():
        starts.append(time.perf_counter())
        if len(starts) == 3:  # the first was the warm-up
            with busy_process():
                time.sleep(0.5)
        else:
            time.sleep(0.05)

    def judged(sample):
        seen.append(sample)
        return clock.quiet(sample)

    result = compare(row(lambda: Pair(ours=ours, theirs=int), repeats=2, required=0.0), quiet=judged)
    disturbed = [sample for sample in seen if sample.seconds > 0.4]
    assert len(disturbed) == 1 and disturbed[0].foreign > 0.3
    assert result.rejected >= 1 and max(result.ours, default=0) < 0.4
    assert len(starts) == 1 + len(result.ours) + result.rejected


def test_our_own_threads_are_no_disturbance():
    """Two threads of matrix products use both cores, and the sample is quiet, as samples of sleep around it are."""
    a = torch.randn(512, 512)
    before, judged = torch.get_num_threads(), []

    def work():
        end = time.perf_counter() + 0.4
        while time.perf_counter() < end:
            a @ a

    def asleep() -> bool:
        return clock.quiet(clock.sample(lambda: time.sleep(0.2))[0])

    try:
        torch.set_num_threads(2)
        with clock.short_collections():
            for _ in range(8):
                idle, start = asleep(), time.process_time()
                busy, _ = clock.sample(work)
                if idle and time.process_time() - start > 0.3 and asleep():
                    judged.append(clock.quiet(busy))
                if any(judged):
                    break
    finally:
        torch.set_num_threads(before)
    if len(judged) < 3 and not any(judged):
        pytest.skip("other processes use this machine all the time")
    assert any(judged), "whenever we worked, and only then, others were said to"


def test_a_row_gives_up_when_no_couple_is_clean():
    calls = []
    pair = Pair(ours=lambda: calls.append(1), theirs=int)
    result = compare(row(lambda: pair, repeats=2), quiet=lambda sample: False)
    assert len(calls) == 1 + 3 * 2 and result.rejected == 6
    assert "each of 6 couples" in result.error and result.ratio is None and not result.met

    answers = iter([True] * 4 + [False] * 100)
    result = compare(row(lambda: pair, repeats=4, required=0.0), quiet=lambda sample: next(answers))
    assert len(result.ours) == 2 and not result.complete and not result.met and result.error is None
    assert report.verdict(result) == "no: 2 of 4 couples were clean"


def fails(*_):
    raise AssertionError("token 7 differs\nand more")


@pytest.mark.parametrize(
    "pair",
    [fails, lambda: Pair(ours=int, theirs=int, check=fails), lambda: Pair(ours=fails, theirs=int)],
    ids=["set-up", "check", "sample"],
)
def test_what_a_pair_raises_fails_its_row(pair):
    result = compare(row(pair), quiet=always)
    assert result.error == "AssertionError: token 7 differs" and result.ratio is None and not result.met
    assert "| no: failed |" in report.results_table([result], RATES)
    assert "token 7 differs" in report.paragraph(result)


def test_no_collection_of_garbage_during_a_sample():
    import gc

    _, during = clock.sample(gc.isenabled)
    assert not during and gc.isenabled()
    compare(row(lambda: Pair(ours=fails, theirs=int)))
    assert gc.isenabled()


def missed_result() -> Result:
    a = torch.randn(64, 64)
    result = compare(row(lambda: Pair(ours=lambda: torch.linalg.inv(a @ a), theirs=int), required=5.0), quiet=always)
    assert result.ratio < 5
    return result


def test_a_missed_row_is_named_with_its_profile():
    text = report.page([missed_result()], RATES, None, FACTS)
    assert "| no |" in text and "## Where a required ratio is not met" in text
    profile = text[text.index("### A workload, beside a peer") :]
    assert "5x is required" in profile and "| aten::mm | 1 |" in profile and "outside torch's operators" in profile
    table = profile[: profile.index("\n## ")].partition("|---")[2]
    assert 2 <= table.count("\n| ") <= 9


def some_results() -> list[Result]:
    first = Result(
        row=row(written_here=True), ours=[1.0, 1.1, 1.2], theirs=[4.0, 4.1, 4.3], rejected=2, units=10, unit="step"
    )
    return [
        replace(first, row=replace(first.row, repeats=3), flops=1.1e11),
        Result(row=row(key="a|b", workload="n | m", helper=True, repeats=1), ours=[0.2], theirs=[0.32], bytes=4e9),
        replace(missed_result(), took=1.25),
        compare(row(fails, key="broken")),
    ]


def test_the_table_has_one_line_a_row():
    lines = report.results_table(some_results(), RATES).splitlines()
    assert len(lines) == 2 + 4
    columns = [line.replace(r"\|", "").count("|") for line in lines]
    assert len(set(columns)) == 1, columns
    first = "| A workload | a peer† | 110 ms / step | 410 ms / step | 3.73x (3.58–4x) | 1.5x | 3x | yes, and the aim |"
    assert lines[2].replace("x–", "–") == f"{first} 50% of fp32 | 2 |"
    assert r"| n \| m‡ | a peer |" in lines[3] and "| yes | 50% of memory |" in lines[3]


def test_the_roofline_is_the_limit_that_binds():
    result = Result(row=row(), ours=[2.0], theirs=[2.0], flops=200e9, bytes=8e9)
    assert share(result, RATES) == (pytest.approx(0.5), "fp32")
    assert share(replace(result, bytes=64e9), RATES) == (pytest.approx(0.8), "memory")
    assert share(replace(result, format="bf16", bytes=None), RATES) == (pytest.approx(1 / 6), "bf16")
    assert share(replace(result, format="int8"), RATES) == (pytest.approx(0.1), "memory")
    assert share(replace(result, flops=None, bytes=None), RATES) is None
    assert share(replace(result, error="it failed"), RATES) is None


def test_what_was_written_is_read_back(tmp_path):
    results = some_results()
    lessons = report.Lessons(seconds={"01_a": 12.5, "02_b": 95.0}, failed=[], total=120.25, foreign=0.5)
    report.write(results, RATES, lessons, FACTS, tmp_path / "first", "A table of sizes.")
    stored = json.loads((tmp_path / "first" / "results.json").read_text(encoding="utf-8"))
    assert [found["ours"] for found in stored["rows"]] == [result.ours for result in results]
    assert [found["row"]["key"] for found in stored["rows"]] == ["work", "a|b", "work", "broken"]

    *again, sizes = report.read(tmp_path / "first")
    assert again[1:] == [RATES, lessons, FACTS] and sizes == "A table of sizes."
    report.write(*again, tmp_path / "second", sizes)
    for name in ("results.json", "RESULTS.md", "ratios.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    width = int.from_bytes((tmp_path / "first" / "ratios.png").read_bytes()[16:20])
    assert width == 1000
    page = (tmp_path / "first" / "RESULTS.md").read_text(encoding="utf-8")
    assert (
        "| 02_b | 95.0 s | 90 s | 60 s | no |" in page and "| 01_a | 12.5 s | 90 s | 60 s | yes, and the aim |" in page
    )
    assert "| all, one after the other | 120.2 s | 480 s | 300 s | yes, and the aim |" in page and not lessons.met
    assert "](ratios.png)" in page and "](cost.png)" in page and "A table of sizes." in page


@pytest.mark.parametrize(("failing", "folder"), [(False, None), (True, "out")])
def test_the_command(monkeypatch, tmp_path, capsys, failing, folder):
    """Named rows are timed alone, and leave files only where they are told to; the status tells a failure."""
    pair = Pair(ours=lambda: time.sleep(0.001), theirs=lambda: time.sleep(0.01))
    found = [row(lambda: pair, key="good", repeats=1, required=0.1), row(fails, key="bad"), row(fails, key="other")]
    monkeypatch.setattr(command, "rows", lambda: found)
    monkeypatch.setattr(command, "FOLDER", tmp_path / "benchmarks")
    monkeypatch.setattr(clock, "RESOLUTION", 60)
    monkeypatch.setattr("benchmarks.roofline.rates", lambda: RATES)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KINETO_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    before = torch.get_num_threads()
    try:
        out = ["--out", str(tmp_path / folder)] if folder else []
        status = command.main(["good", *(["bad"] if failing else []), "--threads", "1", *out])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    said = capsys.readouterr().out
    assert status == failing and "good  " in said and "other" not in said
    assert ("bad   failed: AssertionError: token 7 differs" in said) == failing
    assert {path.name for path in tmp_path.iterdir()} == ({folder} if folder else set())
    assert not folder or "| threads | 1 |" in (tmp_path / folder / "RESULTS.md").read_text(encoding="utf-8")

    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(SystemExit):
        command.main(["unknown"])
    torch.set_num_threads(before)


def test_lessons_are_read_from_what_the_course_prints(capsys):
    printed = "01_a ...\n01_a: passed (12.3 s, 400 MB)\n02_b: FAILED: cell 3: it (really) broke (4.0 s, 90 MB)\n"
    asked = []

    def run(words, **options):
        asked.append((words, options["env"]))
        return SimpleNamespace(stdout=printed, stderr="", returncode=1)

    lessons = command.time_lessons(2, run)
    assert lessons.seconds == {"01_a": 12.3, "02_b": 4.0} and lessons.failed == ["02_b"] and not lessons.met
    (words, env) = asked[0]
    assert words[-5:-1] == ["course", "--profile", "quick", "--out"] and env["OMP_NUM_THREADS"] == "2"
    assert env["AIGC_RUN_DIR"].startswith(words[-1]), "else a lesson would take up an earlier run"
    assert "really" in capsys.readouterr().err

    nothing = command.time_lessons(2, lambda *_, **__: SimpleNamespace(stdout="", stderr="no", returncode=1))
    assert not nothing.met and nothing.failed
