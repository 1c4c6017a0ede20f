"""Safetensors files whose header lies, read in a checkpoint and in a Hugging Face folder."""

import json
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from aigc_course.checkpoints import CheckpointError, load, save
from aigc_course.gpt2 import GPT2
from aigc_course.runtime import CourseError
from faults import workers
from faults.table import clear_error
from faults.test_pickle_faults import forge, hugging_face


def joined(header: object, body: bytes, *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8")
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def changed(**change):
    """The first tensor's entry with other values."""

    def attack(header: dict, body: bytes) -> bytes:
        name = next(iter(header))
        return joined({**header, name: {**header[name], **change}}, body)

    return attack


def overlapping(header: dict, body: bytes) -> bytes:
    """Two tensors in the same bytes."""
    name, entry = next(iter(header.items()))
    return joined({f"{name}_": entry, **header}, body)


def with_hole(header: dict, body: bytes) -> bytes:
    moved = {n: {**e, "data_offsets": [o + 4 for o in e["data_offsets"]]} for n, e in header.items()}
    return joined(moved, bytes(4) + body)


def twice(header: dict, body: bytes) -> bytes:
    name, entry = next(iter(header.items()))
    text = json.dumps(header)
    return joined(f"{{{json.dumps(name)}: {json.dumps(entry)}, {text[1:]}".encode(), body)


def number(value: float):
    return lambda header, body: joined(header, np.float32(value).tobytes() + body[4:])


def without_last(header: dict, body: bytes) -> bytes:
    last = max(header, key=lambda name: header[name]["data_offsets"])
    return joined({n: e for n, e in header.items() if n != last}, body[: header[last]["data_offsets"][0]])


def with_another(header: dict, body: bytes) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
    return joined({**header, "another": entry}, body + bytes(4))


def of_integers(header: dict, body: bytes) -> bytes:
    return joined({name: {**entry, "dtype": "I32"} for name, entry in header.items()}, body)


def flattened(header: dict, body: bytes) -> bytes:
    flat = {n: {**e, "shape": [int(np.prod(e["shape"])), 1, 1]} for n, e in header.items()}
    return joined(flat, body)


ATTACKS = {
    "header of 2^63 bytes": lambda h, b: joined(h, b, size=2**63),
    "header of 2^32 bytes": lambda h, b: joined(h, b, size=2**32),
    "header past the end": lambda h, b: joined(h, b, size=len(json.dumps(h)) + len(b) + 1),
    "overlapping tensors": overlapping,
    "offsets of 2^64": changed(data_offsets=[2**64 - 8, 2**64 - 4]),
    "begin after end": changed(data_offsets=[8, 0]),
    "a hole before the first": with_hole,
    "shape of more bytes": changed(shape=[2**40]),
    "negative dimension": changed(shape=[-1, 3]),
    "product that overflows": changed(shape=[2**62 + 1, 4]),
    "no elements, 2^63 long": changed(shape=[0, 2**63], data_offsets=[0, 0]),
    "unknown dtype": changed(dtype="F128"),
    "a name twice": twice,
    "NaN": number(float("nan")),
    "missing tensor": without_last,
    "tensor too many": with_another,
    "integers": of_integers,
    "shapes of another model": flattened,
    "no UTF-8": lambda h, b: joined(b'{"\xff\xfe": ' + json.dumps(h).encode() + b"}", b),
    "100 MB of spaces": lambda h, b: joined(json.dumps(h).encode() + b" " * (10**8 - 10**4), b),
}
MORE = {  # what JSON itself allows, or does not
    "infinity": number(float("inf")),
    "no JSON": lambda h, b: joined(b"{" * 1000, b),
    "nested": lambda h, b: joined(b"[" * 10**5, b),
    "bytes after the last": lambda h, b: joined(h, b + bytes(4)),
    "70 axes": changed(shape=[1] * 70),
    "no header": lambda h, b: b"\x00" * 7,
}
READERS = ("checkpoints.load", "GPT2.from_pretrained")
measured = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc"
)


def read_hostile(reader: str, name: str, folder: Path) -> tuple[str, float, float]:
    """Worker: the message of the one error, the growth of memory in MB less the file's own size, and seconds of CPU."""
    hugging_face(folder)
    path = folder / "model.safetensors"
    like = safetensors.torch.load_file(path)
    if reader == "checkpoints.load":
        shutil.rmtree(folder)
        path = next(save(folder, like).glob("weights-*"))
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = {n: e for n, e in json.loads(data[8 : 8 + size]).items() if n != "__metadata__"}
    header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    hostile = (ATTACKS | MORE)[name](header, data[8 + size :])
    if reader == "checkpoints.load":
        path = forge(folder, "weights", hostile)
    else:
        path.write_bytes(hostile)
    length = len(hostile)
    del hostile, data
    read = {"checkpoints.load": lambda: load(folder, like=like), READERS[1]: lambda: GPT2.from_pretrained(folder)}
    kind, messages, start = CheckpointError if reader == READERS[0] else CourseError, [], time.process_time()
    grown = workers.growth(lambda: messages.append(clear_error(read[reader], path.name, kind=kind)))
    return messages[0], (grown - length) / 1e6, time.process_time() - start


@measured
@pytest.mark.fault("6")
def test_hostile_safetensors_are_refused(fault, tmp_path):
    """Each attack through both readers, in a checkpoint whose manifest agrees with it, and in a Hugging Face folder."""
    cases = [(reader, name) for name in ATTACKS for reader in READERS][: fault.n]
    cases = [(*case, tmp_path / str(i)) for i, case in enumerate(cases)]
    for (reader, name, _), outcome in zip(cases, workers.run_each(read_hostile, cases), strict=True):
        with fault.case(f"{reader}, {name}"):
            assert not outcome.error, f"{outcome.error}: {outcome.message}"
            message, megabytes, seconds = outcome.value
            assert "expected" in message and "found" in message and "MemoryError" not in message and len(message) < 600
            assert megabytes < 100 and seconds < 5, f"{megabytes:.0f} MB, {seconds:.1f} s"


@measured
def test_more_hostile_safetensors_are_refused(tmp_path):
    cases = [(reader, name, tmp_path / f"{reader} {name}") for name in MORE for reader in READERS]
    assert [outcome.error for outcome in workers.run_each(read_hostile, cases)] == [""] * len(cases)
