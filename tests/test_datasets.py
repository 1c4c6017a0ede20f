"""Data sets: every damaged file is named, MNIST arrives as documented, and toy samples follow their exact densities."""

import gzip
import hashlib
import json
import math
import re
import shutil
import statistics
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from aigc_course import runtime
from aigc_course.datasets import (
    Images,
    binarize,
    check_data,
    inflate,
    load_mnist,
    read_idx,
    toy_2d,
    toy_log_density,
    toy_mixture,
    verified_bytes,
)
from conftest import message_of

DATA = runtime.course_dir() / "data"
IMAGES, LABELS = "mnist/train-images-idx3-ubyte.gz", "mnist/train-labels-idx1-ubyte.gz"
MIXTURES = ("mixture", "ring", "grid")


# --- a small data folder of one's own ---


def idx(values: np.ndarray) -> bytes:
    """IDX, written here by its specification."""
    dims = b"".join(size.to_bytes(4, "big") for size in values.shape)
    return bytes([0, 0, 8, values.ndim]) + dims + values.astype(np.uint8).tobytes()


def tiny_content() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {IMAGES: idx(rng.integers(0, 256, (5, 28, 28))), LABELS: idx(np.array([3, 1, 4, 1, 9]))}


def entry(stored: bytes, content: bytes) -> dict:
    return {
        "bytes": len(stored),
        "sha256": hashlib.sha256(stored).hexdigest(),
        "content_bytes": len(content),
        "content_sha256": hashlib.sha256(content).hexdigest(),
    }


def write_root(root: Path, content: dict[str, bytes], stored: dict[str, bytes] | None = None) -> Path:
    """A data folder whose manifest fits what lies in it, so that only the strict reader can object."""
    stored = {name: gzip.compress(data, mtime=0) for name, data in content.items()} | (stored or {})
    for name, data in stored.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    table = {name: entry(stored[name], content[name]) for name in stored}
    (root / "manifest.json").write_text(json.dumps(table), encoding="utf-8")
    return root


@pytest.fixture
def tiny(tmp_path) -> Path:
    return write_root(tmp_path / "own", tiny_content())


# --- damaged files ---


def flip(position: int, bit: int = 0):
    def damage(path: Path):
        data = bytearray(path.read_bytes())
        data[position] ^= 1 << bit
        path.write_bytes(data)

    return damage


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def replace_by_folder(path: Path):
    path.unlink()
    path.mkdir()


LOGIN = b"\xef\xbb\xbf\r\n<!DOCTYPE html>\n<html><head><title>Guest Wi-Fi</title></head></html>"

DAMAGE_ON_DISK = {
    "flipped bit in the gzip header": (flip(4), r"expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"),
    "flipped bit in the middle": (flip(24, 5), r"expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"),
    "flipped bit at the end": (flip(-1, 7), r"expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}"),
    "truncated": (rewrite(lambda data: data[:-7]), r"expected (\d+) bytes, found \d+ bytes"),
    "empty": (rewrite(lambda data: b""), r"expected \d+ bytes, found 0 bytes"),
    "trailing bytes": (rewrite(lambda data: data + b"\0" * 9), r"expected \d+ bytes, found \d+ bytes"),
    "login page": (rewrite(lambda data: LOGIN), r"expected a data file of \d+ bytes, found an HTML page.*login page"),
    "login page of the right size": (
        rewrite(lambda data: LOGIN[:20].ljust(len(data), b" ")),
        r"expected a data file of \d+ bytes, found an HTML page.*login page",
    ),
    "login page without a doctype": (
        rewrite(lambda data: b"<HTML><BODY>Sign in</BODY></HTML>"),
        r"expected a data file of \d+ bytes, found an HTML page.*login page",
    ),
    "missing": (lambda path: path.unlink(), r"expected a file of \d+ bytes, found no such file"),
    "a folder in its place": (replace_by_folder, r"expected a file of \d+ bytes, found .*(directory|denied)"),
}


@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize("case", DAMAGE_ON_DISK)
def test_damage_on_disk_is_named(tiny, name, case):
    """The manifest no longer fits: the message names the file, what was expected, what was found and what mends it."""
    damage, says = DAMAGE_ON_DISK[case]
    damage(tiny / name)
    message = message_of(lambda: load_mnist(tiny))
    assert message.startswith(str(tiny / name))
    assert re.search(says, message)
    assert f"copy {DATA / name}" in message and "git checkout" not in message


@pytest.mark.parametrize("case", DAMAGE_ON_DISK)
def test_damage_in_the_courses_own_folder_is_mended_by_git(tmp_path, monkeypatch, case):
    write_root(tmp_path / "data", tiny_content())
    monkeypatch.setattr(runtime, "course_dir", lambda: tmp_path)
    assert len(load_mnist()) == 5
    DAMAGE_ON_DISK[case][0](tmp_path / "data" / IMAGES)
    assert message_of(load_mnist).endswith(f"git checkout -- data/{IMAGES}")


def with_magic(data: bytes, magic: bytes) -> bytes:
    return magic + data[4:]


STRICT = {
    "labels in place of images": (IMAGES, lambda d: idx(np.zeros(16)), "magic number 0x00000803, found 0x00000801"),
    "images in place of labels": (LABELS, lambda d: idx(np.zeros((1, 28, 28))), "0x00000801, found 0x00000803"),
    "floats": (IMAGES, lambda d: with_magic(d, b"\0\0\x0d\x03"), "magic number 0x00000803, found 0x00000d03"),
    "first byte not zero": (LABELS, lambda d: with_magic(d, b"\1\0\x08\1"), "number 0x00000801, found 0x01000801"),
    "height 27": (IMAGES, lambda d: idx(np.zeros((5, 27, 28))), r"shape \(28, 28\), found \(27, 28\)"),
    "width 29": (IMAGES, lambda d: idx(np.zeros((5, 28, 29))), r"shape \(28, 28\), found \(28, 29\)"),
    "truncated header": (IMAGES, lambda d: d[:15], "an IDX header of 16 bytes, found 15 bytes"),
    "truncated images": (IMAGES, lambda d: d[:-1], r"3936 bytes of IDX for 5 items, found 3935 bytes \(truncated"),
    "truncated labels": (LABELS, lambda d: d[:-1], r"13 bytes of IDX for 5 items, found 12 bytes \(truncated"),
    "trailing byte": (IMAGES, lambda d: d + b"\0", r"3936 bytes of IDX for 5 items, found 3937 bytes \(with trailing"),
    "4 billion promised": (IMAGES, lambda d: d[:4] + b"\xff" * 4 + d[8:], "3367254359296 bytes .*, found 3936 bytes"),
    "label 10": (LABELS, lambda d: idx(np.array([3, 10, 4, 1, 9])), "labels from 0 to 9, found the label 10"),
    "fewer labels": (LABELS, lambda d: idx(np.array([3, 1, 4, 1])), "5 labels, one for each image, found 4"),
    "more labels": (LABELS, lambda d: idx(np.array([3, 1, 4, 1, 5, 9])), "5 labels, one for each image, found 6"),
    "no labels": (LABELS, lambda d: idx(np.array([])), "at least one item, found none"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRICT)
def test_strict_reading(tmp_path, case):
    """The sums are right and the content is wrong: the IDX reader alone must see it."""
    name, change, says = STRICT[case]
    content = tiny_content()
    root = write_root(tmp_path, content | {name: change(content[name])})
    message = message_of(lambda: load_mnist(root))
    assert message.startswith(str(root / name))
    assert re.search(f"expected .*{says}", message), message


def zip_of(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


GZIP = {
    "no gzip": (lambda d: d, "found a damaged stream"),
    "zlib in place of gzip": (zlib.compress, "found a damaged stream"),
    "wrong check sum": (lambda d: zip_of(d)[:-8] + bytes(4) + zip_of(d)[-4:], "found a damaged stream"),
    "breaks off early": (lambda d: zip_of(d)[:25], r"found a stream that breaks off after \d+ bytes"),
    "breaks off in the trailer": (lambda d: zip_of(d)[:-3], "found a stream that breaks off after 3936 bytes"),
    "trailing bytes": (lambda d: zip_of(d) + b"junk", "found 4 trailing bytes after the stream"),
    "a second stream": (lambda d: zip_of(d) + zip_of(b"more"), "trailing bytes after the stream"),
    "one byte less": (lambda d: zip_of(d[:-1]), "found 3935 bytes"),
    "one byte more": (lambda d: zip_of(d + b"\0"), "found more bytes than that"),
}  # fmt: skip


@pytest.mark.parametrize("case", GZIP)
def test_strict_unpacking(tmp_path, case):
    """The stored file has the sum that the manifest states, and is no gzip stream of the stated size."""
    pack, found = GZIP[case]
    content = tiny_content()
    root = write_root(tmp_path, content, stored={IMAGES: pack(content[IMAGES])})
    message = message_of(lambda: load_mnist(root))
    assert message.startswith(str(root / IMAGES))
    assert "expected 3936 bytes in one gzip stream" in message
    assert re.search(found, message), message


def test_gzip_bomb_is_not_unpacked():
    """64 MiB of zeros under a stated size of 1000 bytes: memory stays small."""
    bomb = zip_of(b"\0" * 2**26)
    tracemalloc.start()
    message = message_of(lambda: inflate(bomb, IMAGES, 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "expected 1000 bytes" in message and "more bytes" in message
    assert peak < 2**20


def test_oversized_file_is_not_read(tiny):
    """A file of 1 GiB (sparse) where 100 bytes belong is refused by its size, without being read."""
    with (tiny / LABELS).open("r+b") as file:
        file.truncate(2**30)
    tracemalloc.start()
    message = message_of(lambda: load_mnist(tiny))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"found {2**30} bytes" in message
    assert peak < 2**20


def test_good_content_passes_each_stage():
    """What the reader accepts is what was written: the twin of the tables above."""
    values = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 256
    content = inflate(zip_of(idx(values)), IMAGES, 16 + values.size)
    assert np.array_equal(read_idx(content, IMAGES, (28, 28)), values)


# --- the manifest ---

BAD_MANIFESTS = {
    "no JSON": (b"{", "JSON"),
    "no UTF-8": (b'{"\xff": 1}', "JSON"),
    "a list": (b"[]", "found a list"),
    "an entry that is a number": (b'{"mnist/a.gz": 3}', "bytes, content_bytes, sha256, content_sha256 for mnist/a.gz"),
    "no sum": (b'{"a.txt": {"bytes": 3}}', "expected bytes, sha256 for a.txt"),
    "no content size": (b'{"a.gz": {"bytes": 3, "sha256": "", "content_sha256": ""}}', "content_bytes"),
    "a size below zero": (b'{"a.txt": {"bytes": -1, "sha256": ""}}', "found .*-1"),
    "a size that is no number": (b'{"a.txt": {"bytes": true, "sha256": ""}}', "found .*True"),
    "a size beyond a disk's": (b'{"a.txt": {"bytes": 1%s, "sha256": ""}}' % (b"0" * 30), "found .*1000"),
    "brackets without end": (b"[" * 200_000, "JSON"),
    "a login page": (b"<!DOCTYPE html><html></html>", "found an HTML page of 28 bytes"),
    "a file outside": (b'{"../a.txt": {"bytes": 3, "sha256": ""}}', "within its folder, found '../a.txt'"),
    "a name that is none": (b'{"a\\u0000.txt": {"bytes": 3, "sha256": ""}}', "within its folder"),
    "a size in words": (b'{"a.txt": {"bytes": "3", "sha256": ""}}', "found .*'3'"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_unreadable_manifest(tiny, case):
    data, says = BAD_MANIFESTS[case]
    (tiny / "manifest.json").write_bytes(data)
    for call in (load_mnist, check_data):
        message = message_of(lambda call=call: call(tiny))
        assert message.startswith(str(tiny / "manifest.json"))
        assert re.search(says, message), message


def test_size_in_the_manifest_is_held_to_as_well_as_the_sum(tiny):
    table = json.loads((tiny / "manifest.json").read_text(encoding="utf-8"))
    table[LABELS]["bytes"] += 1
    (tiny / "manifest.json").write_text(json.dumps(table), encoding="utf-8")
    message = message_of(lambda: load_mnist(tiny))
    assert re.search(r"labels-idx1-ubyte.gz: expected \d+ bytes, found \d+ bytes", message)


def test_missing_manifest(tmp_path, monkeypatch):
    write_root(tmp_path / "data", tiny_content())
    (tmp_path / "data" / "manifest.json").unlink()
    monkeypatch.setattr(runtime, "course_dir", lambda: tmp_path)
    message = message_of(load_mnist)
    assert message.startswith(str(tmp_path / "data" / "manifest.json"))
    assert "no such file" in message and message.endswith("git checkout -- data/manifest.json")


def test_file_without_an_entry(tiny):
    message = message_of(lambda: load_mnist(tiny, train=False))
    assert "mnist/t10k-labels-idx1-ubyte.gz" in message and "an entry for it in manifest.json" in message


def test_folder_without_a_manifest_is_held_to_the_courses(tmp_path):
    (tmp_path / "mnist").mkdir()
    for kind in ("images-idx3", "labels-idx1"):
        shutil.copy(DATA / f"mnist/t10k-{kind}-ubyte.gz", tmp_path / "mnist")
    assert len(load_mnist(tmp_path, train=False)) == 10_000
    flip(1000)(tmp_path / "mnist/t10k-images-idx3-ubyte.gz")
    assert "expected sha256 5634745e" in message_of(lambda: load_mnist(tmp_path, train=False))


def test_check_data_tells_each_file():
    rows = check_data()
    assert [row.path for row in rows] == sorted(json.loads((DATA / "manifest.json").read_text(encoding="utf-8")))
    assert all(row.ok and row.bytes == (DATA / row.path).stat().st_size for row in rows)


def test_check_data_tells_damage_without_raising(tiny):
    flip(20)(tiny / LABELS)
    ok, bad = check_data(tiny)
    assert (ok.path, ok.ok, bad.path, bad.ok) == (IMAGES, True, LABELS, False)
    assert bad.message.startswith(str(tiny / LABELS)) and "sha256" in bad.message


def test_check_data_holds_the_unpacked_content_to_its_sum(tiny):
    table = json.loads((tiny / "manifest.json").read_text(encoding="utf-8"))
    table[IMAGES]["content_sha256"] = "0" * 64
    (tiny / "manifest.json").write_text(json.dumps(table), encoding="utf-8")
    bad, ok = check_data(tiny)
    assert not bad.ok and "content with sha256 0000" in bad.message and ok.ok


def test_readme_manifest_and_files_agree():
    """data/README.md and data/manifest.json list every data file, with its size and its sums.

    Bands, histories and checkpoints are results, and other tests hold them to what made them.
    """
    table = json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))
    files = {path.relative_to(DATA) for path in DATA.rglob("*") if path.is_file()}
    files = {path for path in files if path.parts[0] not in ("bands", "histories", "checkpoints")}
    names = {path.as_posix() for path in files if not any(part.startswith(".") for part in path.parts)}
    assert set(table) == names - {"README.md", "manifest.json"}

    readme = (DATA / "README.md").read_text(encoding="utf-8")
    rows = {}
    for line in readme.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert len(cells) == 6 and all(cells), line
            rows[cells[0].strip("`")] = (cells[4], cells[5].strip("`"))
    sums = {name: digest for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", readme, flags=re.MULTILINE)}
    assert set(rows) == set(sums) == set(table)
    for name, listed in table.items():
        stored = (DATA / name).read_bytes()
        found = {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
        size, digest = f"{len(stored):,}", found["sha256"]
        if name.endswith(".gz"):
            content = gzip.decompress(stored)
            found = entry(stored, content)
            size, digest = f"{size} ({len(content):,} unpacked)", found["content_sha256"]
        assert listed == found, name
        assert rows[name] == (size, digest), name
        assert sums[name] == found["sha256"], name


def test_text_files_are_as_documented():
    for name in ("poems/tang300.txt", "poems/song100.txt", "poems/tang_regulated.txt.gz"):
        text = verified_bytes(name).decode("utf-8")
        assert "\r" not in text and all(poem.count("\n") >= 3 for poem in text.rstrip("\n").split("\n\n"))
    assert len(verified_bytes("shakespeare/works.txt").decode("ascii").split("\f")) == 42


# --- MNIST ---


@pytest.fixture(scope="module")
def test_digits() -> Images:
    return load_mnist(train=False)


HISTOGRAMS = {
    True: [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    False: [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}


@pytest.mark.parametrize("train", [True, False])
def test_mnist_is_mnist(train):
    """Counts, label histogram and the pixel mean and standard deviation that are published for MNIST."""
    data = load_mnist(train=train)
    n = 60_000 if train else 10_000
    assert len(data) == n and data.images.shape == (n, 1, 28, 28) and data.labels.shape == (n,)
    assert data.images.dtype == torch.float32 and data.labels.dtype == torch.int64
    assert data.labels.bincount().tolist() == HISTOGRAMS[train]
    assert data.images.min() == -1 and data.images.max() == 1
    if train:
        assert data.labels[:5].tolist() == [5, 0, 4, 1, 9]
        assert (data.images.mean(dtype=torch.float64).item() + 1) / 2 == pytest.approx(0.1307, abs=5e-5)
        assert data.images.std().item() / 2 == pytest.approx(0.3081, abs=5e-5)


def test_every_pixel_against_a_plain_reading(test_digits):
    """The slow twin: the whole file through gzip, each value as x / 127.5 - 1 in double precision."""
    content = gzip.decompress((DATA / "mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    plain = np.frombuffer(content[16:], np.uint8).reshape(10_000, 1, 28, 28) / 127.5 - 1
    assert np.abs(test_digits.images.numpy() - plain).max() < 1e-7


def test_padding_never_stretches(test_digits):
    padded = load_mnist(train=False, size=32)
    assert padded.images.shape == (10_000, 1, 32, 32)
    assert torch.equal(padded.images[:, :, 2:30, 2:30], test_digits.images)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert (padded.images[:, 0, border] == -1).all()
    assert torch.equal(padded.labels, test_digits.labels)


@pytest.mark.parametrize("size", [0, 27, 30, 64])
def test_other_sizes_are_refused(size):
    message = message_of(lambda: load_mnist(size=size))
    assert "expected size 28, or 32" in message and f"found {size}" in message


def test_unknown_device_is_refused(tiny):
    with pytest.raises(runtime.CourseError, match="abacus"):
        load_mnist(tiny, device="abacus")


def test_images_are_indexed_together(test_digits):
    """A permutation of the indices takes the place of a DataLoader: each image keeps its label."""
    order = torch.randperm(len(test_digits), generator=torch.Generator().manual_seed(0))
    batch = test_digits[order[:64]]
    assert len(batch) == 64
    for i, index in enumerate(order[:64].tolist()):
        assert torch.equal(batch.images[i], test_digits.images[index])
        assert batch.labels[i] == test_digits.labels[index]
    assert torch.equal(test_digits[10:13].labels, test_digits.labels[10:13])
    assert test_digits[10:13].images.shape == (3, 1, 28, 28)
    threes = test_digits[test_digits.labels == 3]
    assert len(threes) == 1010 and (threes.labels == 3).all()
    assert test_digits[-1].images.shape == (1, 1, 28, 28) and test_digits[-1].labels == test_digits.labels[-1:]


def test_images_are_frozen_and_move(tiny):
    data = load_mnist(tiny)
    with pytest.raises(AttributeError):
        data.images = data.images
    moved = data.to("meta")
    assert (moved.images.device.type, moved.labels.device.type, data.images.device.type) == ("meta", "meta", "cpu")
    assert sum(len(one) for one in data) == 5


def test_data_folder_is_moved_by_the_environment(tiny, monkeypatch):
    monkeypatch.setenv("AIGC_DATA_DIR", str(tiny))
    data = load_mnist()
    assert data.labels.tolist() == [3, 1, 4, 1, 9]
    assert torch.equal(data.images, load_mnist(str(tiny)).images)
    assert [row.path for row in check_data()] == [IMAGES, LABELS]


def test_read_only_folder_is_only_read(tiny):
    """Root may write whatever the mode says, so the folder is compared before and after as well."""

    def state():
        return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in [tiny, *tiny.rglob("*")])

    before = state()
    folders = [tiny, tiny / "mnist"]
    for folder in folders:
        folder.chmod(0o555)
    try:
        assert len(load_mnist(tiny)) == 5 and all(row.ok for row in check_data(tiny))
        assert state() == before
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_loading_is_quick():
    """A generous bound on the median of warm loads, in processor time: what else the machine does is not counted."""
    load_mnist(size=32)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        load_mnist(size=32)
        seconds.append(time.process_time() - start)
    assert statistics.median(seconds) < 2


# --- binarize ---


def test_binarize_draws_with_the_documented_probability():
    """Each grey value's mean lies within 4 standard errors of (x + 1) / 2; black and white are certain."""
    grey = torch.linspace(-1, 1, 11)
    n = 40_000
    state = torch.get_rng_state()
    drawn = binarize(grey.expand(n, 1, 1, 11), torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn.dtype == torch.float32 and drawn.shape == (n, 1, 1, 11)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    p = (grey.double() + 1) / 2
    error = (p * (1 - p) / n).sqrt()
    assert ((drawn.double().mean(dim=(0, 1, 2)) - p).abs() <= 4 * error + 1e-12).all()
    # Neighbouring pixels are drawn independently.
    five, six = drawn[:, 0, 0, 5], drawn[:, 0, 0, 6]
    assert abs(torch.corrcoef(torch.stack([five, six]))[0, 1]) < 4 / math.sqrt(n)


def test_binarize_is_reproducible_and_drawn_afresh(test_digits):
    rng = torch.Generator().manual_seed(3)
    x = test_digits.images[:20]
    first, second = binarize(x, rng), binarize(x, rng)
    assert torch.equal(first, binarize(x, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, second)


def test_binarize_by_threshold():
    x = torch.tensor([-1.0, -1e-7, -0.0, 0.0, 1e-7, 1.0], dtype=torch.float64)
    hard = binarize(x)
    assert hard.tolist() == [0, 0, 0, 0, 1, 1] and hard.dtype == torch.float32
    pixels = torch.arange(256)
    assert torch.equal(binarize(pixels / 127.5 - 1), (pixels >= 128).float())


@pytest.mark.parametrize("seeded", [False, True])
@pytest.mark.parametrize(("value", "found"), [(1.0001, "1.0001"), (-1.5, "-1.5"), (255.0, "255"), (math.nan, "nan")])
def test_binarize_refuses_other_ranges(value, found, seeded):
    x = torch.zeros(2, 1, 2, 2)
    x[1, 0, 0, 1] = value
    rng = torch.Generator().manual_seed(0) if seeded else None
    message = message_of(lambda: binarize(x, rng))
    assert "expected values in [-1, 1]" in message and found in message


def test_binarize_wants_the_generator_where_the_images_are():
    message = message_of(lambda: binarize(torch.zeros(2, device="meta"), torch.Generator()))
    assert "meta" in message and "cpu" in message


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_binarize_on_a_gpu():
    x = torch.linspace(-1, 1, 1000, device="cuda")
    drawn = binarize(x, torch.Generator("cuda").manual_seed(0))
    assert drawn.device.type == "cuda" and 400 < drawn.sum() < 600


# --- toy densities ---


def raw_moments(name: str) -> torch.Tensor:
    """E[x], E[y], E[x^2], E[y^2], E[xy], exactly."""
    if name == "moons":
        # Upper (cos t, sin t), lower (1 - cos t, 1/2 - sin t), t uniform on [0, pi]: E sin t = 2 / pi, E cos t = 0.
        s, noise = 2 / math.pi, 0.1**2
        return torch.tensor([0.5, 0.25, 1 + noise, (1.25 - s) / 2 + noise, (0.5 - s) / 2], dtype=torch.float64)
    weights, means, covs = toy_mixture(name)
    second = torch.einsum("k,kij->ij", weights, covs + means[:, :, None] * means[:, None])
    return torch.stack([*(weights @ means), second[0, 0], second[1, 1], second[0, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*MIXTURES, "moons"])
def test_toy_samples_have_the_exact_moments(name, dtype):
    n = 200_000
    state = torch.get_rng_state()
    points = toy_2d(name, n, runtime.rng_for("moments", name), dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert points.shape == (n, 2) and points.dtype == dtype
    x, y = points.double().unbind(dim=1)
    samples = torch.stack([x, y, x * x, y * y, x * y])
    error = samples.std(dim=1) / math.sqrt(n)
    assert ((samples.mean(dim=1) - raw_moments(name)).abs() <= 4 * error).all()


@pytest.mark.parametrize(("name", "std"), [("ring", 0.02), ("grid", 0.05)])
def test_modes_are_as_documented(name, std):
    """Every mode gets its share, and the distance from its centre is that of a round Gaussian of the stated width."""
    n = 50_000
    points = toy_2d(name, n, runtime.rng_for("modes", name), dtype=torch.float64)
    if name == "ring":
        angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
        centres = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    else:
        centres = torch.tensor([[i, j] for i in range(-2, 3) for j in range(-2, 3)], dtype=torch.float64)
    distance, nearest = torch.cdist(points, centres).min(dim=1)
    share = 1 / len(centres)
    counts = nearest.bincount(minlength=len(centres)) / n
    assert ((counts - share).abs() < 4 * math.sqrt(share * (1 - share) / n)).all()
    # distance^2 / std^2 is chi-squared with 2 degrees of freedom: mean 2, variance 4.
    assert abs((distance / std).square().mean() - 2) < 4 * 2 / math.sqrt(n)


def test_mixture_is_unequal_and_anisotropic():
    weights, means, covs = toy_mixture("mixture")
    assert weights.unique().numel() == len(weights) == 3 and means.shape == (3, 2)
    low, high = torch.linalg.eigvalsh(covs).unbind(dim=1)
    assert (low > 0).all() and (high / low > 1.5).all() and (covs[:, 0, 1] != 0).all()


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture_parameters_are_proper(name):
    weights, means, covs = toy_mixture(name)
    assert weights.dtype == means.dtype == covs.dtype == torch.float64
    assert weights.sum().item() == pytest.approx(1, abs=1e-15) and (weights > 0).all()
    assert torch.equal(covs, covs.mT) and len(weights) == len(means) == len(covs)
    covs[:] = 0
    assert toy_mixture(name)[2].abs().sum() > 0


def lattice(name: str) -> tuple[torch.Tensor, float]:
    """A square lattice that reaches ten standard deviations past every mode, half a standard deviation apart."""
    reach, step = {"mixture": (12.0, 0.1), "ring": (2.2, 0.01), "grid": (2.5, 0.025)}[name]
    ticks = torch.arange(-round(reach / step), round(reach / step) + 1, dtype=torch.float64) * step
    return torch.cartesian_prod(ticks, ticks), step**2


@pytest.mark.parametrize("name", MIXTURES)
def test_density_integrates_to_one_and_gives_the_samples_entropy(name):
    """The sum over a lattice is 1, and -sum p log p is the mean of -log p over samples, within 4 standard errors."""
    points, area = lattice(name)
    log_p = toy_log_density(name, points)
    p = log_p.exp()
    assert p.sum().item() * area == pytest.approx(1, abs=1e-9)
    entropy = -(p * log_p)[p > 0].sum() * area
    n = 50_000
    surprise = -toy_log_density(name, toy_2d(name, n, runtime.rng_for("entropy", name), dtype=torch.float64))
    assert abs(surprise.mean() - entropy) < 4 * surprise.std() / math.sqrt(n)


@pytest.mark.parametrize("name", MIXTURES)
def test_log_density_against_torch_distributions(name):
    weights, means, covs = toy_mixture(name)
    twin = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariance_matrix=covs))
    rng = runtime.rng_for("twin", name)
    near = toy_2d(name, 500, rng, dtype=torch.float64)
    far = 10 * torch.randn(500, 2, generator=rng, dtype=torch.float64)
    for points in (near, far):
        torch.testing.assert_close(toy_log_density(name, points), twin.log_prob(points), rtol=1e-10, atol=1e-9)
    single = toy_log_density(name, near.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), twin.log_prob(near.float().double()), rtol=1e-5, atol=1e-3)


def test_toy_samples_are_a_function_of_the_generator():
    first, second = (toy_2d("moons", 50, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(first, toy_2d("moons", 50, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: toy_2d("blobs", 3, torch.Generator()), "'blobs'.*'mixture', 'moons', 'ring', 'grid'"),
        (lambda: toy_mixture("blobs"), "'blobs'"),
        (lambda: toy_log_density("blobs", torch.zeros(1, 2)), "'blobs'"),
        (lambda: toy_mixture("moons"), "'moons' has no density in closed form"),
        (lambda: toy_log_density("moons", torch.zeros(1, 2)), "'moons' has no density in closed form"),
        (lambda: toy_2d("ring", 0, torch.Generator()), "n: expected at least one point, found 0"),
    ],
)
def test_toy_refusals(call, says):
    assert re.search(says, message_of(call))
