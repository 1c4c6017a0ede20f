"""Rows 7 and 8: damaged files of every kind are named, and a gzip bomb is not unpacked."""

import functools
import gzip
import hashlib
import io
import json
import random
import re
import shutil
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from aigc_course import experiments, runtime
from aigc_course.datasets import (
    check_data,
    image_folder,
    load_mnist,
    load_poems,
    load_shakespeare,
    verified_bytes,
)
from aigc_course.tokenizer import END, Tokenizer
from faults import workers
from faults.table import FULL, clear_error

DATA = runtime.course_dir() / "data"
TABLE = json.loads((DATA / "manifest.json").read_text(encoding="utf-8"))
REMEDIES = r"git checkout -- data/|copy .* there, or,|restore the folder|replace or remove them|put (one|files) there"
PAGES = (
    b"\xef\xbb\xbf\r\n<!DOCTYPE html>\n<html><head><title>Guest Wi-Fi</title></head><body>Log in</body></html>\n",
    b"<HTML>\n<BODY>\nSign in\n</BODY>\n</HTML>\n",
    b"<?xml version='1.0'?>\n<!-- captive portal -->\n<html xmlns='http://www.w3.org/1999/xhtml'></html>\n",
)

Files = dict[str, bytes | None]  # name in the folder: content; None is a folder of that name


class Case(NamedTuple):
    """A folder to write, what to call with it, and what the message must hold."""

    name: str
    files: Callable[[], Files]
    call: Callable[[Path], object]
    says: tuple[str, ...]  # regular expressions; the first is of the file that is named


def flipped(data: bytes, position: int, bit: int) -> bytes:
    """``data`` with one bit flipped."""
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def spliced(data: bytes, rng: random.Random, new: bytes) -> bytes:
    """``data`` with ``new`` put in somewhere."""
    at = rng.randrange(len(data))
    return data[:at] + new + data[at:]


# --- against the course's manifest: the sums catch it, and the message says what was found ---


def reader(name: str) -> Callable[[Path], object]:
    """What reads the file ``name`` of a data folder."""
    if name.startswith("mnist/"):
        return lambda root: load_mnist(root, train="train" in name)
    if name.startswith("gpt2-bpe/"):
        return gpt2
    known = {"poems/tang_regulated.txt.gz": "regulated", "poems/tang300.txt": "tang300", "poems/song100.txt": "song100"}
    if name in known:
        return lambda root: load_poems(known[name], root)
    if name.startswith("shakespeare/"):
        return load_shakespeare_all
    return lambda root: verified_bytes(name, root)


def load_shakespeare_all(root: Path) -> object:
    return load_shakespeare("all", root)


def gpt2(root: Path) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIGC_DATA_DIR", str(root))
        return Tokenizer.gpt2()


def on_disk(rng: random.Random) -> Iterator[Case]:
    """Each file of the manifest, damaged as disks, networks and editors damage files."""
    size, page, sha = (
        r"expected {n} bytes, found {m} bytes",
        r"found an HTML page of {m} bytes",
        r"expected sha256 {sha}",
    )
    kinds = {
        "cut": (lambda data: data[: rng.randrange(1, len(data))], size),
        "cut by a byte": (lambda data: data[:-1], size),
        "empty": (lambda data: b"", size),
        "login page": (lambda data: PAGES[0], page),
        "login page without a doctype": (lambda data: PAGES[1], page),
        "login page filled up": (lambda data: PAGES[2].ljust(len(data)), page),
        "more at the end": (lambda data: data + rng.randbytes(rng.randrange(1, 9)), size),
        "zeros": (lambda data: bytes(len(data)), sha),
        "a block of zeros": (lambda data: data[:512].ljust(1024, b"\0")[: len(data)] + data[1024:], sha),
        "ends of lines": (lambda data: data.replace(b"\n", b"\r\n"), size),
        "packed once more": (lambda data: gzip.compress(data, 1), size),
        "a pointer in its place": (lambda data: b"version https://example.org/spec/v1\nsize 5\n", size),
        "a folder in its place": (lambda data: None, r"expected a file of {n} bytes, found "),
        **{
            f"flip {i}": (lambda data: flipped(data, rng.randrange(len(data)), rng.randrange(8)), sha) for i in range(4)
        },
    }
    for name, entry in TABLE.items():
        for kind, (damage, says) in kinds.items():
            if kind == "ends of lines" and not name.endswith((".txt", ".bpe")):
                continue

            def files(name: str = name, damage: Callable = damage) -> Files:
                return {name: damage((DATA / name).read_bytes())}

            says = says.format(n=entry["bytes"], m=r"\d+", sha=entry["sha256"])
            yield Case(f"{name}, {kind}", files, reader(name), (name, says))


# --- a manifest of the user's own, whose sizes and sums fit: the parser itself must notice ---


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def fitting(content: dict[str, bytes], stored: dict[str, bytes] | None = None) -> Files:
    """A data folder with its manifest: ``content`` by file, packed where the name ends in .gz."""
    table, files = {}, {}
    for name, data in content.items():
        file = (stored or {}).get(name) or (packed(data) if name.endswith(".gz") else data)
        table[name] = {
            "bytes": len(file),
            "sha256": hashlib.sha256(file).hexdigest(),
            "content_bytes": len(data),
            "content_sha256": hashlib.sha256(data).hexdigest(),
        }
        files[name] = file
    return files | {"manifest.json": json.dumps(table).encode()}


def idx(values: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype("u1").tobytes()
    )


N = 7
PIXELS = idx(np.random.default_rng(0).integers(0, 256, (N, 28, 28)))
DIGITS = idx(np.array([3, 1, 4, 1, 9, 2, 6]))


def idx_files(rng: random.Random) -> Iterator[Case]:
    """Images and labels of the wrong form, in streams that are whole."""
    images = {
        "no header": (b"", "an IDX header of 16 bytes, found 0"),
        "header cut": (PIXELS[: rng.randrange(1, 16)], "an IDX header of 16 bytes, found"),
        "labels in their place": (DIGITS + bytes(9), "number 0x00000803, found 0x00000801"),
        "floats": (b"\0\0\x0d\3" + PIXELS[4:], "number 0x00000803, found 0x00000d03"),
        "height 27": (idx(np.zeros((N, 27, 28))), r"shape \(28, 28\), found \(27, 28\)"),
        "32 by 32": (idx(np.zeros((N, 32, 32))), r"shape \(28, 28\), found \(32, 32\)"),
        "784 in a row": (idx(np.zeros((N, 784))), "number 0x00000803, found 0x00000802"),
        "little-endian": (PIXELS[:4] + struct.pack("<3I", N, 28, 28) + PIXELS[16:], r"shape \(28, 28\), found"),
        "four billion": (PIXELS[:4] + b"\xff" * 4 + PIXELS[8:], r"for 4294967295 items, found \d+ bytes \(trunc"),
        "cut": (PIXELS[: rng.randrange(16, len(PIXELS))], rf"for {N} items, found \d+ bytes \(truncated"),
        "trailing bytes": (PIXELS + rng.randbytes(rng.randrange(1, 99)), r"found \d+ bytes \(with trailing"),
        "none": (idx(np.zeros((0, 28, 28))), "at least one item, found none"),
        "one fewer": (idx(np.zeros((N - 1, 28, 28))), f"{N - 1} labels, one for each image, found {N}"),
        "more": (idx(np.zeros((N + 3, 28, 28))), f"{N + 3} labels, one for each image, found {N}"),
        "login page": (PAGES[0], "found an HTML page"),
        "noise": (b"\1" + rng.randbytes(5503), "number 0x00000803, found 0x01"),
    }
    wrong = rng.randrange(10, 256)
    high, at = rng.randrange(4, 8), rng.randrange(8, len(DIGITS))
    labels = {
        "no header": (b"", "an IDX header of 8 bytes, found 0"),
        "header cut": (DIGITS[: rng.randrange(1, 8)], "an IDX header of 8 bytes, found"),
        "images in their place": (PIXELS, "number 0x00000801, found 0x00000803"),
        "little-endian": (DIGITS[:4] + struct.pack("<I", N) + DIGITS[8:], r"found 15 bytes \(truncated"),
        "cut": (DIGITS[: rng.randrange(8, len(DIGITS))], rf"for {N} items, found \d+ bytes \(truncated"),
        "trailing bytes": (DIGITS + rng.randbytes(rng.randrange(1, 9)), r"found \d+ bytes \(with trailing"),
        "none": (idx(np.zeros(0)), "at least one item, found none"),
        "one fewer": (idx(np.zeros(N - 1)), f"{N} labels, one for each image, found {N - 1}"),
        "one more": (idx(np.zeros(N + 1)), f"{N} labels, one for each image, found {N + 1}"),
        "label 10": (DIGITS[:-1] + b"\x0a", "labels from 0 to 9, found the label 10"),
        f"label {wrong}": (
            DIGITS[:at] + bytes([wrong]) + DIGITS[at + 1 :],
            f"labels from 0 to 9, found the label {wrong}",
        ),
        f"bit {high} of a label": (flipped(DIGITS, at, high), "labels from 0 to 9, found the label"),
        "letters": (DIGITS[:8] + b"3141926", "labels from 0 to 9, found the label 57"),
        "login page": (PAGES[1], "found an HTML page"),
    }
    for position, bit in rng.sample([(p, b) for p in range(16) for b in range(8)], 12):
        images[f"bit {bit} of byte {position}"] = (flipped(PIXELS, position, bit), "expected .*, found")
    for position, bit in rng.sample([(p, b) for p in range(8) for b in range(8)], 8):
        labels[f"bit {bit} of byte {position}"] = (flipped(DIGITS, position, bit), "expected .*, found")
    for split in ("train", "t10k"):
        pair = {f"mnist/{split}-images-idx3-ubyte.gz": PIXELS, f"mnist/{split}-labels-idx1-ubyte.gz": DIGITS}
        for name, kinds in zip(pair, (images, labels), strict=True):
            for kind, (data, says) in kinds.items():
                named = "labels" if "one for each image" in says else name
                yield Case(
                    f"own {name}, {kind}",
                    lambda p=pair, n=name, d=data: fitting(p | {n: d}),
                    reader(name),
                    (named, says),
                )


def gzip_files(rng: random.Random) -> Iterator[Case]:
    """Wrappers that are no gzip stream of the declared size, around content that is right."""
    poems = "".join(f"题{i}\n人\n{'白日依山尽，黄河入海流。' * i}\n\n" for i in range(1, 30)).encode()
    for name, data in {
        "mnist/train-images-idx3-ubyte.gz": PIXELS,
        "mnist/t10k-labels-idx1-ubyte.gz": DIGITS,
        "poems/tang_regulated.txt.gz": poems,
    }.items():
        whole, damaged = packed(data), "found a damaged stream"
        kinds = {
            "no gzip": (data, damaged),
            "zlib": (zlib.compress(data), damaged),
            "login page": (PAGES[2], "found an HTML page"),
            "wrong check sum": (whole[:-8] + rng.randbytes(4) + whole[-4:], damaged),
            "wrong size at its end": (whole[:-4] + struct.pack("<I", len(data) + 1), damaged),
            "cut": (whole[: rng.randrange(10, len(whole) - 8)], r"found a stream that breaks off after \d+ bytes"),
            "cut in its end": (
                whole[: -rng.randrange(1, 8)],
                f"found a stream that breaks off after {len(data)} bytes",
            ),
            "bytes behind it": (whole + rng.randbytes(3), "found 3 trailing bytes"),
            "a second stream": (whole + packed(b"more"), "trailing bytes"),
            "a byte less": (packed(data[:-1]), f"found {len(data) - 1} bytes"),
            "a byte more": (packed(data + b"\0"), "found more bytes than that"),
            "packed twice": (packed(whole), "found "),
            "one bit": (flipped(whole, rng.randrange(12, len(whole) - 9), rng.randrange(8)), "found "),
        }
        for kind, (stored, says) in kinds.items():
            content = {name: data}
            if name.startswith("mnist/"):
                other = (
                    name.replace("images-idx3", "labels-idx1")
                    if "images" in name
                    else name.replace("labels-idx1", "images-idx3")
                )
                content |= {other: DIGITS if "images" in name else PIXELS}
            yield Case(
                f"own gzip of {name}, {kind}",
                lambda c=content, n=name, s=stored: fitting(c, {n: s}),
                reader(name),
                (name, f"expected .* in (one|the) gzip stream.*{says}|expected a data file.*{says}"),
            )


def text_files(rng: random.Random) -> Iterator[Case]:
    """Texts that are no UTF-8, hold control characters, or have not the form of poems or works."""
    poems = "".join(f"题{i}\n人{i}\n白日依山尽，黄河入海流。\n\n" for i in range(9)).encode()
    works = "\f\n".join(f"\nWORK {i}\n\nTo be, or not to be.\n" for i in range(9)).encode()
    form, of_works = "a title, a poet and verses in each block", "a title and a text between form feeds"
    for name, good in {
        "poems/tang300.txt": poems,
        "poems/song100.txt": poems,
        "poems/tang_regulated.txt.gz": poems,
        "shakespeare/works.txt": works,
    }.items():
        kinds = {
            "a byte that is none": (spliced(good, rng, b"\xff"), "UTF-8, found byte"),
            "a slash too long": (spliced(good, rng, b"\xc0\xaf"), "UTF-8, found byte"),
            "half a surrogate pair": (spliced(good, rng, b"\xed\xa0\x80"), "UTF-8, found byte"),
            "cut in a character": (good + "白".encode()[:2], "UTF-8, found byte"),
            "GBK": ("白日依山尽".encode("gbk") + good, "UTF-8, found byte"),
            "UTF-16": (good.decode().encode("utf-16"), "UTF-8, found byte"),
            "bit 7 flipped": (flipped(good, rng.randrange(len(good)), 7), "UTF-8, found byte"),
            "zeros": (spliced(good, rng, b"") + bytes(99), r"plain text .*, found '\\x00'"),
            "ends of lines": (good.replace(b"\n", b"\r\n"), r"plain text .*, found '\\r'"),
            "a mark of a byte order": (b"\xef\xbb\xbf" + good, r"plain text .*, found '\\ufeff' at character 0"),
            "an escape": (good.replace(b"\n", b"\x1b[2J\n", 1), r"plain text .*, found '\\x1b'"),
            "login page": (PAGES[rng.randrange(3)], "found an HTML page"),
            "empty": (b"", form if good is poems else of_works),
            "an answer in JSON": (b'{"message": "Not Found"}', form if good is poems else of_works),
        }
        if good is poems:
            kinds |= {
                "a title alone": (poems + "只有题\n".encode(), f"{form}, found '只有题'"),
                "no verses": (poems.replace("白日依山尽，黄河入海流。\n".encode(), b"", 1), form),
                "no title": (poems.replace("题3\n".encode(), b"\n"), form),
                "no poet": (poems.replace("人3\n".encode(), b"\n"), form),
                "a line too many": (poems.replace(b"\n\n", b"\n\n\n", 1), form),
            }
        else:
            kinds |= {
                "a title alone": (works + b"\f\nHAMLET\n", f"{of_works}, found 'HAMLET"),
                "nothing between two": (works.replace(b"\f\n", b"\f\n\f\n", 1), of_works),
            }
        for kind, (data, says) in kinds.items():
            yield Case(
                f"own {name}, {kind}",
                lambda n=name, d=data: fitting({n: d}),
                reader(name),
                (name, f"expected .*{says}"),
            )
    for part, title in {"valid": "TWELFTH NIGHT", "test": "OTHELLO", "sonnets": "THE SONNETS"}.items():
        yield Case(
            f"own works without {title}",
            lambda: fitting({"shakespeare/works.txt": works}),
            lambda root, part=part: load_shakespeare(part, root),
            ("shakespeare/works.txt", f"expected the work '{title}.*, found 9 others"),
        )


def gpt2_files(rng: random.Random) -> Iterator[Case]:
    """GPT-2's two files, small ones of one's own."""
    backend = json.loads(Tokenizer.train("白日依山尽，黄河入海流。 the theatre " * 9, 280).backend.to_str())["model"]
    vocab, merges = backend["vocab"], [" ".join(pair) for pair in backend["merges"]]
    lines = "\n".join(["#version: 0.2", *merges]) + "\n"
    good = {"gpt2-bpe/encoder.json": json.dumps(vocab).encode(), "gpt2-bpe/vocab.bpe": lines.encode()}
    token, pair = rng.choice(list(vocab)), rng.randrange(len(merges))
    text = good["gpt2-bpe/encoder.json"]
    encoder = {
        "cut": text[: rng.randrange(1, len(text))],
        "empty": b"",
        "login page": PAGES[1],
        "no UTF-8": spliced(text, rng, b"\xff"),
        "a list": b"[]",
        "a number": b"5",
        "null": b"null",
        "nested": b"[" * 200_000,
        "no tokens": b"{}",
        "a token missing": json.dumps({t: i for t, i in vocab.items() if t != token}).encode(),
        "no end": json.dumps({t: i for t, i in vocab.items() if t != END} | {"other": vocab[END]}).encode(),
        "a byte missing": json.dumps({"qqqq" if t == "q" else t: i for t, i in vocab.items()}).encode(),
        "a token of no bytes": json.dumps({"白" if i == 270 else t: i for t, i in vocab.items()}).encode(),
        **{
            f"the id {new}": json.dumps(vocab | {token: new}).encode()
            for new in (-1, 1.5, 10**30, True, None, "7", [], 280, (vocab[token] + 1) % 280)
        },
    }
    text = good["gpt2-bpe/vocab.bpe"]
    bpe = {
        "empty": b"",
        "login page": PAGES[2],
        "the version alone": b"#version: 0.2\n",
        "no version": "\n".join(merges).encode(),
        "no UTF-8": spliced(text, rng, b"\xff"),
        "cut after a line": "\n".join(["#version: 0.2", *merges[:pair]]).encode(),
        "a pair twice": (lines + merges[pair] + "\n").encode(),
        "three tokens": lines.replace(f"\n{merges[pair]}\n", f"\n{merges[pair]} t\n").encode(),
        "one token": lines.replace(f"\n{merges[pair]}\n", "\nt\n").encode(),
        "tokens that are none": lines.replace(f"\n{merges[pair]}\n", "\nq z\n").encode(),
        "an empty line": lines.replace("\n", "\n\n", 1).encode(),
    }
    for name, kinds in zip(good, (encoder, bpe), strict=True):
        for kind, data in kinds.items():
            yield Case(
                f"own {name}, {kind}",
                lambda n=name, d=data: fitting(good | {n: d}),
                gpt2,
                (name, "expected .*, found ."),
            )


def spoilt(text: bytes, rng: random.Random, page: bytes) -> dict[str, bytes | None]:
    """What may become of any text file; None stands for a folder of its name."""
    return {
        "cut": text[: rng.randrange(1, len(text) - 2)],
        "empty": b"",
        "a folder": None,
        "login page": page,
        "no UTF-8": spliced(text, rng, b"\xff"),
    }


def saved_tokenizers(rng: random.Random, folder: Path) -> Iterator[Case]:
    """What ``Tokenizer.save`` has written, read by ``Tokenizer.load``."""
    Tokenizer.train("the theatre " * 9, 260).save(folder)
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    text = good["tokenizer.json"]
    known = json.loads(text)

    def with_model(**changes) -> bytes:
        return json.dumps(known | {"model": known["model"] | changes}).encode()

    broken = {
        **spoilt(text, rng, PAGES[0]),
        "null": b"null",
        "nested": b"[" * 200_000,
        "another model": with_model(type="WordPiece", unk_token="t", max_input_chars_per_word=9),
        "no merges": with_model(merges=None),
        "a merge of three": with_model(merges=[["t", "h", "e"]]),
        "a negative id": with_model(vocab=known["model"]["vocab"] | {"th": -1}),
        "a hole in the ids": with_model(vocab=known["model"]["vocab"] | {"q": 999}),
        "no end": json.dumps(known | {"added_tokens": []}).encode().replace(END.encode(), b"the end"),
        "no decoder": json.dumps(known | {"decoder": None, "pre_tokenizer": None}).encode(),
    }
    config = {
        "cut": good["tokenizer_config.json"][:-5],
        "empty": b"",
        "login page": PAGES[1],
        "no UTF-8": b'{"eos_token": "\xff"}',
        "a list": b"[]",
        "nested": b"[" * 200_000,
        "another end": b'{"eos_token": "</s>"}',
    }
    for name, kinds in {"tokenizer.json": broken, "tokenizer_config.json": config}.items():
        for kind, data in kinds.items():
            yield Case(f"saved {name}, {kind}", lambda n=name, d=data: good | {n: d}, Tokenizer.load, (name, ": .+; "))


def manifests(rng: random.Random) -> Iterator[Case]:
    """Manifests of the user's own that are no table of files."""
    name = "mnist/train-labels-idx1-ubyte.gz"
    good = fitting({name: DIGITS, "mnist/train-images-idx3-ubyte.gz": PIXELS})
    table = json.loads(good["manifest.json"])
    text = good["manifest.json"]
    kinds = {
        "cut": (text[: rng.randrange(1, len(text))], "in JSON"),
        "empty": (b"", "in JSON"),
        "a folder": (None, "in JSON"),
        "login page": (PAGES[0], "found an HTML page"),
        "no UTF-8": (spliced(text, rng, b"\xff"), "in JSON"),
        "nested": (b"[" * 200_000, "in JSON"),
        "a list": (b"[]", "found a list"),
        "null": (b"null", "found a NoneType"),
    }
    for key, values in {
        "bytes": (None, -1, 1.5, "3", True, 10**30, 2**62),
        "content_bytes": (None, -5, [], False, 10**30),
        "sha256": (None, 5),
        "content_sha256": ({},),
    }.items():
        for value in values:
            changed = json.dumps(table | {name: table[name] | {key: value}}).encode()
            kinds[f"{key} {value!r}"] = (changed, "bytes, content_bytes, sha256, content_sha256 for mnist")
    for entry in (None, 3, "text", []):
        kinds[f"the entry {entry!r}"] = (
            json.dumps(table | {name: entry}).encode(),
            "found .* for mnist|for mnist.*found",
        )
    for odd in ("../secret", "/etc/passwd", "a/../../b", "C:\\secret", "\\\\host\\share", "a\0b", "a\nb", "\ud800"):
        kinds[f"the name {odd!r}"] = (
            json.dumps(table | {odd: table[name]}).encode(),
            "names of files within its folder",
        )
    for kind, (data, says) in kinds.items():
        call = rng.choice([load_mnist, check_data])
        yield Case(
            f"manifest, {kind}",
            lambda d=data: good | {"manifest.json": d},
            call,
            ("manifest.json", f"expected .*{says}"),
        )
    for missing in table:
        less = json.dumps({key: value for key, value in table.items() if key != missing}).encode()
        yield Case(
            f"manifest without {missing}",
            lambda d=less: good | {"manifest.json": d},
            load_mnist,
            (missing, "expected an entry for it in manifest.json, found none"),
        )


def histories(rng: random.Random) -> Iterator[Case]:
    """Recordings of side experiments."""

    def recorded(root: Path) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiments, "course_dir", lambda: root)
            return experiments.recorded("vae_beta")

    name = "data/histories/vae_beta.json"
    text = (runtime.course_dir() / name).read_bytes()
    kinds = {
        **spoilt(text, rng, PAGES[1]),
        "a list": b"[]",
        "no rows": text.replace(b'"rows"', b'"lines"'),
    }
    for kind, data in kinds.items():
        yield Case(
            f"history, {kind}", lambda d=data: {name: d}, recorded, (name, "cannot be read .*aigc experiment vae_beta")
        )


def picture(kind: str, size: tuple[int, int] = (40, 30)) -> bytes:
    """A noisy picture, so that no part of its file is without meaning."""
    values = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pictures(rng: random.Random) -> Iterator[Case]:
    """Folders of pictures: a file among good ones that is damaged."""
    for kind, ending in {
        "PNG": "png",
        "JPEG": "jpg",
        "BMP": "bmp",
        "TIFF": "tif",
        "WEBP": "webp",
        "PPM": "ppm",
    }.items():
        good = picture(kind)
        damaged = {
            "cut": good[: rng.randrange(1, len(good) * 9 // 10)],
            "cut in its header": good[: rng.randrange(1, 12)],
            "empty": b"",
            "login page": PAGES[rng.randrange(3)],
            "noise": rng.randbytes(len(good)),
            "wrong magic": rng.randbytes(1) + b"\0" + good[2:],
            "zeros": bytes(len(good)),
        }
        if kind == "PNG":
            head = struct.pack(">2I5B", 60_000, 60_000, 8, 2, 0, 0, 0)
            damaged["a bomb"] = good[:8] + chunk(b"IHDR", head) + good[33:]
            for i in range(3):  # in the pixels, which have a check sum
                damaged[f"flip {i}"] = flipped(good, rng.randrange(44, len(good) - 20), rng.randrange(8))
        for what, data in damaged.items():
            name = f"b/broken.{ending}"
            files = {"a/1.png": picture("PNG"), "b/2.png": picture("PNG"), name: data}
            yield Case(
                f"{kind}, {what}",
                lambda files=files: files,
                lambda root: image_folder(root, size=8),
                (name, "expected a picture that can be read, found ."),
            )
    for what, files, says in [
        ("no pictures", {"notes.txt": b"none"}, "expected at least one picture, found none"),
        (
            "an empty class",
            {"a/1.png": picture("PNG"), "b/notes.txt": b""},
            "b: expected at least one picture, found none",
        ),
    ]:
        yield Case(what, lambda files=files: files, lambda root: image_folder(root, size=8), ("", says))


def write(root: Path, files: Files) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if data is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(data)
    return root


def stamps(root: Path) -> list[tuple]:
    return [(path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(root.rglob("*"))]


@pytest.mark.fault("7")
def test_a_damaged_file_is_named_and_nothing_is_written(fault, tmp_path):
    rng = fault.rng
    groups = [list(g) for g in (on_disk(rng), idx_files(rng), gzip_files(rng), text_files(rng), gpt2_files(rng))]
    groups += [
        list(g) for g in (saved_tokenizers(rng, tmp_path / "saved"), manifests(rng), histories(rng), pictures(rng))
    ]
    for group in groups:
        rng.shuffle(group)
    # From each group its share, so that a draw holds every kind of file.
    ranked = sorted(
        ((i + 0.5) / len(group), number, case) for number, group in enumerate(groups) for i, case in enumerate(group)
    )
    cases = [case for _, _, case in ranked[: fault.n]]
    assert len({case.name for case in cases}) == fault.n
    assert not FULL or len(ranked) == fault.n, f"{len(ranked)} cases are at hand"
    for i, case in enumerate(cases):
        with fault.case(case.name):
            inject(case, tmp_path / str(i))


def inject(case: Case, root: Path) -> None:
    """Write the case's folder, read it, and hold the message to its word; nothing may have been written."""
    files = case.files()
    if "manifest.json" not in files and TABLE.keys() & files.keys():  # held to the course's manifest
        for name in TABLE.keys() - files.keys():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(DATA / name)
    write(root, files)
    before = stamps(root)
    file, *says = case.says
    message = clear_error(lambda: case.call(root), str(root), file)
    for pattern in (*says, REMEDIES):
        assert re.search(pattern, message), message
    assert stamps(root) == before


# --- gzip bombs: streams of zeros under a small declared size ---

MEMBERS = ("mnist/train-images-idx3-ubyte.gz", "mnist/train-labels-idx1-ubyte.gz", "poems/tang_regulated.txt.gz")
HEAD, LAST = b"\x1f\x8b\x08\0\0\0\0\0\0\xff", b"\x03\0"  # a gzip header, and the empty block that ends a stream
MIB, GIB = 2**20, 1024  # in bytes, and in MiB
ZEROS = bytes(MIB)
MORE, TRAILING = "found more bytes than that", "trailing bytes after the stream"


def _blocks() -> bytes:
    """A MiB of zeros as deflate blocks of a kB in all, which can be repeated: they refer to nothing before them."""
    deflate = zlib.compressobj(9, wbits=-15)
    return deflate.compress(ZEROS) + deflate.flush(zlib.Z_FULL_FLUSH)


BLOCKS = _blocks()


@functools.cache
def crc_of(n_mib: int) -> int:
    """The check sum of so many MiB of zeros; each GiB is counted once a session."""
    step = min(n_mib, GIB)
    crc = crc_of(n_mib - step) if n_mib > step else 0
    for _ in range(step):
        crc = zlib.crc32(ZEROS, crc)
    return crc


def stream(n_mib: int, size: int | None = None) -> bytes:
    """A gzip stream of zeros; the size at its end is ``size`` or the truth, in the 32 bits that it has."""
    size = n_mib * MIB if size is None else size
    return HEAD + n_mib * BLOCKS + LAST + struct.pack("<2I", crc_of(n_mib), size % 2**32)


def nested() -> tuple[bytes, int]:
    inner = stream(5 * GIB)
    return packed(inner), len(inner)


BOMBS = {  # what it is: the file and the size that the manifest declares, and what the message says
    "1 GiB": (lambda: (stream(GIB), 1000), MORE),
    "good content, then a stream of 1 GiB": (lambda: (packed(PIXELS) + stream(GIB), len(PIXELS)), TRAILING),
    "10 GiB": (lambda: (stream(10 * GIB), 7_840_016), MORE),
    "good content, and 2 GiB in the same stream": (lambda: (with_zeros(PIXELS, 2 * GIB), len(PIXELS)), MORE),
    "a forged size at the end": (lambda: (stream(GIB, size=5504), 5504), MORE),
    "4 GiB and one MiB, so that the size at the end fits": (lambda: (stream(4 * GIB + 1), MIB), MORE),
    "1024 streams of one MiB": (lambda: (GIB * stream(1), MIB), TRAILING),
    "a thousand empty streams, then 1 GiB": (lambda: (1000 * packed(b"") + stream(GIB), 0), TRAILING),
    "3 GiB without an end": (lambda: (HEAD + 3 * GIB * BLOCKS, 9999), MORE),
    "5 GiB packed twice, the inner size declared": (nested, "expected .*, found "),
}


def with_zeros(data: bytes, n_mib: int) -> bytes:
    """One stream of ``data`` and zeros."""
    deflate = zlib.compressobj(wbits=-15)
    start = deflate.compress(data) + deflate.flush(zlib.Z_FULL_FLUSH)
    crc = zlib.crc32(data)
    for _ in range(n_mib):
        crc = zlib.crc32(ZEROS, crc)
    return HEAD + start + n_mib * BLOCKS + LAST + struct.pack("<2I", crc, (len(data) + n_mib * MIB) % 2**32)


def open_bomb(root: Path, name: str) -> tuple[str, int, float]:
    """In a worker: the message, the growth in memory, and the seconds of CPU."""
    messages, start = [], time.process_time()
    bytes_more = workers.growth(lambda: messages.append(clear_error(lambda: reader(name)(root), name)))
    return messages[0], bytes_more, time.process_time() - start


def hoard() -> int:
    """In a worker: the growth that 200 MiB are seen as."""
    return workers.growth(lambda: b"\1" * (200 * MIB))


@pytest.mark.fault("8")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
def test_a_bomb_is_unpacked_up_to_the_declared_size_only(fault, tmp_path):
    assert workers.run(hoard).value > 150 * MIB, "this measure sees nothing"
    for i, kind in enumerate(fault.rng.sample(list(BOMBS), fault.n)):
        build, says = BOMBS[kind]
        with fault.case(kind):
            stored, declared = build()
            name, root = MEMBERS[i % len(MEMBERS)], tmp_path / str(i)
            files = fitting(dict(zip(MEMBERS, (PIXELS, DIGITS, b""), strict=True)), {name: stored})
            table = json.loads(files["manifest.json"])
            table[name]["content_bytes"] = declared
            write(root, files | {"manifest.json": json.dumps(table).encode()})
            outcome = workers.run(open_bomb, root, name)
            assert outcome.code == 0 and not outcome.error, outcome
            message, more, seconds = outcome.value
            assert re.search(says, message) and re.search(REMEDIES, message), message
            assert more < 100e6, f"{more / 1e6:.0f} MB"
            assert seconds < 5
            shutil.rmtree(root)
