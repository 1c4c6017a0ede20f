"""Before any test: shapes are checked at run time, kernels start without a network, and lessons leave their records."""

import os
import runpy
import shutil
import time
from pathlib import Path
from queue import Empty

import jaxtyping
import pytest
from nbval.kernel import RunningKernel

jaxtyping.install_import_hook("aigc_course", "beartype.beartype")

from faults.table import fault, pytest_sessionfinish, pytest_terminal_summary  # noqa: E402, F401

COURSE = Path(__file__).resolve().parent.parent
OFFLINE = Path(__file__).resolve().parent / "offline"
RECORDS = COURSE / "build" / "records"
RUNS = COURSE / "build" / "test-runs"


def get_message(self, stream, timeout, get=RunningKernel.get_message):
    """What nbval waits for, or an error within a second once the kernel is dead: nbval would wait for its timeout."""
    end = time.monotonic() + timeout
    while True:
        try:
            return get(self, stream, timeout=min(1, timeout))
        except Empty:
            if not self.is_alive():
                raise RuntimeError("this cell ended its kernel: it crashed, or memory ran out") from None
            if time.monotonic() > end:
                raise


RunningKernel.get_message = get_message


def pytest_configure(config):
    """Kernels and other subprocesses inherit this environment."""
    config.addinivalue_line("markers", "fault(row): injects the faults of a row of tests/faults/table.py")
    for name in ("AIGC_PROFILE", "AIGC_DATA_DIR", "AIGC_BANDS"):
        os.environ.pop(name, None)
    paths = [str(OFFLINE), str(COURSE / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ["AIGC_LINEAR"] = "onednn"  # where it is right; a clock must not decide between two runs' bits
    runpy.run_path(str(OFFLINE / "sitecustomize.py"))  # this process too
    for name, folder in {"AIGC_RECORD_DIR": RECORDS, "AIGC_RUN_DIR": RUNS}.items():
        os.environ[name] = str(folder)
        shutil.rmtree(folder, ignore_errors=True)
        assert not folder.exists(), f"{folder} holds results of an earlier run and cannot be removed"


@pytest.fixture(scope="session")
def executed_lessons(request) -> set[str]:
    """The lessons that nbval executed in this session, by file name without the ending."""
    return {Path(item.fspath).stem for item in request.session.items if str(item.fspath).endswith(".ipynb")}


@pytest.fixture(scope="module")
def one_thread():
    """For tests of small tensors: a second thread would only wait for the first."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def message_of(call) -> str:
    """The message of the one DataError that ``call`` raises; it is one line."""
    from aigc_course.datasets import DataError

    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message
