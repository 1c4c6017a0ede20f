"""This machine: where files live, which device and precision to use, and where randomness comes from."""

import contextlib
import ctypes
import errno
import hashlib
import operator
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch

PROFILES = ("quick", "full")


class CourseError(Exception):
    """A mistake that its user can mend: the shell prints the message alone, without a traceback."""


def course_dir() -> Path:
    """The folder of the course: the one that holds ``notebooks/`` and ``aigc_course/``."""
    return Path(__file__).resolve().parent.parent


def data_dir() -> Path:
    """Where the data sets lie: ``AIGC_DATA_DIR``, or ``data/`` in the course's folder."""
    return Path(os.environ.get("AIGC_DATA_DIR") or course_dir() / "data").expanduser().absolute()


def run_dir(name: str) -> Path:
    """Where the run called ``name`` keeps its files: ``AIGC_RUN_DIR/name``, or ``runs/name`` in the course's folder."""
    return Path(os.environ.get("AIGC_RUN_DIR") or course_dir() / "runs").expanduser().absolute() / name


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process: no other one that asks gets it meanwhile, and a killed one lets go of it.

    Raises ``CourseError`` if another holds it. Where nothing can be written there is nothing to hold; a disk that
    knows no locks is warned of.
    """
    path, told = folder / ".lock", folder / ".lock.pid"
    lock = filelock.FileLock(path, is_singleton=True)  # a process that holds it may ask again
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except filelock.Timeout:
        holder = ""
        with contextlib.suppress(OSError, ValueError):
            holder = f" (process {int(told.read_text(encoding='utf-8'))})"
        raise CourseError(
            f"{folder} is in use by another process{holder}, a second kernel with this lesson perhaps: wait until it "
            "ends or stop it, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        # what cannot be written to is told when something is written; the rest are disks without locks
        silent = (errno.EACCES, errno.EROFS, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.ENOSPC)
        if getattr(error, "errno", None) not in silent:
            warnings.warn(f"{folder} cannot be locked ({error}): see that no second process uses it", stacklevel=3)
    else:
        with contextlib.suppress(OSError):  # for the message above
            told.write_text(str(os.getpid()), encoding="utf-8")
    try:
        yield
    finally:
        lock.release()


def pick_profile(profile: str | None = None) -> str:
    """``"quick"`` or ``"full"``: what is asked for, else the environment variable ``AIGC_PROFILE``, else quick."""
    chosen = profile or os.environ.get("AIGC_PROFILE") or "quick"
    if chosen not in PROFILES:
        raise CourseError(f"there is no profile {chosen!r}: set PROFILE (or AIGC_PROFILE) to 'quick' or 'full'")
    return chosen


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device to compute on: ``"auto"`` takes CUDA, else Apple's MPS, else the CPU.

    Of several processes that torchrun started on this machine, each takes the GPU of its ``LOCAL_RANK``.
    Raises ``CourseError`` if a device is named that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if str(name) == "cuda" and os.environ.get("LOCAL_RANK", "").isdecimal():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CourseError(f"there is no device {name!r}: set DEVICE to 'auto', 'cpu', 'cuda' or 'mps'") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if device.type == "cuda" and torch.cuda.is_available() and "LOCAL_RANK" in os.environ and not available["cuda"]:
        n = torch.cuda.device_count()
        raise CourseError(f"this machine has {n} GPUs and more ranks: start {n} with --nproc_per_node, or use the CPU")
    if not available.get(device.type, False):
        raise CourseError(f"this machine has no device {str(device)!r}: set DEVICE to 'auto' or 'cpu'")
    return device


def pick_precision(device: torch.device, name: str = "auto") -> torch.dtype:
    """The type that matrix products are computed in: ``"auto"`` takes bfloat16 on a GPU that has it, else float32.

    ``"fp32"`` and ``"bf16"`` are taken at their word. Weights and optimizer state stay in float32 whatever this says.
    """
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if bf16 else "fp32"
    if name not in ("fp32", "bf16"):
        raise CourseError(f"there is no precision {name!r}: choose 'auto', 'fp32' or 'bf16'")
    return torch.bfloat16 if name == "bf16" else torch.float32


def seed_for(*key: int | str) -> int:
    """A 63-bit seed that is a pure function of ``key``, such as ``(seed, "step", 17)``; unlike keys, unlike seeds."""
    try:
        plain = tuple(part if isinstance(part, str) else int(operator.index(part)) for part in key)
    except TypeError as error:
        raise CourseError(f"a seed is made of whole numbers and strings, not of {key}") from error
    digest = hashlib.sha256(repr(plain).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def rng_for(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream is a pure function of ``key``; the global generators are left alone."""
    return torch.Generator(device=device).manual_seed(seed_for(*key))


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def keep_freed_memory() -> None:
    """Have Linux's glibc keep up to 256 MB of freed memory for what comes next; other systems do as they always do.

    Otherwise it goes back to the system after each step of training, to be fetched anew, page by page, in the next one.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (another library may give these numbers another meaning)
        library.mallopt(-1, 256 * 2**20)  # M_TRIM_THRESHOLD
        library.mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: at most what glibc itself would arrive at
