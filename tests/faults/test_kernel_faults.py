"""Kernels that are interrupted, that die, that never answer, and that share a run folder: each is a real one."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty

import nbformat
import psutil
import pytest
import torch
from jupyter_client.manager import KernelManager
from nbformat.v4 import new_code_cell, new_notebook
from torch import nn

from aigc_course import checkpoints, cli, course
from aigc_course.gmm import GaussianMixture
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit
from faults import workers
from faults.table import FULL

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are sent")
TESTS = Path(__file__).resolve().parent.parent
SILENT = ["--log-level=CRITICAL"]  # a kernel warns of its TCP ports at every start
STEPS = 30
SIZES = {"small": (8, 7), "large": (100_000, 1)}  # units of the hidden layer, and steps between two checkpoints


# --- What the kernels and the workers run -----------------------------------------------------------------------------


def train(
    out: str, size: str = "small", pause: float = 0.0, on_log=None, dwell: int = -1, until: str | None = None
) -> str:
    """Train a network in ``out``, at least ``pause`` seconds a step; returns a checksum of all that the run ends with.

    The large one saves 8 MB after each step, the small one now and then. In the step after step ``dwell`` it says so,
    and stays a second. ``until`` names a file that it waits for before its last step, at most 100 seconds.
    """
    torch.set_num_threads(1)
    width, every = SIZES[size]
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3))
    rng = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05, generator=rng)
    state = TrainState({"model": model}, {"model": torch.optim.Adam(model.parameters(), lr=0.01)})

    def step(state, batch, rng):
        if state.step_count == dwell:
            print("in a step", flush=True)
            time.sleep(1)
        time.sleep(pause)
        if until is not None and state.step_count == STEPS - 1:
            workers.wait_until(Path(until).exists, 100)
        loss = (state.nets["model"](batch + torch.randn(batch.shape, generator=rng)) - batch).square().mean()
        state.minimize("model", loss)
        return {"loss": loss}

    data = torch.randn(100, 3, generator=torch.Generator().manual_seed(5))
    config = TrainConfig(steps=STEPS, batch_size=16, device="cpu", checkpoint_every=every, log_every=5)
    fit(step, state, data, config, out=out, on_log=on_log)
    moments = [value for values in state.optimizers["model"].state.values() for value in values.values()]
    parts = [part.detach().numpy().tobytes() for part in (*model.state_dict().values(), *moments)]
    return hashlib.sha256(b"".join(parts) + repr(state.history).encode()).hexdigest()


def evaluate(step: int, figures: dict) -> None:
    print("evaluating", flush=True)
    time.sleep(0.3)


def mix(n_components: int, max_iter: int) -> str:
    """Fit a mixture, with a word when it begins; returns a checksum of its means."""
    torch.set_num_threads(1)
    x = torch.randn(2000, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    print("fitting", flush=True)
    means = GaussianMixture(n_components, max_iter=max_iter, tol=0.0, seed=3).fit(x).means_
    return hashlib.sha256(means.numpy().tobytes()).hexdigest()


class Kernel:
    """A kernel that has loaded this module; ``send`` a cell, ``hear`` what it says, ``interrupt`` it meanwhile."""

    def __enter__(self) -> "Kernel":
        self.manager = KernelManager(kernel_name="python3")
        self.manager.start_kernel(extra_arguments=SILENT)
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        try:
            self.client.wait_for_ready(timeout=120)
            self.run("from faults.test_kernel_faults import evaluate, mix, train")
            assert not self.error, self.error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def send(self, code: str) -> None:
        self.said, self.error, self.cell = "", "", self.client.execute(code)

    def hear(self, text: str | None = None, timeout: float = 120) -> str:
        """All that the cell has said once it says ``text``, or when it has ended; ``error`` is what it raised."""
        end = time.monotonic() + timeout
        while text is None or text not in self.said:
            try:
                message = self.client.get_iopub_msg(timeout=max(0, end - time.monotonic()))
            except Empty:
                raise TimeoutError(f"the cell did not {'end' if text is None else f'say {text!r}'}") from None
            kind, content = message["msg_type"], message["content"]
            if message["parent_header"].get("msg_id") != self.cell:
                continue
            if kind == "stream":
                self.said += content["text"]
            elif kind == "execute_result":
                self.said += content["data"]["text/plain"]
            elif kind == "error":
                self.error = f"{content['ename']}: {content['evalue']}"
            elif kind == "status" and content["execution_state"] == "idle":
                assert text is None, f"the cell ended without saying {text!r}: {self.said}{self.error}"
                break
        return self.said

    def run(self, code: str) -> str:
        self.send(code)
        return self.hear()

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()


@pytest.fixture(scope="module")
def kernels() -> Iterator:
    """``kernels(0)`` and ``kernels(1)`` are kernels, each started when it is first asked for."""
    with ExitStack() as running:
        yield cache(lambda number: running.enter_context(Kernel()))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Iterator:
    """The checksum of a run of ``size`` that nothing disturbs."""
    return cache(lambda size: workers.run(train, str(tmp_path_factory.mktemp("runs") / size), size).value)


def saved_step(out: Path) -> int:
    found = checkpoints.newest_valid(out / "checkpoints")
    return found.card["step"]


def is_saving(out: Path, after: int = 3) -> bool:
    """A file is just being written, for a step past ``after``."""
    return any(int(path.parent.name[5:]) > after for path in out.glob("checkpoints/step-*/*.tmp"))


def has_saved(out: Path) -> bool:
    step = SIZES["small"][1]
    return (checkpoints.step_folder(out / "checkpoints", step) / checkpoints.MANIFEST).exists()


# --- 12: Ctrl-C in a cell ---------------------------------------------------------------------------------------------

# The cell, what is waited for before it is interrupted, and between which seconds after that.
INTERRUPTED = {
    "while it saves": ("train({out!r}, 'large', 0.02)", lambda kernel, out: is_saving(out), (0, 0.02)),
    # Ctrl-C is held from just after the first checkpoint on.
    "in the first second": (
        "train({out!r}, pause=0.05)",
        lambda kernel, out: [*out.glob("checkpoints/step-*/manifest.json")],
        (0.1, 0.3),
    ),
    "in a step": ("train({out!r}, dwell=11)", lambda kernel, out: kernel.hear("in a step"), (0, 0.2)),
    "twice in a row": ("train({out!r}, pause=0.1)", lambda kernel, out: has_saved(out), (0, 0.2)),
    "in on_log": ("train({out!r}, on_log=evaluate)", lambda kernel, out: kernel.hear("evaluating"), (0, 0.2)),
}


@pytest.mark.fault("12")
def test_a_cell_interrupted_by_ctrl_c_loses_nothing(fault, tmp_path, kernels, undisturbed):
    for name, (cell, moment, pause) in list(INTERRUPTED.items())[: fault.n]:
        with fault.case(name):
            kernel, out = kernels(0), tmp_path / name
            cell = cell.format(out=str(out))
            kernel.send(cell)
            workers.wait_until(lambda: moment(kernel, out))  # noqa: B023
            time.sleep(fault.rng.uniform(*pause))
            kernel.interrupt()
            if name == "twice in a row":
                time.sleep(0.03)
                kernel.interrupt()
            kernel.hear(timeout=30)
            assert kernel.error.startswith("KeyboardInterrupt"), f"{kernel.said}{kernel.error}"
            assert kernel.run("1 + 1") == "2"

            step = saved_step(out)
            assert step == 12 if name == "in a step" else 0 < step < STEPS, step
            said = kernel.run(cell)
            assert f"going on from step {step} of {STEPS} in {out}" in said, f"{said}{kernel.error}"
            assert undisturbed("large" if "large" in cell else "small") in said, said


def test_a_mixture_interrupted_by_ctrl_c_leaves_its_kernel_usable(kernels):
    kernel = kernels(0)
    kernel.send("mix(30, 10**6)")
    kernel.hear("fitting")
    kernel.interrupt()
    kernel.hear(timeout=30)
    assert kernel.error.startswith("KeyboardInterrupt"), f"{kernel.said}{kernel.error}"
    assert workers.run(mix, 3, 10).value in kernel.run("mix(3, 10)")


# --- 13: a kernel dies, a cell never ends -----------------------------------------------------------------------------

DEATHS = {
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "left": "import os\nos._exit(3)",
    "crashed": "import faulthandler\nfaulthandler._sigsegv()",
}
ENDLESS = {
    "spins": "while True:\n    pass",
    "waits": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
    "ignores": "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True:\n    time.sleep(9)",
}
LIMIT, SOON = (
    (10 if FULL else 5),
    15,
)  # seconds: what a cell may take, and how long after that, or after a death, the verdict may come


def write_lesson(folder: Path, name: str, *sources: str) -> Path:
    """A notebook whose last cell leaves the record of a lesson that passed."""
    record = f'{{"lesson": "{name}", "passed": true, "claims": [], "figures": []}}'
    last = "import os, pathlib\nfolder = pathlib.Path(os.environ['AIGC_RECORD_DIR'])\n"
    last += f"folder.mkdir(parents=True, exist_ok=True)\n(folder / '{name}.json').write_text('{record}')"
    notebook = new_notebook(cells=[new_code_cell(source) for source in ("1 + 1", *sources, last)])
    notebook.metadata.kernelspec = {"display_name": "any", "language": "python", "name": "python3"}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.ipynb"
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    return path


def a_course(folder: Path) -> Path:
    """A folder for `pytest` with this repository's options and what its tests/conftest.py does, and nothing else."""
    shutil.copytree(TESTS, folder / "tests", ignore=lambda at, names: [name for name in names if "test_" in name])
    shutil.copy(TESTS.parent / "pyproject.toml", folder)
    return folder


def marked(mark: str) -> list[psutil.Process]:
    """The processes that were started with ``mark`` in their environment and are still there."""

    def has_it(process):
        try:
            return process.environ().get("FAULT_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    return [process for process in psutil.process_iter() if process.pid != os.getpid() and has_it(process)]


@pytest.mark.fault("13")
def test_a_dead_kernel_and_an_endless_cell_end_their_lesson_soon(fault, tmp_path, monkeypatch, capfd):
    mark = uuid.uuid4().hex
    monkeypatch.setenv("FAULT_MARK", mark)
    home = a_course(tmp_path / "course")
    bad = dict(fault.rng.sample(list(DEATHS.items()), fault.n // 2))
    bad |= dict(fault.rng.sample(list(ENDLESS.items()), fault.n // 2))
    names = {f"{i:02}_{kind}": kind for i, kind in enumerate(bad, 1)}
    paths = [write_lesson(home / "notebooks", name, bad[kind]) for name, kind in names.items()]
    paths.append(write_lesson(home / "notebooks", "99_sound"))
    monkeypatch.setattr(course, "lessons", lambda: paths)

    command = [sys.executable, "-X", "utf8", "-m", "pytest", "-vv", "--durations=0", f"--nbval-cell-timeout={LIMIT}"]
    with ThreadPoolExecutor(1) as pool:
        tested = pool.submit(subprocess.run, command, cwd=home, capture_output=True, encoding="utf-8", timeout=300)
        status = cli.main(["course", "--out", str(home / "out"), "--cell-timeout", str(LIMIT)])
    ran, report = capfd.readouterr().out, tested.result().stdout
    orphans = marked(mark)

    for name, kind in names.items():
        with fault.case(kind):
            limit = SOON + (LIMIT if kind in ENDLESS else 0)
            said = re.search(rf"^{name}: FAILED: (cell 2 .*) \((\d+\.\d) s, \d+ MB\)$", ran, re.MULTILINE)
            assert said and float(said[2]) < limit, ran
            if kind in ENDLESS:
                assert f"did not end within {LIMIT} s" in said[1] and "--cell-timeout" in said[1], said[1]
            else:
                assert "ended its kernel" in said[1], said[1]
            assert (home / "out" / f"{name}.html").is_file(), "its page shows how far it came"

            cell = f"notebooks/{name}.ipynb::Cell 1"
            assert f"FAILED {cell}" in report, report
            spent = float(re.search(rf"([\d.]+)s call +{re.escape(cell)}", report)[1])
            assert spent < (limit if kind in ENDLESS else LIMIT), f"{cell}: {spent} s"
            message = f"Timeout of {LIMIT} seconds" if kind in ENDLESS else "this cell ended its kernel"
            assert message in report, report
            assert status == 1 and tested.result().returncode == 1
            assert "99_sound: passed" in ran and "99_sound.ipynb" not in report.split("test summary info")[1], ran
            assert re.search(r"99_sound\S+Cell 1 PASSED", report), report
            assert not orphans, orphans


# --- 17: two kernels, one run folder ----------------------------------------------------------------------------------


def refused(error: str, out: Path) -> None:
    """The one error of whoever comes second: it names the folder."""
    assert error.startswith("CourseError: ") and f"{out} is in use by another process" in error, error


AT_ONCE = """
import pathlib
go, told = pathlib.Path({go!r}), pathlib.Path({told!r})
print("ready", flush=True)
while not go.exists():
    pass
try:
    print(train({out!r}, until={told!r}))
except Exception:
    told.touch()  # whoever comes second, however late, finds the first still at it
    raise
"""


def starting_at_once(kernels, out: Path, expected: str) -> None:
    go, told, pair = out.with_name("go"), out.with_name("told"), [kernels(0), kernels(1)]
    for kernel in pair:
        kernel.send(AT_ONCE.format(go=str(go), told=str(told), out=str(out)))
    for kernel in pair:
        kernel.hear("ready")
    go.touch()
    ended = [kernel.hear() for kernel in pair]
    won = [expected in said for said in ended]
    assert sorted(won) == [False, True], [kernel.said + kernel.error for kernel in pair]
    second = pair[won.index(False)]
    refused(second.error, out)
    said = second.run(f"train({str(out)!r})")
    assert "holds this run, finished" in said and expected in said, f"{said}{second.error}"


@contextmanager
def training(*args) -> Iterator[BaseProcess]:
    """A worker that trains; it is gone at the end."""
    process = workers.start(train, *args)
    try:
        yield process
    finally:
        process.kill()
        process.join()


def while_the_first_saves(kernels, out: Path, expected: str) -> None:
    with training(str(out), "large", 0.05) as first:
        workers.wait_until(lambda: is_saving(out))
        second = workers.run(train, str(out), "large")
        refused(f"{second.error}: {second.message}", out)
        first.join(60)
        assert first.exitcode == 0 and saved_step(out) == STEPS
    assert workers.run(train, str(out), "large").value == expected


def the_first_killed(kernels, out: Path, expected: str) -> None:
    with training(str(out), "small", 0.5):
        workers.wait_until(lambda: has_saved(out))
        second = workers.run(train, str(out))
        refused(f"{second.error}: {second.message}", out)
    assert 0 < saved_step(out) < STEPS
    assert workers.run(train, str(out)).value == expected


LESSON = "00_start_here"
CELLS = {  # of a lesson that trains; its name, and with it the equations, are those of one that there is
    "begin": """
import os
from aigc_course import lessons, runtime
os.environ |= {{"AIGC_RUN_DIR": {runs!r}, "AIGC_RECORD_DIR": {records!r}}}
profile = lessons.begin({lesson!r}, "quick")
""",
    "train": "found = train(str(runtime.run_dir({run!r})), until={until!r})\nfound",
    "finish": """
for tag in lessons.lesson_tags({lesson!r}):
    lessons.verify(tag, int(found, 16), int({expected!r}, 16))
lessons.record("steps", {steps}, control=0)
lessons.finish()
""",
}


def the_same_lesson(kernels, out: Path, expected: str) -> None:
    records = out.with_name("records")
    names = {"lesson": LESSON, "run": out.name, "runs": str(out.parent), "records": str(records)}

    def cell(name: str, until: str | None = None) -> str:
        return CELLS[name].format(**names, expected=expected, steps=STEPS, until=until)

    first, second = kernels(0), kernels(1)
    for kernel in (first, second):
        kernel.run(cell("begin"))
        assert not kernel.error, kernel.error
    told = out.with_name("lesson told")
    first.send(cell("train", until=str(told)))
    workers.wait_until(lambda: has_saved(out))
    second.run(cell("train"))
    refused(second.error, out)
    told.touch()
    second.run(cell("finish"))
    assert second.error.startswith("NameError") and not records.exists(), "there is nothing to record"
    assert expected in first.hear(), f"{first.said}{first.error}"
    assert expected in second.run(cell("train")), f"{second.said}{second.error}"
    for kernel in (first, second):
        kernel.run(cell("finish"))
        assert not kernel.error, kernel.error
        record = json.loads((records / f"{LESSON}.json").read_text(encoding="utf-8"))
        assert record["passed"] and [figure["value"] for figure in record["figures"]] == [STEPS], record
        assert len(list(records.iterdir())) == 1, list(records.iterdir())


def the_first_interrupted(kernels, out: Path, expected: str) -> None:
    first, cell = kernels(0), f"train({str(out)!r}, pause=pause)"
    first.run("pause = 0.5")
    first.send(cell)
    workers.wait_until(lambda: has_saved(out))
    second = workers.run(train, str(out))
    refused(f"{second.error}: {second.message}", out)
    first.interrupt()
    first.hear()
    assert first.error.startswith("KeyboardInterrupt"), first.error
    first.run("pause = 0")
    said = first.run(cell)
    assert "going on from step" in said and expected in said, f"{said}{first.error}"


SHARED = [starting_at_once, the_same_lesson, while_the_first_saves, the_first_killed, the_first_interrupted]


@pytest.mark.fault("17")
def test_two_processes_never_train_in_one_folder(fault, tmp_path, kernels, undisturbed):
    for share in SHARED[: fault.n]:
        with fault.case(share.__name__):
            expected = undisturbed("large" if share is while_the_first_saves else "small")
            share(kernels, tmp_path / share.__name__, expected)
            assert saved_step(tmp_path / share.__name__) == STEPS
