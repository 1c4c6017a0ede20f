"""The table itself: every row has its test, and a count that is not met is a failure."""

import os
import subprocess
import sys

import pytest

from faults.table import ROWS, whole

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

SKIPPED = """
import pytest

@pytest.mark.fault("8")
def test_all_hold(fault):
    for i in range(fault.n):
        with fault.case(i):
            pass

@pytest.mark.fault("9")
def test_cannot_be_injected_here(fault):
    fault.skip("not on this system")
"""
CONFTEST = """
from pathlib import Path
from faults import table
from faults.table import fault, pytest_sessionfinish, pytest_terminal_summary

if {alone}:  # these rows are the whole table
    table.FOLDER = Path(__file__).parent
    table.ROWS = {{"8": table.ROWS["8"], "9": table.ROWS["9"]}}
"""


def session(folder, tests, *, faults="draw", alone=False):
    """A session of pytest that runs the source ``tests`` with this table."""
    (folder / "conftest.py").write_text(CONFTEST.format(alone=alone), encoding="utf-8")
    (folder / "test_rows.py").write_text(tests, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:nbval", "--rootdir", folder]
    environment = {**os.environ, "AIGC_FAULTS": faults}
    return subprocess.run(
        [*command, folder], env=environment, cwd=folder, capture_output=True, text=True, encoding="utf-8"
    )


def test_every_row_has_one_test(request):
    if not whole(request.session):
        pytest.skip("not all of tests/faults was collected")
    keys = [mark.args[0] for item in request.session.items for mark in item.iter_markers("fault")]
    assert sorted(keys) == sorted(ROWS)


def test_a_case_that_breaks_and_a_count_that_is_short_are_failures(tmp_path):
    result = session(tmp_path, BROKEN)
    assert result.returncode == 1
    assert "1: AssertionError: the second one" in result.stdout and "2 cases were injected, not 3" in result.stdout
    lines = {line.split()[0]: line.split()[-5:] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert lines["8"] == ["2", "1", "2", "0", "<--"] and lines["9"] == ["2", "2", "3", "0", "<--"]
    assert lines["10"][-4:] == ["3", "3", "3", "0"]


@pytest.mark.parametrize(("faults", "status"), [("draw", 0), ("full", 1)])
def test_a_row_that_is_skipped_fails_where_every_row_is_asked_for(tmp_path, faults, status):
    result = session(tmp_path, SKIPPED, faults=faults, alone=True)
    assert result.returncode == status, result.stdout
    assert "1 passed, 1 skipped" in result.stdout and "error" not in result.stdout.lower()
