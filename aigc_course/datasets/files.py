"""Data files: find them, hold them to the manifest, unpack them."""

import hashlib
import json
import os
import zlib
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from .. import runtime
from ..runtime import CourseError

START = 1024  # bytes at the start of a file in which an HTML page gives itself away
MAX_BYTES = 2**40  # no size beyond a terabyte is believed


class DataError(CourseError):
    """Data that are missing, damaged or outside their range; the message says what mends it."""


class FileCheck(NamedTuple):
    """One row of ``check_data``: the file's path in the data folder, the bytes it should have, and what was found."""

    path: str
    bytes: int
    ok: bool
    message: str


def data_root(root: str | Path | None) -> Path:
    """The data folder that ``root`` names; ``None`` is ``runtime.data_dir()``."""
    return runtime.data_dir() if root is None else Path(root).expanduser()


def damage(root: Path, name: str, expected: str, found: str) -> DataError:
    """The one message for every fault of a data file: which file, what is wrong with it, and how to restore it."""
    course = runtime.course_dir() / "data"
    if root.resolve() == course.resolve():
        mend = f"in the course's folder, run: git checkout -- data/{name}"
    else:
        mend = f"copy {course / name} there, or, for data of your own, describe them in {root / 'manifest.json'}"
    return DataError(f"{root / name}: expected {expected}, found {found}; {mend}")


def _manifest(root: Path) -> dict[str, dict]:
    """The table of files that ``root`` is held to: its own ``manifest.json``, or else the course's."""
    home = root if os.path.exists(root / "manifest.json") else runtime.course_dir() / "data"
    try:
        content = (home / "manifest.json").read_bytes()
        _refuse_page(home, "manifest.json", "the table of data files in JSON", content, len(content))
        table = json.loads(content)
    except FileNotFoundError as error:
        raise damage(home, "manifest.json", "the table of data files", "no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damage(home, "manifest.json", "the table of data files in JSON", f"{error}") from error
    if not isinstance(table, dict):
        raise damage(home, "manifest.json", "an object with an entry for each file", f"a {type(table).__name__}")
    for name, entry in table.items():
        path = PureWindowsPath(name)  # the stricter of the two kinds: a drive, / and \ in front are all seen
        if path.anchor or ".." in path.parts or not name.isprintable():
            raise damage(home, "manifest.json", "names of files within its folder", f"{name!r:.100}")
        sizes, sums = ["bytes"], ["sha256"]
        if name.endswith(".gz"):
            sizes, sums = ["bytes", "content_bytes"], ["sha256", "content_sha256"]
        if not (
            isinstance(entry, dict)
            and all(type(entry.get(key)) is int and 0 <= entry[key] < MAX_BYTES for key in sizes)
            and all(isinstance(entry.get(key), str) for key in sums)
        ):
            raise damage(home, "manifest.json", f"{', '.join(sizes + sums)} for {name}", f"{entry!r:.100}")
    return table


def _stored(root: Path, name: str, entry: dict) -> bytes:
    """The bytes of a file as they lie on the disk, once their number and their sha256 are those of the manifest."""
    size = entry["bytes"]
    try:
        with (root / name).open("rb") as file:
            n_bytes = file.seek(0, 2)
            file.seek(0)
            stored = file.read(size if n_bytes == size else START)
    except FileNotFoundError as error:
        raise damage(root, name, f"a file of {size} bytes", "no such file") from error
    except OSError as error:
        raise damage(root, name, f"a file of {size} bytes", f"{error.strerror}") from error
    _refuse_page(root, name, f"a data file of {size} bytes", stored, n_bytes)
    if n_bytes != size:
        raise damage(root, name, f"{size} bytes", f"{n_bytes} bytes")
    if (digest := hashlib.sha256(stored).hexdigest()) != entry["sha256"]:
        raise damage(root, name, f"sha256 {entry['sha256']}", digest)
    return stored


def _refuse_page(root: Path, name: str, expected: str, content: bytes, n_bytes: int) -> None:
    start = content[:START].lower()
    if b"<html" in start or b"<!doctype html" in start:
        raise damage(root, name, expected, f"an HTML page of {n_bytes} bytes, such as a network's login page")


def inflate(stored: bytes, name: str, size: int, root: str | Path | None = None) -> bytes:
    """Unpack one gzip stream that must hold exactly ``size`` bytes; at most ``size`` + 1 are ever unpacked.

    ``name`` is the file's path in the data folder ``root``, for the message. Raises ``DataError`` if the stream is no
    gzip, is damaged or breaks off, is followed by anything, or holds fewer or more bytes.
    """
    root = data_root(root)
    expected = f"{size} bytes in one gzip stream"
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        content = stream.decompress(stored, size + 1)
    except zlib.error as error:
        raise damage(root, name, expected, f"a damaged stream ({error})") from error
    if len(content) > size:
        raise damage(root, name, expected, "more bytes than that")
    if not stream.eof:
        raise damage(root, name, expected, f"a stream that breaks off after {len(content)} bytes")
    if stream.unused_data:
        raise damage(root, name, expected, f"{len(stream.unused_data)} trailing bytes after the stream")
    if len(content) < size:
        raise damage(root, name, expected, f"{len(content)} bytes")
    return content


def verified_bytes(name: str, root: str | Path | None = None) -> bytes:
    """The content of the data file ``name`` (such as ``"mnist/train-labels-idx1-ubyte.gz"``), unpacked if it is a .gz.

    The file is held to its size and sha256 in ``manifest.json``: the one in ``root`` (``None``: ``runtime.data_dir()``)
    if there is one, else the course's. Nothing is written. Raises ``DataError`` for a file or a manifest that is
    missing or damaged.
    """
    root = data_root(root)
    table = _manifest(root)
    if name not in table:
        raise damage(root, name, "an entry for it in manifest.json", "none")
    entry = table[name]
    stored = _stored(root, name, entry)
    if not name.endswith(".gz"):
        return stored
    content = inflate(stored, name, entry["content_bytes"], root)
    _refuse_page(root, name, "data in the gzip stream", content, len(content))
    return content


def check_data(root: str | Path | None = None) -> list[FileCheck]:
    """Verify every file in the manifest: one row for each, in the order of their names; damage is told, not raised.

    A .gz file is unpacked as well and its content held to ``content_sha256``. Raises ``DataError`` if the manifest
    itself is missing or damaged.
    """
    root = data_root(root)
    rows = []
    for name, entry in sorted(_manifest(root).items()):
        try:
            content = verified_bytes(name, root)
            digest, expected = hashlib.sha256(content).hexdigest(), entry.get("content_sha256", entry["sha256"])
            if digest != expected:
                raise damage(root, name, f"content with sha256 {expected}", digest)
            rows.append(FileCheck(name, entry["bytes"], True, "as in the manifest"))
        except DataError as error:
            rows.append(FileCheck(name, entry["bytes"], False, str(error)))
    return rows
