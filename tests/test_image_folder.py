"""Pictures of one's own: every kind of file comes out with the right values, and every fault is named."""

import inspect
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aigc_course.datasets import DataError, Images, folders, image_folder
from conftest import message_of

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
ROTATED = 0x0112  # the EXIF tag of the orientation


def draw(path: Path, colour=WHITE, size: tuple[int, int] = (20, 20), mode: str = "RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def stripes(*colours: tuple[int, int, int], width: int = 16, height: int = 16) -> Image.Image:
    """Vertical stripes, ``width`` pixels each."""
    row = np.repeat(np.array(colours, np.uint8), width, axis=0)
    return Image.fromarray(np.broadcast_to(row, (height, *row.shape)).copy())


def only(root: Path, **options) -> torch.Tensor:
    """The one picture in a folder, of shape (channels, size, size)."""
    (image,) = image_folder(root, **{"size": 8} | options).images
    return image


def colour_of(values: torch.Tensor) -> list[float]:
    """The one colour of an area of shape (channels, ...)."""
    flat = values.flatten(1)
    assert (flat == flat[:, :1]).all(), "not all of one colour"
    return flat[:, 0].tolist()


# --- classes, order, shape ---


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path):
    draw(tmp_path / "dog" / "1.png", BLUE)
    draw(tmp_path / "cat" / "2.PNG", GREEN)
    draw(tmp_path / "cat" / "1.jpeg", RED, format="PNG")  # what counts is what is in it
    draw(tmp_path / "ape" / "deep" / "9.bmp", BLACK)
    draw(tmp_path / "ape" / "z.ppm", WHITE)
    data = image_folder(str(tmp_path), size=8)
    assert isinstance(data, Images) and data.images.shape == (5, 3, 8, 8)
    assert (data.images.dtype, data.labels.dtype) == (torch.float32, torch.int64)
    assert data.labels.tolist() == [0, 0, 1, 1, 2]
    assert [colour_of(image) for image in data.images] == [[-1] * 3, [1] * 3, [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_without_sub_folders_is_one_class(tmp_path, monkeypatch, channels):
    for name, grey in {"b.png": 255, "a.png": 0, "c.png": 51}.items():
        draw(tmp_path / name, grey, mode="L")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, ".", f"../{tmp_path.name}"):
        data = image_folder(path, channels=channels)
        assert data.images.shape == (3, channels, 64, 64) and data.labels.tolist() == [0, 0, 0]
        assert data.images[:, 0, 0, 0].tolist() == pytest.approx([-1, 1, 51 / 127.5 - 1])


def test_order_is_that_of_the_paths_on_every_call(tmp_path):
    """A folder's name is compared as a whole: "x" comes before "x-1", although "-" comes before "/"."""
    names = ["a/9.png", "a-1/3.png", "b/10.png", "b/2.png", "b/x/1.png", "b/x-1/0.png", "b/z.png"]
    for name in reversed(names):
        draw(tmp_path / name, 10 * names.index(name), mode="L")
    data = image_folder(tmp_path, size=8, channels=1)
    assert (data.images[:, 0, 0, 0] + 1).mul(12.75).round().tolist() == list(range(7))
    assert data.labels.tolist() == [0, 1, 2, 2, 2, 2, 2]
    again = image_folder(tmp_path, size=8, channels=1)
    assert torch.equal(again.images, data.images) and torch.equal(again.labels, data.labels)


# --- pixels ---


def test_values_are_x_over_127_5_minus_1(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    expected = torch.tensor(grey / 127.5 - 1, dtype=torch.float32)
    for channels in (1, 3):
        image = only(tmp_path, size=16, channels=channels)
        assert image.shape == (channels, 16, 16) and (image - expected).abs().max() < 1e-6
        assert image[0, 0, 0] == -1 and image[0, -1, -1] == 1


def test_grey_of_colours_is_their_luma(tmp_path):
    """ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B."""
    for name, colour in zip("abc", (RED, GREEN, BLUE), strict=True):
        draw(tmp_path / f"{name}.png", colour)
    grey = (image_folder(tmp_path, size=8, channels=1).images[:, 0, 0, 0] + 1) / 2
    assert grey.tolist() == pytest.approx([0.299, 0.587, 0.114], abs=0.5 / 255)


@pytest.mark.parametrize("upright", [False, True])
def test_the_middle_square_is_taken(tmp_path, upright):
    """Five stripes of 16 pixels: the crop is the third alone, in a wide picture and in a tall one."""
    picture = stripes(RED, BLUE, GREEN, WHITE, BLACK)
    (picture.transpose(Image.Transpose.ROTATE_90) if upright else picture).save(tmp_path / "a.png")
    assert colour_of(only(tmp_path)) == [-1, 1, -1]


def test_nothing_is_stretched_or_cropped_too_much(tmp_path):
    """Of red 16, white 32, blue 16 pixels, 32 high, all the white is left and nothing else; 2 higher, also an edge."""
    parts = [RED, WHITE, WHITE, BLUE]
    stripes(*parts, height=32).save(tmp_path / "a.png")
    assert colour_of(only(tmp_path, size=16)) == [1, 1, 1]
    stripes(*parts, height=34).save(tmp_path / "a.png")
    image = only(tmp_path, size=34)
    assert colour_of(image[:, :, :1]) == [1, -1, -1] and colour_of(image[:, :, -1:]) == [-1, -1, 1]
    assert colour_of(image[:, :, 1:-1]) == [1, 1, 1]


def test_making_smaller_is_antialiased(tmp_path):
    """A fine chessboard becomes even grey; taking every eighth pixel would leave it black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert only(tmp_path, channels=1)[:, 2:-2, 2:-2].abs().max() < 0.02


def test_small_pictures_and_long_strips(tmp_path):
    """A strip of one pixel's height is cut before it is resized: no memory for a row of a hundred million pixels."""
    draw(tmp_path / "a.png", 255, (1, 1), "L")
    draw(tmp_path / "b.png", 255, (2_000_000, 1), "L")
    draw(tmp_path / "c.png", 255, (1, 5000), "L")
    assert (image_folder(tmp_path, channels=1).images == 1).all()


def test_the_resized_square_against_the_usual_order(tmp_path):
    """Resizing the shorter side and cropping the centre gives the same, but for where the filter meets the border."""
    from torchvision.transforms import v2

    rows, columns = np.indices((96, 160)) / 10
    smooth = (127 * (1 + np.sin(rows) * np.cos(columns))).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.png")
    usual = v2.Compose([v2.Resize(24, antialias=True), v2.CenterCrop(24), v2.PILToTensor()])
    expected = usual(Image.fromarray(smooth)) / 127.5 - 1
    difference = (only(tmp_path, size=24, channels=1) - expected).abs()
    assert difference[:, 1:-1, 1:-1].max() < 1.5 / 127.5 and difference.max() < 0.3


# --- kinds of files ---

UPRIGHT = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
           7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "RGB"), ("a.png", "RGB"), ("a.png", "I;16"), ("a.tif", "L"), ("a.tif", "I;16")]
)
def test_exif_orientation_is_honoured(tmp_path, orientation, name, mode):
    """What is stored is the upright picture turned as the tag says: 6 means that it lies on its left side."""
    grey = np.zeros((16, 16), np.uint8)
    grey[:8, :8], grey[:8, 8:], grey[8:, :8] = 255, 170, 85
    stored = Image.fromarray(grey)
    if UPRIGHT[orientation]:
        stored = stored.transpose(Image.Transpose[UPRIGHT[orientation]])
    stored = Image.fromarray(np.asarray(stored).astype(np.uint16) * 257) if mode == "I;16" else stored.convert(mode)
    exif = Image.Exif()
    exif[ROTATED] = orientation
    stored.save(tmp_path / name, exif=exif, **({"quality": 100} if name == "a.jpg" else {}))
    image = only(tmp_path, channels=1)[0]
    found = [image[1, 1], image[1, -2], image[-2, 1], image[-2, -2]]
    assert found == pytest.approx([1, 1 / 3, -1 / 3, -1], abs=0.03)


def test_exif_orientation_of_a_picture_that_is_not_square(tmp_path):
    """The middle of a wide picture is white on the left and black on the right; upright, it is white above."""
    stored = np.full((16, 80), 128, np.uint8)
    stored[:, 32:40], stored[:, 40:48] = 255, 0
    exif = Image.Exif()
    exif[ROTATED] = 6
    for name in ("a.jpg", "b.tif", "c.png"):
        Image.fromarray(stored).save(tmp_path / name, exif=exif)
    for image in image_folder(tmp_path, size=16, channels=1).images[:, 0]:
        assert (image[:8] > 0.9).all() and (image[8:] < -0.9).all()


ALPHA = {
    "RGBA, opaque": ("RGBA", (*RED, 255), {}, [1, -1, -1]),
    "RGBA, clear": ("RGBA", (*BLUE, 0), {}, [1, 1, 1]),
    "RGBA, half": ("RGBA", (*BLACK, 51), {}, [0.6, 0.6, 0.6]),
    "LA, clear": ("LA", (0, 0), {}, [1, 1, 1]),
    "LA, opaque": ("LA", (0, 255), {}, [-1, -1, -1]),
    "RGB, one clear colour": ("RGB", RED, {"transparency": RED}, [1, 1, 1]),
    "RGB, another clear colour": ("RGB", RED, {"transparency": BLUE}, [1, -1, -1]),
    "L, one clear grey": ("L", 0, {"transparency": 0}, [1, 1, 1]),
    "1, black clear": ("1", 0, {"transparency": 0}, [1, 1, 1]),
    "1, black": ("1", 0, {}, [-1, -1, -1]),
}


@pytest.mark.parametrize("case", ALPHA)
def test_transparent_pictures_lie_on_white(tmp_path, case):
    mode, colour, options, expected = ALPHA[case]
    draw(tmp_path / "a.png", colour, mode=mode, **options)
    assert colour_of(only(tmp_path)) == pytest.approx(expected)
    luma = sum(weight * value for weight, value in zip((0.299, 0.587, 0.114), expected, strict=True))
    assert colour_of(only(tmp_path, channels=1)) == pytest.approx([luma], abs=1 / 127.5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, [1, -1, -1]), ({"transparency": 1}, [1, 1, 1]), ({"transparency": b"\xff\x00\xff"}, [1, 1, 1])],
)
def test_palettes_give_their_colours(tmp_path, options, expected):
    picture = Image.new("P", (9, 9), 1)
    picture.putpalette([*BLUE, *RED, *GREEN])
    picture.save(tmp_path / "a.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colour_of(only(tmp_path)) == expected


@pytest.mark.parametrize(("ink", "expected"), [((0, 0, 0, 0), WHITE), ((0, 255, 255, 0), RED), ((0, 0, 0, 255), BLACK)])
@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_cmyk_is_ink(tmp_path, name, ink, expected):
    draw(tmp_path / name, ink, mode="CMYK")
    assert colour_of(only(tmp_path)) == pytest.approx([value / 127.5 - 1 for value in expected], abs=0.02)


RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)


def save_ramp(path: Path, kind: str):
    if kind == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP.astype(">u2" if kind == "big-endian tif" else np.uint16)).save(path)


@pytest.mark.parametrize("kind", ["png", "tif", "big-endian tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, kind, channels):
    save_ramp(tmp_path / f"a.{kind.split()[-1]}", kind)
    image = only(tmp_path, size=16, channels=channels)
    assert (image - torch.tensor(RAMP / 32767.5 - 1)).abs().max() < 0.51 / 127.5
    assert image[0, 0, 0] == -1 and image[0, -1, -1] == 1


def test_16_bit_grey_with_one_clear_value(tmp_path):
    picture = Image.fromarray(np.where(np.indices((16, 16))[1] < 8, 300, 0).astype(np.uint16))
    picture.save(tmp_path / "a.png", transparency=300)
    image = only(tmp_path, size=16, channels=1)
    assert (image[..., :8] == 1).all() and (image[..., 8:] == -1).all()


def test_16_bit_colour_is_scaled(tmp_path):
    pixels = np.zeros((9, 9, 3), ">u2")
    pixels[:] = (65535, 0, 32896)
    (tmp_path / "a.ppm").write_bytes(b"P6 9 9 65535\n" + pixels.tobytes())
    assert colour_of(only(tmp_path)) == pytest.approx([1, -1, 128 / 127.5 - 1], abs=1e-6)


def tiff_of(bits: int, photometric: int) -> bytes:
    """A grey TIFF of 16 x 16 pixels, written here by its specification: little-endian, one strip."""
    pixels = bytes(16 * 16 * bits // 8)
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, photometric), (273, 0), (277, 1), (278, 16)]
    tags = dict([*tags, (279, len(pixels))])
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    rows = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + rows + bytes(4) + pixels


UNKNOWN_WHITE = {
    "32-bit whole numbers": lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path),
    "floating point": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path),
    "12 bits": lambda path: path.write_bytes(tiff_of(12, 1)),
    "16 bits, 0 is white": lambda path: path.write_bytes(tiff_of(16, 0)),
}


@pytest.mark.parametrize("case", UNKNOWN_WHITE)
def test_grey_of_other_depths_is_refused_by_name(tmp_path, case):
    """What would be white in them is not written in the file: better none than a wrong one."""
    UNKNOWN_WHITE[case](tmp_path / "a.tif")
    message = message_of(lambda: image_folder(tmp_path))
    assert (
        message.startswith(str(tmp_path / "a.tif")) and "whose white is not known (save it as an 8-bit PNG)" in message
    )


def test_plain_tiffs_written_here_are_read(tmp_path):
    """The twin of the table above."""
    for name, bits, photometric in (("a.tif", 16, 1), ("b.tif", 8, 1), ("c.tif", 8, 0)):
        (tmp_path / name).write_bytes(tiff_of(bits, photometric))
    assert image_folder(tmp_path, size=8, channels=1).images[:, 0, 0, 0].tolist() == [-1, -1, 1]


@pytest.mark.parametrize(
    ("name", "format"), [("a.webp", "WEBP"), ("a.tif", "TIFF"), ("a.png", "PNG"), ("b.jpg", "GIF")]
)
def test_the_first_picture_of_several_is_taken(tmp_path, name, format):
    """Of an animation or of pages; a .gif is no ending of ImageFolder's, but its content under another name is read."""
    frames = [Image.new("RGB", (16, 16), colour) for colour in (WHITE, BLACK, BLACK)]
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(tmp_path / name, format=format, save_all=True, append_images=frames[1:], **options)
    assert colour_of(only(tmp_path)) == [1, 1, 1]


@pytest.mark.parametrize("tags", [b"no table of tags", b"II*\0\x08\0\0\0\x05\0\x12\x01"])
def test_unreadable_exif_is_no_fault_of_the_pixels(tmp_path, tags):
    draw(tmp_path / "a.jpg", exif=b"Exif\0\0" + tags)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert colour_of(only(tmp_path)) == [1, 1, 1]


# --- other files ---


def test_other_files_are_counted_in_one_line(tmp_path, capsys):
    draw(tmp_path / "cat" / "a.png")
    draw(tmp_path / "cat" / "b.gif")
    for name in ("notes.txt", "cat/IMG_1.HEIC", "cat/IMG_2.heic", "cat/README"):
        (tmp_path / name).write_text("words", encoding="utf-8")
    assert len(image_folder(tmp_path, size=8)) == 1
    assert capsys.readouterr().out == f"{tmp_path.name}: ignored 5 other files (.gif, .heic, .txt, without an ending)\n"
    (tmp_path / "cat" / "README").unlink()
    assert len(image_folder(tmp_path / "cat", size=8)) == 1
    assert capsys.readouterr().out == "cat: ignored 3 other files (.gif, .heic)\n"


def test_what_systems_leave_behind_is_passed_over_in_silence(tmp_path, capsys):
    """Hidden folders are no classes, and a hidden .png (macOS writes one beside each file of an archive) no picture."""
    draw(tmp_path / "cat" / "a.png")
    draw(tmp_path / "cat" / ".ipynb_checkpoints" / "a-checkpoint.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "cat/Thumbs.db", "cat/._a.png", "._b.png"):
        (tmp_path / name).write_bytes(b"\0")
    for name in (".git", ".ipynb_checkpoints", "__MACOSX"):
        draw(tmp_path / name / "x.png")
    for path in (tmp_path, tmp_path / "cat"):
        assert image_folder(path, size=8).labels.tolist() == [0]
    assert capsys.readouterr().out == ""


def test_folder_inside_a_hidden_folder(tmp_path):
    draw(tmp_path / ".cache" / "cat" / "a.png")
    assert len(image_folder(tmp_path / ".cache", size=8)) == 1


# --- faults of the call and of the folder ---


def touch(*names: str):
    def make(root: Path):
        for name in names:
            if name.endswith((".png", ".jpg")):
                draw(root / name)
            elif name.endswith("/"):
                (root / name).mkdir(parents=True)
            else:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text("words", encoding="utf-8")

    return make


ENDINGS = r"\.jpg, \.jpeg, \.png, .*"
FOLDERS = {
    "missing": (touch(), "none", r"none: expected a folder of pictures, found none \(.+\): pass the path of one"),
    "a file": (touch("a.png"), "a.png", "a.png: expected a folder of pictures, found a file: pass the path of one"),
    "empty": (touch(), "", f": expected at least one picture, found none: put files there that end in {ENDINGS}"),
    "only others": (
        touch("a.heic", "b.txt"),
        "",
        rf": expected at least one picture, found none, and 2 other files \(\.heic, \.txt\): put files .*{ENDINGS}",
    ),
    "only one other": (touch("x/a.heic"), "", r": expected at least one picture, found none, and 1 other file \("),
    "only junk": (touch("Thumbs.db", ".a.png"), "", ": expected at least one picture, found none: put"),
    "empty sub-folders": (touch("a/", "b/"), "", ": expected at least one picture, found none: put"),
    "an empty class": (
        touch("a/1.png", "b/", "c/1.png"),
        "",
        "/b: expected at least one picture, found none: put one there, or remove the folder",
    ),
    "a class of other files": (touch("a/1.png", "b/1.txt"), "", "/b: expected at least one picture, found none"),
    "pictures beside": (
        touch("a/1.png", "2.png", "3.jpg", "4.txt"),
        "",
        r": expected pictures in its sub-folders alone, found 2 beside the sub-folder 'a', such as '2\.png': move them",
    ),
    "pictures beside an empty sub-folder": (touch("a/", "2.png"), "", ": .* found 1 beside the sub-folder 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_faults_of_the_folder(tmp_path, case):
    make, path, says = FOLDERS[case]
    make(tmp_path)
    for on_error in ("refuse", "skip"):
        message = message_of(lambda on_error=on_error: image_folder(tmp_path / path, on_error=on_error))
        assert message.startswith(str(tmp_path))
        assert re.match(f"/?{says}", message.removeprefix(str(tmp_path)).replace("\\", "/")), message


ARGUMENTS = {
    "size 7": ({"size": 7}, "size: expected a whole number of pixels, 8 or more, found 7"),
    "size 0": ({"size": 0}, "8 or more, found 0"),
    "a fraction": ({"size": 64.5}, "a whole number of pixels, 8 or more, found 64.5"),
    "a pair": ({"size": (64, 64)}, r"8 or more, found \(64, 64\)"),
    "channels 2": ({"channels": 2}, r"channels: expected 1 \(grey\) or 3 \(RGB\), found 2"),
    "channels 4": ({"channels": 4}, "found 4"),
    "on_error": ({"on_error": "ignore"}, "on_error: expected 'refuse' or 'skip'.*, found 'ignore'"),
    "too large": ({"size": 20_000}, "images that take at most 4 GB, found 1 of size 20000, 4.8 GB: pass a smaller"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_faults_of_the_arguments(tmp_path, case):
    """Called without the type checks of the tests, as a reader calls it."""
    draw(tmp_path / "a.png")
    options, says = ARGUMENTS[case]
    message = message_of(lambda: inspect.unwrap(image_folder)(tmp_path, **options))
    assert re.search(says, message), message


# --- files that cannot be read ---


def noise(path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def cut(share: float):
    def damage(path: Path):
        data = noise(path).read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return damage


def flip_a_bit(path: Path):
    data = bytearray(noise(path).read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def png_header_of(width: int, height: int):
    """A PNG of a few bytes that promises width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


NO_PICTURE = "a damaged header or none of BMP, GIF, JPEG"
BROKEN = {
    "no bytes": ("x.png", lambda path: path.write_bytes(b""), "an empty file"),
    "text": ("x.png", lambda path: path.write_text("words", encoding="utf-8"), NO_PICTURE),
    "a login page": ("x.jpg", lambda path: path.write_text("<!DOCTYPE html>", encoding="utf-8"), NO_PICTURE),
    "zeros": ("x.bmp", lambda path: path.write_bytes(bytes(5000)), NO_PICTURE),
    "a format we do not read": ("x.png", lambda path: draw(path, format="EPS"), NO_PICTURE),
    "a JPEG's header alone": ("x.jpg", cut(0.02), ""),
    "half a JPEG": ("x.jpg", cut(0.5), "truncated"),
    "most of a JPEG": ("x.jpg", cut(0.98), "truncated"),
    "half a PNG": ("x.png", cut(0.5), "truncated"),
    "most of a PNG": ("x.png", cut(0.98), "truncated"),
    "half a BMP": ("x.bmp", cut(0.5), "truncated"),
    "half a TIFF": ("x.tif", cut(0.5), ""),
    "half a WebP": ("x.webp", cut(0.5), ""),
    "half a PPM": ("x.ppm", cut(0.5), "truncated"),
    "a flipped bit in a PNG": ("x.png", flip_a_bit, "broken data stream"),
    "a bomb": ("x.png", png_header_of(20_000, 20_000), r"400000000 pixels\) exceeds limit"),
    "half a bomb": ("x.png", png_header_of(10_000, 10_000), r"100000000 pixels\) exceeds limit"),
    "a link that leads nowhere": ("x.png", lambda path: path.symlink_to(path.parent / "gone"), ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_or_left_out(tmp_path, capsys, case):
    name, damage, says = BROKEN[case]
    draw(tmp_path / "a" / "0.png", BLACK)
    draw(tmp_path / "b" / "0.png", WHITE)
    try:
        damage(tmp_path / "a" / name)
    except OSError:
        pytest.skip("this system makes no links")
    message = message_of(lambda: image_folder(tmp_path))
    assert message.startswith(f"{tmp_path / 'a' / name}: expected a picture that can be read, found ")
    assert re.search(f"found .*{says}.*; 1 of 3 pictures in {re.escape(str(tmp_path))} cannot be read", message), (
        message
    )
    assert 'on_error="skip"' in message and capsys.readouterr().out == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = image_folder(tmp_path, size=8, on_error="skip")
    assert data.labels.tolist() == [0, 1] and data.images[:, 0, 0, 0].tolist() == [-1, 1]
    left_out = f"{tmp_path.name}: left out 1 of 3 pictures, which cannot be read: {Path('a', name)}\n"
    assert capsys.readouterr().out == left_out


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.jpg", {}),
        ("x.jpg", {"progressive": True}),
        ("x.png", {}),
        ("x.bmp", {}),
        ("x.ppm", {}),
        ("x.tif", {}),
        ("x.tif", {"compression": "tiff_lzw"}),
        ("x.webp", {}),
    ],
)
def test_no_file_that_breaks_off_gives_other_pixels(tmp_path, name, options):
    """Wherever it is cut, the file is refused, or gives all of its picture (when only what follows the pixels fell)."""
    data = noise(tmp_path / name, **options).read_bytes()
    whole = only(tmp_path, size=60)
    for length in [*np.linspace(1, len(data) - 1, 40).astype(int), *range(len(data) - 20, len(data))]:
        (tmp_path / name).write_bytes(data[:length])
        try:
            assert torch.equal(only(tmp_path, size=60), whole), length
        except DataError:
            continue


def test_the_first_of_many_is_named_and_all_are_counted(tmp_path, capsys):
    for i in range(9):
        draw(tmp_path / f"{i}.png")
        if i % 2 == 0:
            (tmp_path / f"{i}.png").write_bytes(b"")
    message = message_of(lambda: image_folder(tmp_path))
    assert message.startswith(str(tmp_path / "0.png")) and f"5 of 9 pictures in {tmp_path} cannot be read" in message
    (tmp_path / "notes.txt").write_text("words", encoding="utf-8")
    assert len(image_folder(tmp_path, size=8, on_error="skip")) == 4
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path.name}: left out 5 of 9 pictures, which cannot be read: 0.png, 2.png, 4.png, ...",
        f"{tmp_path.name}: ignored 1 other file (.txt)",
    ]


def test_a_class_of_broken_files_alone_is_an_error_even_so(tmp_path, capsys):
    draw(tmp_path / "a" / "0.png")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "0.png").write_bytes(b"")
    message = message_of(lambda: image_folder(tmp_path, on_error="skip"))
    assert message.startswith(f"{tmp_path / 'b'}: expected at least one picture that can be read, found none: put one")
    message = message_of(lambda: image_folder(tmp_path / "b", on_error="skip"))
    assert message == f"{tmp_path / 'b'}: expected at least one picture that can be read, found none: put one there"
    assert capsys.readouterr().out == ""


def test_nothing_is_left_changed(tmp_path):
    """Neither Pillow's limit, nor the warnings' filters, nor the global generator, nor the files."""
    file = draw(tmp_path / "a.png")
    filters, limit, state = list(warnings.filters), Image.MAX_IMAGE_PIXELS, torch.get_rng_state()
    before = file.read_bytes()
    image_folder(tmp_path)
    assert warnings.filters == filters and limit == Image.MAX_IMAGE_PIXELS
    assert torch.equal(torch.get_rng_state(), state) and file.read_bytes() == before


def test_endings_are_those_of_the_docstring():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    stated = re.search(r"IMG_EXTENSIONS``, which are (.*?)\. One", folders.image_folder.__doc__, re.DOTALL)[1]
    assert tuple(re.findall(r"\.\w+", stated)) == IMG_EXTENSIONS
