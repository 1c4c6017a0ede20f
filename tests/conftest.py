"""Before any test: shapes are checked at run time, kernels start without a network, and lessons leave their records."""

import os
import shutil
import sys
from pathlib import Path

import jaxtyping
import pytest

jaxtyping.install_import_hook("aigc_course", "beartype.beartype")

COURSE = Path(__file__).resolve().parent.parent
OFFLINE = Path(__file__).resolve().parent / "offline"
RECORDS = COURSE / "build" / "records"


def pytest_configure(config):
    """Kernels and other subprocesses inherit this environment."""
    for name in ("AIGC_PROFILE", "AIGC_DATA_DIR", "AIGC_RUN_DIR"):
        os.environ.pop(name, None)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(OFFLINE), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["AIGC_RECORD_DIR"] = str(RECORDS)
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    if sys.platform == "win32":
        os.environ["PYTHONUTF8"] = "1"
    shutil.rmtree(RECORDS, ignore_errors=True)


@pytest.fixture(scope="session")
def executed_lessons(request) -> set[str]:
    """The lessons that nbval executed in this session, by file name without the ending."""
    return {Path(item.fspath).stem for item in request.session.items if str(item.fspath).endswith(".ipynb")}
