"""Pictures of your own: a folder of files as labelled images in memory, through torchvision."""

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .files import DataError
from .mnist import Images

# What the contents of a file may be, whatever its name ends in. Pillow would also hand an EPS file to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
JUNK = {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx"}
MAX_BYTES = 4 * 10**9


def image_folder(path: str | Path, *, size: int = 64, channels: int = 3, on_error: str = "refuse") -> Images:
    """The pictures in a folder as float32 in [-1, 1], of shape (n, channels, size, size), with a class for each.

    Each sub-folder of ``path`` is a class, with the pictures at any depth inside it, and the label is its position in
    the sorted names of the sub-folders. A folder without sub-folders is one class, 0. The pictures are in the order of
    their paths.

    Of each picture the largest square in the middle is resized, with antialiasing: what resizing the shorter side and
    cropping the centre comes to. It is turned upright by its EXIF orientation, laid on white where it is transparent,
    and made grey (``channels=1``) or RGB (3). In 16-bit grey, 65535 is white. Of an animation or a file of several
    pages the first picture is taken. Colour profiles are ignored.

    Files are chosen by their ending: torchvision's ``IMG_EXTENSIONS``, which are .jpg, .jpeg, .png, .ppm, .bmp, .pgm,
    .tif, .tiff and .webp. One printed line says how many others were ignored; hidden files and those that systems leave
    behind (Thumbs.db) do not count. A file that is damaged, breaks off, or is larger than Pillow's limit against
    decompression bombs is an error; with ``on_error="skip"`` such files are left out, and one printed line says how
    many and names the first three. Damage inside a JPEG may go unnoticed: the format has no check sum.

    Raises ``DataError`` for an argument outside its range, a folder that is missing or holds no picture, a sub-folder
    without one, pictures beside the sub-folders, images of more than 4 GB in all, and a file that cannot be read.
    """
    if not isinstance(size, int) or size < 8:
        raise DataError(f"size: expected a whole number of pixels, 8 or more, found {size!r}")
    if channels not in (1, 3):
        raise DataError(f"channels: expected 1 (grey) or 3 (RGB), found {channels!r}")
    if on_error not in ("refuse", "skip"):
        raise DataError(f"on_error: expected 'refuse' or 'skip' (leave damaged pictures out), found {on_error!r}")
    root = Path(path).expanduser()
    names, samples, ignored = _find(root)
    if (n_bytes := 4 * len(samples) * channels * size**2) > MAX_BYTES:
        found = f"{len(samples)} of size {size}, {n_bytes / 1e9:.1f} GB: pass a smaller size, or fewer pictures"
        raise DataError(f"{root}: expected images that take at most {MAX_BYTES / 1e9:g} GB, found {found}")

    images = torch.empty(len(samples), channels, size, size)
    labels, broken = [], []
    for file, label in samples:
        try:
            picture = _read(file, "L" if channels == 1 else "RGB")
        except Exception as error:  # what a damaged file may raise, Pillow does not say
            broken.append((file, _reason(error)))
            continue
        # The scaling of load_mnist: black is exactly -1, white exactly 1.
        images[len(labels)] = _square(picture, size) / 127.5 - 1
        labels.append(label)

    if broken and on_error == "refuse":
        file, reason = broken[0]
        total = f"{len(broken)} of {len(samples)} pictures in {root} cannot be read"
        remedy = 'replace or remove them, or leave them out with on_error="skip"'
        raise DataError(f"{file}: expected a picture that can be read, found {reason}; {total}: {remedy}")
    _check_classes(root, names, labels, "picture that can be read")
    if broken:
        first = ", ".join(str(file.relative_to(root)) for file, _ in broken[:3]) + ", ..." * (len(broken) > 3)
        print(f"{root.name}: left out {len(broken)} of {len(samples)} pictures, which cannot be read: {first}")
    if ignored:
        print(f"{root.name}: ignored {_others(ignored)}")
    return Images(images[: len(labels)], torch.tensor(labels))


def _find(root: Path) -> tuple[list[str], list[tuple[Path, int]], Counter[str]]:
    """The names of the sub-folders, the pictures with their labels, and how many other files have which ending."""
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import IMG_EXTENSIONS

    ignored = Counter()

    def is_picture(name: str) -> bool:
        file = Path(name)
        if _is_junk(file.relative_to(root)):
            return False
        if file.suffix.lower() in IMG_EXTENSIONS:
            return True
        ignored[file.suffix.lower() or "without an ending"] += 1
        return False

    try:
        entries = [entry for entry in root.iterdir() if not _is_junk(Path(entry.name))]
    except OSError as error:
        found = "a file" if root.is_file() else f"none ({error.strerror})"
        raise DataError(f"{root}: expected a folder of pictures, found {found}: pass the path of one") from error
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if names and (beside := [entry for entry in entries if not entry.is_dir() and is_picture(str(entry))]):
        found = f"{len(beside)} beside the sub-folder {names[0]!r}, such as {min(beside).name!r}"
        remedy = "move them into a sub-folder of their own, or the sub-folders elsewhere"
        raise DataError(f"{root}: expected pictures in its sub-folders alone, found {found}: {remedy}")
    # ImageFolder's own search for classes would count hidden folders, and refuse a folder without any.
    classes = {name: label for label, name in enumerate(names or [""])}
    found = ImageFolder.make_dataset(root, classes, is_valid_file=is_picture, allow_empty=True)
    # By parts, as on Windows paths compare without regard to case.
    samples = sorted(((Path(name), label) for name, label in found), key=lambda sample: sample[0].parts)
    if not samples:
        found = f"none, and {_others(ignored)}" if ignored else "none"
        remedy = f"put files there that end in {', '.join(IMG_EXTENSIONS)}"
        raise DataError(f"{root}: expected at least one picture, found {found}: {remedy}")
    _check_classes(root, names, (label for _, label in samples), "picture")
    return names, samples, ignored


def _is_junk(path: Path) -> bool:
    """Hidden files and folders, and what systems leave behind in folders of pictures."""
    return any(part.startswith(".") or part.lower() in JUNK for part in path.parts)


def _others(ignored: Counter[str]) -> str:
    n = ignored.total()
    return f"{n} other file{'s' * (n > 1)} ({', '.join(sorted(ignored))})"


def _check_classes(root: Path, names: list[str], labels: Iterable[int], what: str) -> None:
    present = set(labels)
    for label, name in enumerate(names or [""]):
        if label not in present:
            remedy = "put one there" + (", or remove the folder" if names else "")
            raise DataError(f"{root / name}: expected at least one {what}, found none: {remedy}")


def _read(file: Path, mode: str) -> Image.Image:
    """The picture in ``file``: decoded to the end, upright, opaque, in ``mode`` ("L" or "RGB")."""
    if file.stat().st_size == 0:
        raise ValueError("an empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Handed over open: from a path Pillow maps some TIFF files into memory and then turns them wrongly.
        with file.open("rb") as stream, Image.open(stream, formats=FORMATS) as source:
            picture = ImageOps.exif_transpose(source)
            if source.mode.startswith(("I", "F")):
                picture = _grey_of_16_bits(picture, source)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert(mode)


def _grey_of_16_bits(picture: Image.Image, source: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit: ``convert`` would clip it, and leave all but the darkest 256th part white."""
    bits, photometric = 258, 262  # tags of TIFF, the one format that also holds other depths, and white as 0
    if source.format == "TIFF":
        known = source.mode.startswith("I;16") and source.tag_v2[bits] == (16,) and source.tag_v2[photometric] == 1
    else:
        known = source.mode != "F"
    if not known:
        raise ValueError("grey of a depth whose white is not known (save it as an 8-bit PNG)")
    values = np.asarray(picture)
    values = np.where(values == source.info.get("transparency"), 65535, values)
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _square(picture: Image.Image, size: int) -> UInt8[Tensor, "c size size"]:
    """The largest square in the middle, resized. Cut first, as a long thin strip would grow to a size without bound."""
    from torchvision.transforms.v2 import functional

    side = min(picture.size)
    square = functional.center_crop(picture, [side, side])
    return functional.pil_to_tensor(functional.resize(square, [size, size], antialias=True))


def _reason(error: Exception) -> str:
    """Why a picture cannot be read, in a few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"a damaged header or none of {', '.join(FORMATS)}"
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error) or type(error).__name__).split())[:120].rstrip(".")
