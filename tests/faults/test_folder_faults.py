"""Folders that fill up or that may not be written: the old checkpoint loads, and the error says what mends it."""

import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aigc_course import cli, datasets, lessons, recipes
from aigc_course.checkpoints import CheckpointError, load, newest_valid, save, step_folder
from aigc_course.runtime import course_dir, rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.tokenizer import Tokenizer
from aigc_course.training import fit
from faults import workers
from faults.table import clear_error

PAGE = 4096


def content(step: int) -> dict:
    """Arguments of ``save``: about 200 kB of weights and twice that of training state."""
    rng = rng_for("full", step)
    training = {"step": step, "moments": torch.randn(100_000, generator=rng)}
    return {"weights": {"w": torch.randn(50_000, generator=rng)}, "training": training, "card": {"step": step}}


def holds(folder: Path, step: int) -> bool:
    found, expected = load(folder), content(step)
    same = torch.equal(found.training["moments"], expected["training"]["moments"])
    return same and torch.equal(found.weights["w"], expected["weights"]["w"]) and found.card == expected["card"]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def train(out: Path | None, steps: int, taken: list[int] | None = None) -> np.ndarray:
    """A training that saves 6 kB at every step; returns the weights, and adds to ``taken`` the steps that it takes."""
    net = torch.nn.Linear(20, 20)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.1, generator=rng_for("weights"))

    def step(state, batch, rng):
        if taken is not None:
            taken.append(state.step_count)
        loss = (state.nets["net"](batch) + torch.randn(1, generator=rng)).square().mean()
        state.minimize("net", loss)
        return {"loss": loss}

    state = TrainState({"net": net}, {"net": torch.optim.Adam(net.parameters())})
    config = TrainConfig(steps=steps, batch_size=4, device="cpu", checkpoint_every=1, keep=3)
    fit(step, state, torch.randn(16, 20, generator=rng_for("data")), config, out=out)
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach().numpy().copy()


# ---- 9: the disk is full ----

LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
NEW_MOUNTS, NEW_USER, REMOUNT, PRIVATE = 0x20000, 0x10000000, 32, 0x44000  # of <sched.h> and <sys/mount.h>


def called(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def small_disk(folder: Path, size: int, *, again: bool = False) -> None:
    """Mount a tmpfs of ``size`` bytes on ``folder``, for this process alone and gone with it, or change its size."""
    if not again:
        user, group = os.getuid(), os.getgid()
        if LIBC.unshare(NEW_MOUNTS):
            called(LIBC.unshare(NEW_USER | NEW_MOUNTS))
            for name, text in {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {group} 1"}.items():
                Path(f"/proc/self/{name}").write_text(text, encoding="utf-8")
        called(LIBC.mount(b"none", b"/", None, PRIVATE, None))
        folder.mkdir()
    flags, options = REMOUNT if again else 0, f"size={size}".encode()
    called(LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, options))


def missing_in(message: str) -> int:
    """The number of bytes that the message says are missing; it must follow from the two others."""
    pattern = (
        r"No space left on device: it takes ([\d,]+) bytes, ([\d,]+) are free, ([\d,]+) too few; .*free disk space"
    )
    needed, free, missing = (int(number.replace(",", "")) for number in re.search(pattern, message).groups())
    assert needed - free == missing > 0
    return missing


def fill(disk: Path, kind: str, share: float) -> str:
    """Worker: a disk that has room for ``share`` of the next checkpoint; returns the file that did not fit."""
    save(disk.with_name("measured"), **content(0))
    whole = sum(-(-len(data) // PAGE) * PAGE for data in listing(disk.with_name("measured")).values())
    before = {"second": 1, "again": 1, "third": 2}[kind]
    small_disk(disk, size := before * whole + int(share * whole) // PAGE * PAGE)
    folders = [disk / "run" if kind == "again" else step_folder(disk / "run", step) for step in range(1, before + 2)]
    for step in range(1, before + 1):
        save(folders[step - 1], **content(step))
    old = listing(disk)
    message = clear_error(lambda: save(folders[before], **content(before + 1)), kind=CheckpointError)
    missing = missing_in(message)
    assert listing(disk) == old and not list(disk.rglob("*.tmp"))
    assert holds(folders[before - 1], before), "the old checkpoint no longer loads"
    small_disk(disk, size + missing + 3 * PAGE, again=True)  # three files: a page is not shared
    save(folders[before], **content(before + 1))
    assert holds(folders[before], before + 1), "as many bytes as were said to be missing do not do"
    return Path(message.split(": expected")[0]).name.split("-")[0]


def fill_while_training(disk: Path, size: int) -> str:
    """Worker: ``fit`` on a small disk, then on a larger one; it goes on, and ends as if it had never been full."""
    small_disk(disk, size)
    message = clear_error(lambda: train(disk / "run", 12), kind=CheckpointError)
    missing_in(message)
    assert not list(disk.rglob("*.tmp")), "a temporary file is left"
    kept = newest_valid(disk / "run" / "checkpoints")
    saved, taken = kept.card["step"] if kept is not None else 0, []
    small_disk(disk, 10**7, again=True)
    assert np.array_equal(train(disk / "run", 12, taken), train(None, 12))
    assert taken == [*range(saved, 12)], "what was saved is not gone on from"
    return "fit" if saved else "fit from the start"


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.fault("9")
def test_the_disk_fills_up(fault, tmp_path):
    """A real disk in memory, too small by a little or by much; every fourth time ``fit`` meets it."""
    probe = workers.run(small_disk, tmp_path / "probe", 10**6)
    if probe.error:
        fault.skip(f"this system lets nobody but root mount a tmpfs, not even in a namespace: {probe.message}")
    cases = []
    for i in range(fault.n):
        (tmp_path / str(i)).mkdir()
        share = (i + fault.rng.random()) / fault.n if i + 1 < fault.n else 1 - 1e-9  # the last: one page too few
        kind = ("second", "fit", "again", "third")[i % 4]
        size = 10 * PAGE + int(share * 6 * PAGE)
        cases.append((fill_while_training, tmp_path / str(i) / "disk", size) if kind == "fit" else
                     (fill, tmp_path / str(i) / "disk", kind, share))  # fmt: skip
    stopped = []
    for case in cases:
        with fault.case(case[1:]):
            outcome = workers.run(*case)
            assert not outcome.error, f"{outcome.error}: {outcome.message}"
            stopped.append(outcome.value)
    print("the disk was full at:", ", ".join(stopped))
    assert {"weights", "fit"} <= set(stopped)
    assert fault.n < 20 or {"training", "manifest.json"} <= set(stopped)


# ---- 10: read-only folders ----


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that any user can reach, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


def read_only(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def become_nobody() -> None:
    """Only root is above permissions; what is imported late is imported before, as the user may not see it."""
    import PIL.PngImagePlugin  # noqa: F401

    import aigc_course.plots  # noqa: F401

    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    (course_dir() / "aigc_course" / "cli.py").read_bytes()


def nothing_written(folder: Path, call) -> None:
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    call()
    assert before == {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def read_data(folder: Path) -> None:
    os.environ["AIGC_DATA_DIR"] = str(folder)
    assert len(datasets.load_mnist(train=False)) == 10_000
    assert len(datasets.load_poems("tang300")) > 300 and len(datasets.load_shakespeare("all")) == 42
    assert Tokenizer.gpt2().encode("to be") and all(row.ok for row in datasets.check_data())


def read_models(folder: Path) -> None:
    for name in ("vae", "classifier", "gpt2-tang"):
        recipes.build(name.removeprefix("gpt2-"), "full", device="cpu").restore(folder / name)
    assert recipes.sample_texts(recipes.load_pretrained("tang", device="cpu"), 1, rng_for(0), max_new_tokens=2)


def read_run(folder: Path) -> None:
    assert np.array_equal(train(folder, 3), train(None, 3))


def reads(what: str, folder: Path) -> None:
    """Worker: what is read from a read-only folder is left as it was."""
    become_nobody()
    nothing_written(folder, lambda: {"data": read_data, "models": read_models, "run": read_run}[what](folder))


def shell(*argv: object) -> None:
    """``aigc …`` as its error in one line."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([*map(str, argv)])
    assert status == 2, f"status {status}"
    raise CheckpointError(errors.getvalue().rstrip("\n"))


def finish(folder: Path) -> None:
    os.environ["AIGC_RECORD_DIR"] = str(folder / "records")
    lessons._ledger.lesson, lessons._ledger.profile = "00_welcome", "quick"
    lessons._write_record([], passed=True)


def writes(what: str, folder: Path) -> str:
    """Worker: the message of the one error where nothing may be written."""
    become_nobody()
    os.environ["AIGC_RUN_DIR"] = str(folder)
    calls = {
        "fit": lambda: train(folder / "run", 3),
        "an unfinished run": lambda: train(folder, 5),
        "save": lambda: save(folder, **content(1)),
        "aigc train": lambda: shell("train", "vae", "--device", "cpu"),
        "aigc course": lambda: shell("course", "0", "--out", folder / "pages"),
        "aigc sample": lambda: shell("sample", "vae", "--n", "1", "--out", folder / "samples.png"),
        "a lesson's record": lambda: finish(folder),
    }
    message = clear_error(calls[what], str(folder))
    assert "Permission denied" in message or "Read-only" in message, message
    assert not list(folder.rglob("*.tmp"))
    return message


# What is done, and what the message must name.
READ_ONLY = {
    "reads data": (),
    "writes fit": ("AIGC_RUN_DIR", "--out"),
    "writes aigc sample": ("--out",),
    "reads models": (),
    "reads run": (),
    "writes an unfinished run": ("AIGC_RUN_DIR", "--out"),
    "writes save": ("AIGC_RUN_DIR", "--out"),
    "writes aigc train": ("AIGC_RUN_DIR", "--out"),
    "writes aigc course": ("--out",),
    "writes a lesson's record": ("AIGC_RECORD_DIR",),
}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
@pytest.mark.fault("10")
def test_folders_are_read_only(fault, public):
    """As a user who is not root: what is there can be used, and what cannot be written names the setting that helps."""
    probe = workers.run(become_nobody)
    if probe.error:
        fault.skip(f"another user cannot read the course's own folder: {probe.message}")
    for i, (case, named) in list(enumerate(READ_ONLY.items()))[: fault.n]:
        how, what = case.split(" ", 1)
        folder = public / str(i)
        if what == "data":
            shutil.copytree(course_dir() / "data", folder, ignore=shutil.ignore_patterns("checkpoints", "histories"))
        elif what == "models":
            shutil.copytree(course_dir() / "data" / "checkpoints", folder)
        elif "run" in what:
            assert workers.run(train, folder, 3).code == 0
        with fault.case(case):
            outcome = workers.run({"reads": reads, "writes": writes}[how], what, read_only(folder))
            assert not outcome.error, f"{outcome.error}: {outcome.message}"
            assert all(word in outcome.value for word in named), outcome.value
