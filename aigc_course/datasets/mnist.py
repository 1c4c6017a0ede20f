"""MNIST as labelled images in memory, and images turned into pixels that are 0 or 1."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from torch import Tensor

from .. import runtime
from .files import DataError, damage, data_root, verified_bytes

MNIST_FILES = {
    True: ("mnist/train-images-idx3-ubyte.gz", "mnist/train-labels-idx1-ubyte.gz"),
    False: ("mnist/t10k-images-idx3-ubyte.gz", "mnist/t10k-labels-idx1-ubyte.gz"),
}


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, held in memory: ``images`` in [-1, 1] (-1 is black), and one class per image in ``labels``.

    All of MNIST fits in memory, so this tensor and a permutation of its indices replace a ``DataLoader``:
    ``data[order[:64]]`` is a batch, without worker processes, copies between them, or a collate function.
    """

    images: Float32[Tensor, "n c size size"]
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


def read_idx(content: bytes, name: str, item: tuple[int, ...], root: str | Path | None = None) -> np.ndarray:
    """Read an IDX file of uint8 strictly: an array of shape (n, *item), read-only, that shares ``content``'s memory.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a big-endian 32-bit
    integer, the values (LeCun, Cortes & Burges, "The MNIST database of handwritten digits"). ``name`` and ``root`` are
    for the message. Raises ``DataError`` if the magic number, a dimension or the length is not what it should be.
    """
    root = data_root(root)
    n_dims = 1 + len(item)
    header = 4 + 4 * n_dims
    if len(content) < header:
        raise damage(root, name, f"an IDX header of {header} bytes", f"{len(content)} bytes")
    magic = 0x0800 + n_dims
    if (found := int.from_bytes(content[:4], "big")) != magic:
        raise damage(root, name, f"the IDX magic number {magic:#010x}", f"{found:#010x}")
    n, *found_item = np.frombuffer(content, ">u4", count=n_dims, offset=4).tolist()
    if tuple(found_item) != item:
        raise damage(root, name, f"items of shape {item}", f"{tuple(found_item)}")
    if n == 0:
        raise damage(root, name, "at least one item", "none")
    if len(content) != (size := header + n * math.prod(item)):
        kind = "truncated" if len(content) < size else "with trailing bytes"
        raise damage(root, name, f"{size} bytes of IDX for {n} items", f"{len(content)} bytes ({kind})")
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
    root = data_root(root)
    images_name, labels_name = MNIST_FILES[train]
    labels = read_idx(verified_bytes(labels_name, root), labels_name, (), root)
    if labels.max() > 9:
        raise damage(root, labels_name, "labels from 0 to 9", f"the label {labels.max()}")
    pixels = read_idx(verified_bytes(images_name, root), images_name, (28, 28), root)
    if len(pixels) != len(labels):
        raise damage(root, labels_name, f"{len(pixels)} labels, one for each image", f"{len(labels)}")
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
