"""Files written whole or not at all, and the errors that say why one could not be."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..runtime import CourseError

FolderLike = str | os.PathLike
MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class CheckpointError(CourseError):
    """A checkpoint that cannot be written, or one that is damaged, unfinished or unsafe to read."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint of another model: names, shapes or dtypes are not the expected ones."""


def write_atomically(path: Path, data: bytes, *, then: int = 0) -> None:
    """Put ``data`` into the file ``path``, whose name stands for its old content or for all of the new at any moment.

    The folder is made if need be. Raises ``CheckpointError``; no temporary file is left then. It says how many bytes
    are missing on a full disk, ``then`` more included that are to be written after these.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync(path.parent.parent)
        temporary.unlink(missing_ok=True)  # a killed process may have left one
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise _unwritten(path, error, len(data) + then) from error


def writable(folder: FolderLike, setting: str) -> Path:
    """``folder``, made if need be, once a file has been written there; ``setting`` says what chooses another.

    Ask before the work, not after it. Raises ``CheckpointError``.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise fault(folder, "a folder to write to", error.strerror, f"choose another by {setting}") from error
    return folder


@contextlib.contextmanager
def replaced(folder: FolderLike) -> Iterator[Path]:
    """Yields an empty folder, to be filled and sealed, which then takes the place of ``folder``, whole or not at all.

    A process that is killed meanwhile leaves the old folder or the new one, once ``recover`` has been called.
    """
    folder = Path(folder)
    recover(folder)
    new, old = _beside(folder)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def copy_files(folder: FolderLike, new: FolderLike) -> None:
    """Copy the files of a sealed folder into ``new``, all but the manifest, which ``seal`` writes last."""
    for path in sorted(Path(folder).iterdir()):
        if path.is_file() and path.name != MANIFEST and path.suffix != ".tmp":
            write_atomically(Path(new) / path.name, path.read_bytes())


def recover(folder: FolderLike) -> None:
    """End what a killed process began with ``replaced``; call it only while no other process writes there."""
    folder = Path(folder)
    for spare in _beside(folder):
        if (spare / MANIFEST).exists() and not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(spare, folder)
        shutil.rmtree(spare, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")


def fault(path: Path, expected: str, found: object, remedy: str, kind: type = CheckpointError) -> CheckpointError:
    found = (str(found).splitlines() or ["nothing"])[0]
    return kind(f"{path}: expected {expected}, found {found}; {remedy}")


def _unwritten(path: Path, error: OSError, size: int) -> CheckpointError:
    """Why ``path`` was not written and what mends it; on a full disk, how many of ``size`` bytes are missing."""
    found, remedy = str(error.strerror or error), "free disk space or mend the permissions, then save again"
    if error.errno in FULL:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(next(parent for parent in path.parents if parent.exists())).free
            found += f": it takes {size:,} bytes, {free:,} are free" + f", {size - free:,} too few" * (size > free)
        remedy = "free disk space, then save again, or move runs elsewhere by AIGC_RUN_DIR or --out"
    elif error.errno in DENIED:
        remedy = (
            "choose a folder of your own (by AIGC_RUN_DIR or --out for runs, --out for pages and pictures, "
            "AIGC_RECORD_DIR for records), or mend the permissions"
        )
    return fault(path, "to write it", found, f"what was saved before is still whole: {remedy}")


def sync(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the system can: Windows and some network file systems cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
