"""Before any test: shapes are checked at run time, kernels start without a network, and lessons leave their records."""

import os
import runpy
import shutil
from pathlib import Path

import jaxtyping
import pytest

jaxtyping.install_import_hook("aigc_course", "beartype.beartype")

COURSE = Path(__file__).resolve().parent.parent
OFFLINE = Path(__file__).resolve().parent / "offline"
RECORDS = COURSE / "build" / "records"
RUNS = COURSE / "build" / "test-runs"


def pytest_configure(config):
    """Kernels and other subprocesses inherit this environment."""
    for name in ("AIGC_PROFILE", "AIGC_DATA_DIR", "AIGC_BANDS"):
        os.environ.pop(name, None)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), *filter(None, [os.environ.get("PYTHONPATH")])])
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
