"""The table itself: every row has its test, and a count that is not met is a failure."""

import os
import subprocess
import sys

import pytest

from faults.table import ROWS

BROKEN = """
import pytest

@pytest.mark.fault("8")
def test_one_breaks(fault):
    for i in range(fault.n):
        with fault.case(i):
            assert i != 1, "the second one"

@pytest.mark.fault("9")
def test_one_too_few(fault):
    for i in range(fault.n - 1):
        with fault.case(i):
            pass

@pytest.mark.fault("10")
def test_all_hold(fault):
    for i in range(fault.n):
        with fault.case(i):
            pass
"""


def test_every_row_has_one_test(request):
    keys = [mark.args[0] for item in request.session.items for mark in item.iter_markers("fault")]
    if len(keys) < len(ROWS):
        pytest.skip("not all of tests/faults was collected")
    assert sorted(keys) == sorted(ROWS)


def test_a_case_that_breaks_and_a_count_that_is_short_are_failures(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "from faults.table import fault, pytest_sessionfinish, pytest_terminal_summary", encoding="utf-8"
    )
    (tmp_path / "test_broken.py").write_text(BROKEN, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:nbval", "--rootdir", tmp_path]
    result = subprocess.run(
        [*command, tmp_path],
        env={**os.environ, "AIGC_FAULTS": "draw"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert result.returncode == 1
    assert "1: AssertionError: the second one" in result.stdout and "2 cases were injected, not 3" in result.stdout
    lines = {line.split()[0]: line.split()[-5:] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert lines["8"] == ["2", "1", "2", "0", "<--"] and lines["9"] == ["2", "2", "3", "0", "<--"]
    assert lines["10"][-4:] == ["3", "3", "3", "0"]
