"""Is this machine ready for the course, and what will be slow on it?"""

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from . import datasets
from .runtime import CourseError, course_dir, data_dir, pick_device, pick_precision, rng_for, run_dir

PARITY = 1e-3  # a device's float32 may differ from the CPU's by this share of the largest output


class Row(NamedTuple):
    """One finding: what was looked at, what was found, and whether it is fine, slow, or an error to be mended."""

    topic: str
    value: str
    level: Literal["ok", "slow", "error"] = "ok"


def report() -> list[Row]:
    """Look at this machine, the installed packages, the devices, the folders and the data; the last rows are advice."""
    cores, memory = _cores(), _memory()
    return [
        Row("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Row("processor", f"{_cpu_name()}, {cores} cores"),
        Row("memory", f"{memory / 2**30:.1f} GiB"),
        Row("Python", f"{platform.python_version()} in {_short(Path(sys.prefix))}"),
        *(package_rows() + device_rows() + folder_rows() + data_rows()),
        Row("network", "not needed: no lesson opens a connection to another machine"),
        *speed_rows(pick_device().type, cores, memory),
    ]


def package_rows() -> list[Row]:
    """The version of each package that the course requires, held to the bounds that it was installed with."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("aigc-course") or []
    except metadata.PackageNotFoundError:
        return [Row("aigc-course", "not installed: run make test, or pip install -e .", "error")]
    rows = []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = next((found.version for found in metadata.distributions(name=requirement.name)), "missing")
        fits = version != "missing" and requirement.specifier.contains(version, prereleases=True)
        value = version if fits else f"{version}; {requirement.specifier} is needed"
        rows.append(Row(requirement.name, value, "ok" if fits else "error"))
    return rows


def device_rows() -> list[Row]:
    """The devices that torch can compute on, what "auto" takes, and whether an accelerator agrees with the CPU."""
    rows = [Row("CPU", f"{torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        rows.append(Row(f"cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"))
    if torch.backends.mps.is_available():
        rows.append(Row("mps", "Apple's GPU, which shares the machine's memory"))
    device = pick_device()
    rows.append(Row("device", f"{device.type}, computing in {str(pick_precision(device)).removeprefix('torch.')}"))
    if device.type != "cpu":
        difference = parity(device)
        fits = difference < PARITY
        value = f"differs from the CPU by {difference:.1e} of the largest output, allowed {PARITY:.0e}"
        rows.append(Row("parity", value if fits else f"{value}: set DEVICE to 'cpu'", "ok" if fits else "error"))
    return rows


def parity(device: str | torch.device) -> float:
    """Largest difference between ``device`` and the CPU in float32, over the CPU's largest output.

    Both run one small network, convolution and linear, with the same weights on the same input.
    """
    rng = rng_for("doctor", "parity")
    tensors = [torch.randn(shape, generator=rng) for shape in ((8, 3, 16, 16), (16, 3, 3, 3), (784, 10))]
    outputs = []
    for place in ("cpu", device):
        image, kernel, weights = (tensor.to(place) for tensor in tensors)
        with torch.backends.cudnn.flags(allow_tf32=False):  # TF32 keeps 10 bits: it is no float32
            outputs.append((F.gelu(F.conv2d(image, kernel, stride=2)).flatten(1) @ weights).cpu())
    return float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())


def folder_rows() -> list[Row]:
    """Room and permission where runs and data lie."""
    rows = []
    for topic, folder in (("runs folder", run_dir("doctor").parent), ("data folder", data_dir())):
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        value, level = f"{_short(folder)}, {shutil.disk_usage(nearest).free / 2**30:.0f} GiB free", "ok"
        if topic == "runs folder" and not os.access(nearest, os.W_OK):
            value, level = f"{_short(nearest)} is not writable: set AIGC_RUN_DIR to a folder that is", "error"
        rows.append(Row(topic, value, level))
    return rows


def data_rows() -> list[Row]:
    """One row for each damaged data file, or one that says that all are well."""
    try:
        files = datasets.check_data()
    except CourseError as error:
        return [Row("data", str(error), "error")]
    damaged = [Row("data", file.message, "error") for file in files if not file.ok]
    size = sum(file.bytes for file in files) / 1e6
    return damaged or [Row("data", f"{len(files)} files as they should be, {size:.1f} MB")]


def speed_rows(device: str, cores: int, memory: int) -> list[Row]:
    """What will be slow here: ``device`` is its type, ``memory`` is in bytes."""
    rows = []
    if device == "cpu":
        rows.append(Row("no GPU", "the quick profile takes minutes; the full profile can take hours", "slow"))
    if memory < 8 * 2**30:
        rows.append(Row("memory", f"{memory / 2**30:.1f} GiB, under 8: keep one notebook open at a time", "slow"))
    if cores < 4:
        rows.append(Row("cores", f"{cores}, under 4: do not run two lessons at once", "slow"))
    return rows or [Row("slow here", "nothing")]


def _short(path: Path) -> str:
    """``path`` as seen from the course's folder or from home, so that a stored report names neither."""
    for top, name in ((course_dir(), ""), (Path.home(), "~/")):
        if path.absolute().is_relative_to(top):
            return f"{name}{path.absolute().relative_to(top).as_posix()}"
    return str(path)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int:
    """Bytes that this process may use: the machine's, or its container's limit."""
    import psutil

    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="utf-8").strip() if limit.is_file() else "max"
    return min(psutil.virtual_memory().total, int(text) if text.isdigit() else 2**63)


def _cpu_name() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10).stdout.strip()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
