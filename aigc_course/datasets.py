"""Data sets as verified tensors: MNIST from ``data/``, and two-dimensional toy densities to sample and to measure."""

import hashlib
import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64
from torch import Tensor

from . import runtime
from .runtime import CourseError

MNIST_FILES = {
    True: ("mnist/train-images-idx3-ubyte.gz", "mnist/train-labels-idx1-ubyte.gz"),
    False: ("mnist/t10k-images-idx3-ubyte.gz", "mnist/t10k-labels-idx1-ubyte.gz"),
}
TOY_NAMES = ("mixture", "moons", "ring", "grid")
MOONS_STD = 0.1


class DataError(CourseError):
    """Data that are missing, damaged or outside their range; the message says what mends it."""


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, held in memory: ``images`` in [-1, 1] (-1 is black), and one class per image in ``labels``.

    All of MNIST fits in memory, so this tensor and a permutation of its indices replace a ``DataLoader``:
    ``data[order[:64]]`` is a batch, without worker processes, copies between them, or a collate function.
    """

    images: Float32[Tensor, "n 1 size size"]
    labels: Int64[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: int | slice | Int[Tensor, "k"] | Bool[Tensor, "n"]) -> "Images":
        """The images at a slice, at a tensor of indices, or where a mask such as ``data.labels == 3`` is true.

        A bare integer gives that one image, still with its batch axis.
        """
        if isinstance(indices, int):
            indices = torch.tensor([indices])
        return Images(self.images[indices], self.labels[indices])

    def to(self, device: str | torch.device) -> "Images":
        """The same images and labels on ``device``."""
        return Images(self.images.to(device), self.labels.to(device))


# --- files: find, verify, unpack -------------------------------------------------------------------------------------


class FileCheck(NamedTuple):
    """One row of ``check_data``: the file's path in the data folder, the bytes it should have, and what was found."""

    path: str
    bytes: int
    ok: bool
    message: str


def _root(root: str | Path | None) -> Path:
    return runtime.data_dir() if root is None else Path(root).expanduser()


def _damage(root: Path, name: str, expected: str, found: str) -> DataError:
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
        table = json.loads((home / "manifest.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _damage(home, "manifest.json", "the table of data files", "no such file") from error
    except (OSError, ValueError) as error:
        raise _damage(home, "manifest.json", "the table of data files in JSON", f"{error}") from error
    if not isinstance(table, dict):
        raise _damage(home, "manifest.json", "an object with an entry for each file", f"a {type(table).__name__}")
    for name, entry in table.items():
        sizes, sums = ["bytes"], ["sha256"]
        if name.endswith(".gz"):
            sizes, sums = ["bytes", "content_bytes"], ["sha256", "content_sha256"]
        if not (
            isinstance(entry, dict)
            and all(isinstance(entry.get(key), int) and entry[key] >= 0 for key in sizes)
            and all(isinstance(entry.get(key), str) for key in sums)
        ):
            raise _damage(home, "manifest.json", f"{', '.join(sizes + sums)} for {name}", f"{entry!r:.100}")
    return table


def _stored(root: Path, name: str, entry: dict) -> bytes:
    """The bytes of a file as they lie on the disk, once their number and their sha256 are those of the manifest."""
    size = entry["bytes"]
    try:
        with (root / name).open("rb") as file:
            stored = file.read(size + 1)
            n_bytes = file.seek(0, 2)
    except FileNotFoundError as error:
        raise _damage(root, name, f"a file of {size} bytes", "no such file") from error
    except OSError as error:
        raise _damage(root, name, f"a file of {size} bytes", f"{error.strerror}") from error
    digest = hashlib.sha256(stored).hexdigest()
    if n_bytes == size and digest == entry["sha256"]:
        return stored
    start = stored[:1024].lower()
    if b"<html" in start or b"<!doctype html" in start:
        found = f"an HTML page of {n_bytes} bytes, such as a network's login page"
        raise _damage(root, name, f"a data file of {size} bytes", found)
    if n_bytes != size:
        raise _damage(root, name, f"{size} bytes", f"{n_bytes} bytes")
    raise _damage(root, name, f"sha256 {entry['sha256']}", digest)


def inflate(stored: bytes, name: str, size: int, root: str | Path | None = None) -> bytes:
    """Unpack one gzip stream that must hold exactly ``size`` bytes; at most ``size`` + 1 are ever unpacked.

    ``name`` is the file's path in the data folder ``root``, for the message. Raises ``DataError`` if the stream is no
    gzip, is damaged or breaks off, is followed by anything, or holds fewer or more bytes.
    """
    root = _root(root)
    expected = f"{size} bytes in one gzip stream"
    stream = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        content = stream.decompress(stored, size + 1)
    except zlib.error as error:
        raise _damage(root, name, expected, f"a damaged stream ({error})") from error
    if len(content) > size:
        raise _damage(root, name, expected, "more bytes than that")
    if not stream.eof:
        raise _damage(root, name, expected, f"a stream that breaks off after {len(content)} bytes")
    if stream.unused_data:
        raise _damage(root, name, expected, f"{len(stream.unused_data)} trailing bytes after the stream")
    if len(content) < size:
        raise _damage(root, name, expected, f"{len(content)} bytes")
    return content


def verified_bytes(name: str, root: str | Path | None = None) -> bytes:
    """The content of the data file ``name`` (such as ``"mnist/train-labels-idx1-ubyte.gz"``), unpacked if it is a .gz.

    The file is held to its size and sha256 in ``manifest.json``: the one in ``root`` (``None``: ``runtime.data_dir()``)
    if there is one, else the course's. Nothing is written. Raises ``DataError`` for a file or a manifest that is
    missing or damaged.
    """
    root = _root(root)
    table = _manifest(root)
    if name not in table:
        raise _damage(root, name, "an entry for it in manifest.json", "none")
    entry = table[name]
    stored = _stored(root, name, entry)
    return inflate(stored, name, entry["content_bytes"], root) if name.endswith(".gz") else stored


def check_data(root: str | Path | None = None) -> list[FileCheck]:
    """Verify every file in the manifest: one row for each, in the order of their names; damage is told, not raised.

    A .gz file is unpacked as well and its content held to ``content_sha256``. Raises ``DataError`` if the manifest
    itself is missing or damaged.
    """
    root = _root(root)
    rows = []
    for name, entry in sorted(_manifest(root).items()):
        try:
            content = verified_bytes(name, root)
            digest, expected = hashlib.sha256(content).hexdigest(), entry.get("content_sha256", entry["sha256"])
            if digest != expected:
                raise _damage(root, name, f"content with sha256 {expected}", digest)
            rows.append(FileCheck(name, entry["bytes"], True, "as in the manifest"))
        except DataError as error:
            rows.append(FileCheck(name, entry["bytes"], False, str(error)))
    return rows


# --- MNIST -----------------------------------------------------------------------------------------------------------


def read_idx(content: bytes, name: str, item: tuple[int, ...], root: str | Path | None = None) -> np.ndarray:
    """Read an IDX file of uint8 strictly: an array of shape (n, *item), read-only, that shares ``content``'s memory.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a big-endian 32-bit
    integer, the values (LeCun, Cortes & Burges, "The MNIST database of handwritten digits"). ``name`` and ``root`` are
    for the message. Raises ``DataError`` if the magic number, a dimension or the length is not what it should be.
    """
    root = _root(root)
    n_dims = 1 + len(item)
    header = 4 + 4 * n_dims
    if len(content) < header:
        raise _damage(root, name, f"an IDX header of {header} bytes", f"{len(content)} bytes")
    magic = 0x0800 + n_dims
    if (found := int.from_bytes(content[:4], "big")) != magic:
        raise _damage(root, name, f"the IDX magic number {magic:#010x}", f"{found:#010x}")
    n, *found_item = np.frombuffer(content, ">u4", count=n_dims, offset=4).tolist()
    if tuple(found_item) != item:
        raise _damage(root, name, f"items of shape {item}", f"{tuple(found_item)}")
    if n == 0:
        raise _damage(root, name, "at least one item", "none")
    if len(content) != (size := header + n * math.prod(item)):
        kind = "truncated" if len(content) < size else "with trailing bytes"
        raise _damage(root, name, f"{size} bytes of IDX for {n} items", f"{len(content)} bytes ({kind})")
    return np.frombuffer(content, np.uint8, offset=header).reshape(n, *item)


def load_mnist(
    root: str | Path | None = None, *, train: bool = True, size: int = 28, device: str | torch.device = "cpu"
) -> Images:
    """MNIST's 60,000 training images, or with ``train=False`` its 10,000 test images, as float32 in [-1, 1].

    ``size`` is 28, or 32 for networks that halve their images several times: two black pixels are added on each side,
    and nothing is stretched. ``root`` is a data folder with ``mnist/*.gz`` in it (``None``: ``runtime.data_dir()``);
    nothing is written to it. Every file is verified against the manifest once, then read strictly. Raises ``DataError``
    for a file that is missing or damaged, for any other size, and for a root whose images and labels do not fit.
    """
    if size not in (28, 32):
        raise DataError(f"expected size 28, or 32 (padded with black), found {size!r}")
    device = runtime.pick_device(device)
    root = _root(root)
    images_name, labels_name = MNIST_FILES[train]
    labels = read_idx(verified_bytes(labels_name, root), labels_name, (), root)
    if labels.max() > 9:
        raise _damage(root, labels_name, "labels from 0 to 9", f"the label {labels.max()}")
    pixels = read_idx(verified_bytes(images_name, root), images_name, (28, 28), root)
    if len(pixels) != len(labels):
        raise _damage(root, labels_name, f"{len(pixels)} labels, one for each image", f"{len(labels)}")
    pad = (size - 28) // 2
    images = torch.full((len(pixels), 1, size, size), -1.0)
    # Written in place: new memory costs more here than the arithmetic.
    inner = images.numpy()[:, 0, pad : size - pad, pad : size - pad]
    np.divide(pixels, np.float32(127.5), out=inner)
    inner -= 1
    return Images(images, torch.from_numpy(labels.astype(np.int64))).to(device)


def binarize(images: Float[Tensor, "*shape"], rng: torch.Generator | None = None) -> Float32[Tensor, "*shape"]:
    """Images in [-1, 1] turned into pixels that are 0 or 1, in float32: always the caller's explicit choice.

    With ``rng`` (a generator on the images' device) a pixel x is 1 with probability (x + 1) / 2, drawn afresh on every
    call (Salakhutdinov & Murray 2008; Burda et al. 2016, arXiv 1509.00519, section 5); without, it is 1 where x > 0.
    The two are different data sets: a likelihood on one may not be compared with a likelihood on the other. Raises
    ``DataError`` for a value outside [-1, 1], and for NaN.
    """
    if rng is not None and rng.device.type != images.device.type:
        raise DataError(f"expected a generator on the images' device {images.device.type!r}, found {rng.device.type!r}")
    if not ((images >= -1) & (images <= 1)).all():
        found = f"values from {images.min().item():g} to {images.max().item():g}"
        raise DataError(f"images: expected values in [-1, 1], found {found}: scale 8-bit pixels by x / 127.5 - 1")
    if rng is None:
        return (images > 0).float()
    return torch.bernoulli((images.float() + 1) / 2, generator=rng)


# --- toy densities in the plane --------------------------------------------------------------------------------------


def toy_mixture(name: str) -> tuple[Float64[Tensor, "k"], Float64[Tensor, "k 2"], Float64[Tensor, "k 2 2"]]:
    """Weights, means and covariances of a toy density that is a mixture of Gaussians.

    ``"mixture"``: three slanted Gaussians of unequal weight. ``"ring"``: eight on a circle of radius 2, standard
    deviation 0.02 (Metz et al. 2017, arXiv 1611.02163; Gulrajani et al. 2017, arXiv 1704.00028). ``"grid"``: 25 at the
    integer points from (-2, -2) to (2, 2), standard deviation 0.05 (as Gulrajani et al., whose centres lie 2 apart).
    Raises ``DataError`` for ``"moons"``, which is no such mixture, and for an unknown name.
    """
    if name not in TOY_NAMES:
        raise DataError(f"there is no toy density {name!r}: choose one of {', '.join(map(repr, TOY_NAMES))}")
    if name == "moons":
        raise DataError(
            "'moons' has no density in closed form: choose 'mixture', 'ring' or 'grid', or sample with toy_2d"
        )
    if name == "mixture":
        means = [[-2.0, 0.0], [2.0, 1.0], [0.5, -2.0]]
        covs = [[[0.6, 0.5], [0.5, 0.7]], [[0.3, -0.2], [-0.2, 0.5]], [[1.0, 0.1], [0.1, 0.1]]]
        return (
            torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
            torch.tensor(means, dtype=torch.float64),
            torch.tensor(covs, dtype=torch.float64),
        )
    if name == "ring":
        angles = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
        means, std = 2 * torch.stack([angles.cos(), angles.sin()], dim=1), 0.02
    else:
        ticks = torch.arange(-2, 3, dtype=torch.float64)
        means, std = torch.cartesian_prod(ticks, ticks), 0.05
    k = len(means)
    covs = (std**2 * torch.eye(2, dtype=torch.float64)).repeat(k, 1, 1)
    return torch.full((k,), 1 / k, dtype=torch.float64), means, covs


def toy_2d(name: str, n: int, rng: torch.Generator, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n 2"]:
    """``n`` independent points from a toy density, on the generator's device.

    ``"mixture"``, ``"ring"`` and ``"grid"`` are the mixtures of ``toy_mixture``. ``"moons"`` is two half circles of
    radius 1, the upper around (0, 0) and the lower around (1, 0.5) as in scikit-learn's ``make_moons``: the moon and
    the angle are drawn uniformly, and Gaussian noise of standard deviation 0.1 is added. Raises ``DataError`` for any
    other name.
    """
    if n < 1:
        raise DataError(f"n: expected at least one point, found {n}")
    noise = torch.randn(n, 2, generator=rng, device=rng.device, dtype=dtype)
    if name == "moons":
        angle = math.pi * torch.rand(n, generator=rng, device=rng.device, dtype=dtype)
        lower = torch.rand(n, generator=rng, device=rng.device) < 0.5
        upper_moon = torch.stack([angle.cos(), angle.sin()], dim=1)
        lower_moon = upper_moon.new_tensor([1.0, 0.5]) - upper_moon
        return torch.where(lower[:, None], lower_moon, upper_moon) + MOONS_STD * noise
    weights, means, covs = toy_mixture(name)
    component = torch.multinomial(weights.float().to(rng.device), n, replacement=True, generator=rng)
    factors = torch.linalg.cholesky(covs).to(dtype).to(rng.device)
    return means.to(dtype).to(rng.device)[component] + (factors[component] * noise[:, None]).sum(dim=2)


def toy_log_density(name: str, x: Float[Tensor, "n 2"]) -> Float[Tensor, "n"]:
    """The exact log-density, in nats, of a mixture of ``toy_mixture`` at each of ``n`` points.

    log p(x) = logsumexp_k [log w_k - log(2 pi) - log|L_k| - |L_k^-1 (x - m_k)|^2 / 2], where L_k is the Cholesky factor
    of the covariance. Raises ``DataError`` for ``"moons"``, which has none in closed form, and for an unknown name.
    """
    weights, means, covs = toy_mixture(name)
    factors = torch.linalg.cholesky(covs)
    log_scale = weights.log() - math.log(2 * math.pi) - factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    # The cast comes before the move: Apple's MPS has no float64.
    means, factors, log_scale = (t.to(x.dtype).to(x.device) for t in (means, factors, log_scale))
    centred = x - means[:, None]
    white = torch.linalg.solve_triangular(factors, centred.mT, upper=False)
    return torch.logsumexp(log_scale[:, None] - white.square().sum(dim=1) / 2, dim=0)
