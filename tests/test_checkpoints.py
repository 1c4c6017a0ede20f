"""Checkpoints: what is saved comes back bit for bit; what is damaged, unsafe or half written never does."""

import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from aigc_course import checkpoints
from aigc_course.checkpoints import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointWarning,
    load,
    newest_valid,
    prune,
    read_card,
    save,
    seal,
    step_folder,
    sweep,
    write_atomically,
)
from aigc_course.runtime import rng_for

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions and signals")


def content(seed: int) -> dict:
    """Small arguments of ``save``, a pure function of ``seed``."""
    rng = rng_for("checkpoint", seed)
    moments = {0: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(3, 2, generator=rng)}}
    return {
        "weights": {"net/weight": torch.randn(3, 2, generator=rng), "net/bias": torch.randn(3, generator=rng)},
        "training": {"step": seed, "optimizers": {"net": {"state": moments, "betas": (0.5, 0.999)}}},
        "card": {"seed": seed, "config": {"lr": 1e-4, "name": "混合 é"}, "fd": [1.5, None, True]},
    }


def same(a: object, b: object) -> bool:
    """Equal in type and value, tensors in dtype, shape and every bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def holds(folder: Path, expected: dict) -> bool:
    found = load(folder)
    return same({"weights": found.weights, "training": found.training, "card": found.card}, expected)


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def rewrite_manifest(folder: Path, change) -> None:
    """Apply ``change`` to the manifest and make its own sha256 agree: what a forger would do."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["sha256"]
    change(manifest)
    text = json.dumps(manifest, sort_keys=True)
    manifest["sha256"] = hashlib.sha256(text.encode("utf-8")).hexdigest()
    path.write_bytes(json.dumps(manifest, indent=2, ensure_ascii=False).encode("utf-8"))


def forge(folder: Path, kind: str, data: bytes) -> None:
    """Replace a file's content and make the manifest agree with it."""
    path = one(folder, f"{kind}-*")
    path.write_bytes(data)
    entry = {"name": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({kind: entry}))


# Round trip

SHARED = torch.arange(12.0).reshape(3, 4)
EDGES = torch.tensor([-0.0, 1e-42, 3.4028235e38, 1.0000001])


def many_weights() -> dict[str, torch.Tensor]:
    rng = rng_for("weights")
    image = torch.randn(2, 3, 4, 4, generator=rng)
    return {
        "float32": EDGES,
        "float64": torch.randn(5, generator=rng, dtype=torch.float64),
        "float16": torch.randn(5, generator=rng).half(),
        "bfloat16": torch.randn(3, 3, generator=rng).bfloat16(),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "batches_tracked": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "empty bool": torch.zeros(0, dtype=torch.bool),
        "parameter": torch.nn.Parameter(torch.randn(2, generator=rng)),
        "tied a": SHARED,
        "tied b": SHARED,
        "view": SHARED[1:],
        "transposed": SHARED.T,
        "strided": SHARED[:, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "channels last": image.contiguous(memory_format=torch.channels_last),
        "名字/ü": torch.ones(1),
    }


def test_weights_come_back_bit_for_bit(tmp_path):
    weights = many_weights()
    assert save(tmp_path / "a", weights) == tmp_path / "a"
    found = load(tmp_path / "a", like=weights)
    assert same(found.weights, {name: tensor.detach() for name, tensor in weights.items()})
    assert found.training is None and found.card == {} and found.folder == tmp_path / "a"
    found.weights["tied a"].zero_()
    assert found.weights["tied b"].any() and SHARED.any(), "each tensor read back has memory of its own"


def test_training_and_card_come_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    training = {
        "optimizer": optimizer.state_dict(),
        "net": dict(model.state_dict()),
        "generator": torch.Generator().manual_seed(1).get_state(),
        "history": {"loss": [1.0, float("nan"), float("inf"), -0.0]},
        "mixed": (1, "é", None, True, [2**40, (), {}], {3: 0.1}),
        "bf16": torch.ones(2, 2).bfloat16().T,
    }
    card = {"seed": 1, "command": "aigc train", "figures": {"fd": 0.1 + 0.2, "bits": 2**60}, "note": '混合 "\\\n'}
    save(tmp_path, model.state_dict(), training=training, card=card)
    found = load(tmp_path)
    assert same(found.training, training)
    assert found.card == card
    torch.optim.AdamW(model.parameters()).load_state_dict(found.training["optimizer"])
    torch.Generator().set_state(found.training["generator"])


def test_an_ordered_dict_of_tensors_is_training_state_too(tmp_path):
    state = torch.nn.BatchNorm1d(2).state_dict()
    save(tmp_path, {}, training={"net": state})
    assert same(load(tmp_path).training, {"net": dict(state)})


def test_a_view_in_the_training_state_is_saved_without_the_rest_of_its_storage(tmp_path):
    save(tmp_path, {}, training={"row": torch.zeros(1000, 1000)[0]})
    assert one(tmp_path, "training-*").stat().st_size < 20_000


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_copied_from_and_to(tmp_path):
    weights = {"w": torch.arange(6.0, device="cuda").reshape(2, 3).T}
    save(tmp_path, weights, training={"m": weights["w"]})
    found = load(tmp_path, like=weights, device="cuda")
    assert found.weights["w"].is_cuda and not found.training["m"].is_cuda
    assert same(found.weights, weights) and same(found.training["m"], weights["w"])


def test_saving_does_not_touch_what_is_saved(tmp_path):
    weights, before = many_weights(), many_weights()
    save(tmp_path, weights, training={"w": weights})
    assert same(weights, before) and weights["tied a"] is weights["tied b"]


def test_saving_again_replaces_and_tidies(tmp_path):
    save(tmp_path, **content(1))
    (tmp_path / "samples.png").write_bytes(b"mine")
    (tmp_path / "weights-final.safetensors").write_bytes(b"mine too")
    (tmp_path / "weights-0123456789ab.safetensors").write_bytes(b"left by a process that was killed")
    (tmp_path / "manifest.json.tmp").write_bytes(b"left too")
    save(tmp_path, **content(2))
    assert holds(tmp_path, content(2))
    names = sorted(re.sub("-[0-9a-f]{12}", "", name) for name in listing(tmp_path))
    assert names == ["manifest.json", "samples.png", "training.pt", "weights-final.safetensors", "weights.safetensors"]
    before = listing(tmp_path)
    save(tmp_path, **content(2))
    assert listing(tmp_path) == before, "the same content makes the same files"


def test_saving_again_without_training_state_leaves_none(tmp_path):
    save(tmp_path, **content(1))
    save(tmp_path, content(1)["weights"])
    assert load(tmp_path).training is None
    assert len(listing(tmp_path)) == 2


def test_saving_over_a_damaged_one_mends_it(tmp_path):
    save(tmp_path, **content(1))
    one(tmp_path, "weights-*").write_bytes(b"")
    save(tmp_path, **content(1))
    assert holds(tmp_path, content(1))


# What is refused at save

NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"ok": torch.ones(2), "bad": torch.tensor([1.0, NAN])}}, "NaN or infinity in 'bad'"),
        ({"weights": {"bad": torch.tensor(float("-inf")).bfloat16()}}, "NaN or infinity in 'bad'"),
        ({"weights": {"sparse": torch.eye(2).to_sparse()}}, "safetensors can hold"),
        ({"weights": {"meta": torch.ones(2, device="meta")}}, "safetensors can hold"),
        ({"weights": {"complex": torch.ones(2, dtype=torch.complex128)}}, "safetensors can hold"),
        ({"weights": {"__metadata__": torch.ones(2)}}, "safetensors file"),
        ({"training": {"loss": {"d": [0.5, np.float64(0.5)]}}}, r"float64 in training\['loss'\]\['d'\]\[1\]"),
        ({"training": {"rng": np.zeros(2)}}, r"numpy.ndarray in training\['rng'\]"),
        ({"training": {"path": Path("x")}}, r"Path in training\['path'\]"),
        ({"training": {"f": print}}, r"in training\['f'\]"),
        ({"training": {"big": 2**4000}}, "a dict of numbers"),
        ({"card": {"fd": NAN}}, "a card that is JSON"),
        ({"card": {"path": Path("x")}}, "a card that is JSON"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join([*value, *next(iter(value.values()))]),
)
@pytest.mark.parametrize("there", [False, True])
def test_what_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path, change, message, there):
    folder = tmp_path / "new"
    if there:
        save(folder, **content(1))
    before = listing(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        save(folder, **{**content(2), **change})
    assert listing(folder) == before and folder.exists() == there
    assert str(folder) in str(error.value) and "nothing was written" in str(error.value)
    assert "\n" not in str(error.value)


# What is refused at load


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "wb")


def bomb(folder: Path, protocol: int = 2) -> bytes:
    return pickle.dumps({"step": Bomb(folder / "exploded")}, protocol=protocol)


def zipped_bomb(folder: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"step": Bomb(folder / "exploded")}, buffer)
    return buffer.getvalue()


def change_byte(path: Path, position: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= mask
    path.write_bytes(data)


def truncate(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def pack(**tensors: torch.Tensor) -> bytes:
    return safetensors.torch.save(tensors)


def header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode("utf-8") + bytes(8)


def outside(name: str):
    return lambda folder: rewrite_manifest(folder, lambda manifest: manifest["files"]["weights"].update(name=name))


SCALARS = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
DAMAGE = {
    "no folder": (lambda f: shutil.rmtree(f), "the folder of a checkpoint, found none; check the path"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: .*not finished"),
    "manifest is empty": (lambda f: truncate(f / "manifest.json", 0), "manifest.json: expected a JSON object"),
    "manifest cut": (lambda f: truncate(f / "manifest.json", 100), "manifest.json: expected a JSON object"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[]", encoding="utf-8"), "a JSON object"),
    "manifest nested": (lambda f: (f / "manifest.json").write_text("[" * 10**5, encoding="utf-8"), "a JSON object"),
    "manifest not UTF-8": (lambda f: (f / "manifest.json").write_bytes(b'{"\xff": 1}'), "a JSON object"),
    "manifest not ours": (lambda f: (f / "manifest.json").write_text('{"a": 1}', encoding="utf-8"), "format .*None"),
    "manifest of tomorrow": (lambda f: rewrite_manifest(f, lambda m: m.update(format="aigc 9")), "'aigc 9'; .*update"),
    "card altered": (lambda f: change_byte(f / "manifest.json", -60), "changed since|JSON object"),
    "no files": (lambda f: rewrite_manifest(f, lambda m: m.pop("files")), "list of files"),
    "files is a list": (lambda f: rewrite_manifest(f, lambda m: m.update(files=[1])), "list of files"),
    "no weights named": (lambda f: rewrite_manifest(f, lambda m: m["files"].pop("weights")), "files for weights"),
    "parent folder": (outside("../weights-0123456789ab.safetensors"), "a file in this folder"),
    "absolute path": (outside("/etc/passwd"), "a file in this folder .*found '/etc/passwd'"),
    "newline in a name": (outside("weights-0123456789ab.safetensors\n"), "a file in this folder"),
    "weights gone": (
        lambda f: one(f, "weights-*").unlink(),
        r"weights-\w+.safetensors: expected this file",
    ),
    "training gone": (lambda f: one(f, "training-*").unlink(), r"training-\w+.pt: expected this file"),
    "weights flipped": (lambda f: change_byte(one(f, "weights-*"), -1), r"weights-\w+.safetensors: expected sha256"),
    "training flipped": (lambda f: change_byte(one(f, "training-*"), 70), r"training-\w+.pt: expected sha256"),
    "weights cut": (lambda f: truncate(one(f, "weights-*"), 50), r"weights-.*expected \d+ bytes, found 50 bytes"),
    "training longer": (lambda f: one(f, "training-*").open("ab").write(b"!"), r"training-.*expected \d+ bytes"),
    "pickle for weights": (
        lambda f: forge(f, "weights", bomb(f.parent)),
        "expected a safetensors file, found something",
    ),
    "zip for weights": (lambda f: forge(f, "weights", zipped_bomb(f.parent)), "expected a safetensors file"),
    "header too long": (lambda f: forge(f, "weights", b"\xff" * 16), "expected a safetensors file"),
    "header not JSON": (lambda f: forge(f, "weights", header("{" * 8)), "expected a safetensors file"),
    "header past the end": (
        lambda f: forge(f, "weights", header('{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}')),
        "expected a safetensors file",
    ),
    "unknown dtype": (
        lambda f: forge(f, "weights", header('{"w":{"dtype":"F8_E8M0","shape":[8],"data_offsets":[0,8]}}')),
        "expected a safetensors file",
    ),
    "a tensor twice": (
        lambda f: forge(f, "weights", header(f'{{"w":{SCALARS},"w":{SCALARS}}}')),
        "safetensors file.*'w' twice",
    ),
    "too many axes": (
        lambda f: forge(f, "weights", header(SCALARS.replace("[2]", f"[{'1,' * 70}2]").join(['{"w":', "}"]))),
        "safetensors file.*64 dim",
    ),
    "header of spaces": (lambda f: forge(f, "weights", header(" " * 1_000_001)), "a header of 1,000,001 bytes"),
    "NaN": (lambda f: forge(f, "weights", pack(w=torch.tensor([NAN]))), "expected finite weights, .* in 'w'"),
    "infinity": (lambda f: forge(f, "weights", pack(w=torch.tensor([1e39]))), "expected finite weights, .* in 'w'"),
    "bomb": (lambda f: forge(f, "training", bomb(f.parent)), "which was not run"),
    "bomb, protocol 4": (lambda f: forge(f, "training", bomb(f.parent, 4)), "which was not run"),
    "bomb in a zip": (lambda f: forge(f, "training", zipped_bomb(f.parent)), "which was not run"),
    "training is noise": (lambda f: forge(f, "training", b"noise"), "a dict of numbers"),
    "training is empty": (lambda f: forge(f, "training", b""), "a dict of numbers"),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    damage, message = DAMAGE[case]
    folder = tmp_path / "run"
    save(folder, **content(1))
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    text = str(error.value)
    assert text.startswith(str(folder)) and "expected" in text and "found" in text and ";" in text
    assert "\n" not in text and len(text) < len(str(folder)) + 400
    assert not isinstance(error.value, CheckpointMismatch)
    assert not (tmp_path / "exploded").exists(), "no code from a file may run"


def test_the_bombs_are_armed(tmp_path):
    """Else the test above would prove nothing."""
    pickle.loads(bomb(tmp_path))["step"].close()
    (tmp_path / "exploded").unlink()
    torch.load(io.BytesIO(zipped_bomb(tmp_path)), weights_only=False)["step"].close()
    (tmp_path / "exploded").unlink()


LIKE = content(1)["weights"]


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({**LIKE, "net/weight": torch.ones(2, 3)}, r"shape \(2, 3\) for 'net/weight', found \(3, 2\)"),
        ({**LIKE, "net/bias": torch.ones(1)}, r"shape \(1,\) for 'net/bias', found \(3,\)"),
        ({**LIKE, "net/bias": torch.ones(3).double()}, "dtype torch.float64 for 'net/bias', found torch.float32"),
        ({**LIKE, "net/bias": torch.ones(3).bfloat16()}, "dtype torch.bfloat16 .* found torch.float32"),
        ({**LIKE, "scale": torch.ones(1)}, r"1 missing \('scale'\)"),
        ({**LIKE, **{c: torch.ones(1) for c in "abcd"}}, r"6 tensors, found 4 missing \('a', 'b', 'c', …\)"),
        ({"net/bias": LIKE["net/bias"]}, r"1 extra \('net/weight'\)"),
        ({}, r"2 extra \('net/bias', 'net/weight'\)"),
    ],
    ids=["shape", "length", "float64", "bfloat16", "one missing", "four missing", "one extra", "two extra"],
)
def test_another_model_is_a_mismatch(tmp_path, like, message):
    save(tmp_path, **content(1))
    assert same(load(tmp_path, like={name: t.to("meta") for name, t in LIKE.items()}).weights, LIKE)
    with pytest.raises(CheckpointMismatch, match=message) as error:
        load(tmp_path, like=like)
    assert one(tmp_path, "weights-*").name in str(error.value) and "build the model" in str(error.value)


def test_a_flip_of_any_bit_is_noticed(tmp_path):
    """Every other byte of the manifest; of the other files the start, the end and a sample between."""
    save(tmp_path, **content(1))
    rng = random.Random(0)
    for path in list(tmp_path.iterdir()):
        size = path.stat().st_size
        some = {0, 7, 8, size - 1, *rng.choices(range(size), k=60)}
        positions = range(0, size, 2) if path.name == "manifest.json" else some
        for position in positions:
            mask = 1 << rng.randrange(8)
            change_byte(path, position, mask)
            with pytest.raises(CheckpointError, match=path.name):
                load(tmp_path)
            change_byte(path, position, mask)
    assert holds(tmp_path, content(1))


@pytest.mark.parametrize(
    "change", [lambda text: text + "\n", lambda text: text.replace("{\n", '{\n  "files": 0,\n', 1)]
)
def test_a_manifest_that_means_the_same_but_reads_otherwise_is_noticed(tmp_path, change):
    """JSON allows spaces anywhere, and of a key that comes twice Python's reader takes the last."""
    save(tmp_path, **content(1))
    path = tmp_path / "manifest.json"
    text = path.read_text(encoding="utf-8")
    path.write_bytes(change(text).encode("utf-8"))
    assert json.loads(path.read_bytes()) == json.loads(text)
    with pytest.raises(CheckpointError, match="manifest.json: .*changed since"):
        load(tmp_path)


@pytest.mark.parametrize("pattern", ["weights-*", "training-*", "manifest.json"])
def test_a_cut_file_is_noticed_at_every_length(tmp_path, pattern):
    save(tmp_path, **content(1))
    path = one(tmp_path, pattern)
    data = path.read_bytes()
    for length in sorted({*range(0, len(data), max(1, len(data) // 40)), 1, 8, 9, len(data) - 1}):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load(tmp_path)


def test_the_bytes_that_were_checked_are_the_bytes_that_are_used(tmp_path, monkeypatch):
    """Each file is opened once, so nothing can be exchanged between the check and the use."""
    save(tmp_path, **content(1))
    opened, real = [], io.open

    def spy(file, *args, **kwargs):
        opened.append(Path(file).name)
        return real(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", spy)
        patch.setattr(builtins, "open", spy)
        load(tmp_path)
    assert sorted(opened) == sorted(listing(tmp_path))


# Killed, or out of disk, at any point


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


class Killed(BaseException):
    """Stands for the end of the process: nothing after it may change the disk."""


@contextmanager
def failing(monkeypatch, at: int, error: BaseException):
    """Let the ``at``-th change of the disk fail (a write halfway); after ``Killed`` every later one fails too."""
    calls = []

    def step(name):
        calls.append(name)
        count = len(calls) - 1
        if count == at or (count > at >= 0 and isinstance(error, Killed)):
            raise error

    def wrapped(module, name):
        real = getattr(module, name)

        def call(*args, **kwargs):
            step(name)
            return real(*args, **kwargs)

        patch.setattr(module, name, call)

    class File(io.FileIO):
        def write(self, data):
            try:
                step("write")
            except BaseException:
                super().write(data[: len(data) // 2])
                raise
            return super().write(data)

    real_open = builtins.open

    def open_(file, mode="r", *args, **kwargs):
        if not set(mode) & set("wxa+"):
            return real_open(file, mode, *args, **kwargs)
        step("open")
        return File(file, mode.replace("b", ""))

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "fsync", "unlink", "remove", "mkdir", "rmdir"):
            wrapped(os, name)
        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        yield calls


def count_of_changes(monkeypatch, folder: Path, arguments: dict) -> int:
    with failing(monkeypatch, -1, Killed()) as calls:
        save(folder, **arguments)
    assert calls.count("fsync") >= 6 and calls.count("replace") == 3, "each file and its folder are made durable"
    return len(calls)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [Killed(), DISK_FULL, KeyboardInterrupt()], ids=["killed", "disk full", "Ctrl-C"])
def test_a_save_that_ends_at_any_point_leaves_the_old_or_the_new(tmp_path, monkeypatch, error, there):
    def prepare(name: str) -> Path:
        run = tmp_path / name
        if there:
            save(step_folder(run, 7), **content(1))
        else:
            save(step_folder(run, 6), **content(1))
        return run

    total = count_of_changes(monkeypatch, step_folder(prepare("dry"), 7), content(2))
    seen = set()
    for at in range(total):
        run = prepare(f"run{at}")
        folder, old = step_folder(run, 7), listing(step_folder(run, 7))
        raised = None
        with failing(monkeypatch, at, error):
            try:
                save(folder, **content(2))
            except BaseException as caught:
                raised = caught
        with warnings.catch_warnings():
            warnings.simplefilter("error" if there else "ignore", CheckpointWarning)
            found = newest_valid(run)
        which = next(k for k in (1, 2) if same(found.weights, content(k)["weights"]))
        assert same([found.training, found.card], [content(which)["training"], content(which)["card"]])
        assert found.folder == (folder if there or which == 2 else step_folder(run, 6))
        seen.add(which)
        if raised is None:
            assert which == 2
        elif not isinstance(error, Killed):
            assert not list(run.rglob("*.tmp"))
            assert which == 2 or listing(folder) == old, "what was begun is cleared away"
            assert isinstance(raised, CheckpointError if isinstance(error, OSError) else KeyboardInterrupt)
        if isinstance(raised, CheckpointError):
            assert re.search(
                r"(weights-\w+\.safetensors|training-\w+\.pt|manifest\.json): .*No space left", str(raised)
            )
        save(folder, **content(3))
        assert holds(folder, content(3)) and len(listing(folder)) == 3, "the next save tidies up"
    assert seen == {1, 2}


KILL_LOOP = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from aigc_course.checkpoints import load, save

torch.set_num_threads(1)
folder, rng, unfinished = Path(sys.argv[1]), random.Random(0), 0
contents = [{"w": torch.full((300_000,), float(k)), "v": torch.full((7,), float(k))} for k in (0, 1)]
save(folder, contents[0], training={"k": 0})
start = time.perf_counter()
for k in (1, 0, 1, 0):
    save(folder, contents[k], training={"k": k})
once = (time.perf_counter() - start) / 4
for _ in range(25):
    child = os.fork()
    if child == 0:
        k = 0
        while True:
            k = 1 - k
            save(folder, contents[k], training={"k": k})
    time.sleep(rng.uniform(0.5, 4) * once)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = load(folder, like=contents[0])
    k = found.training["k"]
    assert all(torch.equal(found.weights[name], contents[k][name]) for name in contents[k])
    unfinished += len(list(folder.iterdir())) != 3
save(folder, contents[0])
print("unfinished", unfinished, "left", len(list(folder.iterdir())))
"""


@POSIX
def test_kill_9_leaves_a_whole_checkpoint(tmp_path):
    """A process that saves in a loop is killed 25 times, for real; the forks share one import of torch."""
    script = tmp_path / "loop.py"
    script.write_text(KILL_LOOP, encoding="utf-8")
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    unfinished, left = map(int, re.search(r"unfinished (\d+) left (\d+)", done.stdout).groups())
    assert unfinished > 0, "no kill fell into a save: the test proved nothing"
    assert left == 2


# The disk


@POSIX
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save(tmp_path / "run", **content(1))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "run").iterdir()} == {mode}


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "run").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="run.*to write it.*mend"):
        save(tmp_path / "run", **content(1))
    with pytest.raises(CheckpointError, match="the folder of a checkpoint"):
        load(tmp_path / "run")
    assert (tmp_path / "run").read_bytes() == b"mine"


@POSIX
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    save(tmp_path, **content(1))

    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match="manifest.json: .*Permission denied; mend its permissions"):
        load(tmp_path)


def test_write_atomically_replaces_and_makes_the_folder(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b" / "history.json"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    message = "history.json: .*No space left on device: it takes 5 bytes, [0-9,]+ are free; .*free disk space"
    with failing(monkeypatch, 2, DISK_FULL) as calls, pytest.raises(CheckpointError, match=message):
        write_atomically(path, b"newer")
    assert calls[2] == "write"
    assert listing(path.parent) == {"history.json": b"new"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_names_the_settings(tmp_path, monkeypatch, number):
    refusal, message = OSError(number, os.strerror(number)), f"{os.strerror(number)}; .*AIGC_RUN_DIR or --out"
    with failing(monkeypatch, 0, refusal), pytest.raises(CheckpointError, match=message) as error:
        save(tmp_path / "run", **content(1))
    assert "\n" not in str(error.value)


# What a killed process left


def test_sweep_removes_what_no_manifest_names_and_nothing_else(run):
    half, gone, mixed = (step_folder(run, step) for step in (5, 6, 7))
    for folder in (half, gone, mixed):
        folder.mkdir()
    (half / "weights-0123456789ab.safetensors").write_bytes(b"half")
    (half / "training-0123456789ab.pt.tmp").write_bytes(b"half")
    (mixed / "manifest.json.tmp").write_bytes(b"half")
    (mixed / "notes.txt").write_bytes(b"mine")
    sound = step_folder(run, 4)
    (sound / "weights-0123456789ab.safetensors").write_bytes(b"an orphan")
    damaged = step_folder(run, 3)
    change_byte(damaged / "manifest.json", 40)
    (damaged / "manifest.json.tmp").write_bytes(b"half")
    (run / "config.json.tmp").write_bytes(b"half")
    for name in ("mine.tmp", "weights-0123456789ab.safetensors", "config.json"):
        (run / name).write_bytes(b"mine")
    before = set(run.rglob("*"))
    removed = set(sweep(run))
    assert removed == before - set(run.rglob("*"))
    assert removed == {
        *(half / name for name in ("weights-0123456789ab.safetensors", "training-0123456789ab.pt.tmp")),
        *(half, gone, mixed / "manifest.json.tmp", sound / "weights-0123456789ab.safetensors"),
        *(damaged / "manifest.json.tmp", run / "config.json.tmp"),
    }
    assert holds(sound, content(4)) and len(listing(damaged)) == 3, "a damaged checkpoint is left to its owner"
    assert sweep(run) == [] and sweep(run / "missing") == []


def test_a_folder_is_sealed_again_after_a_kill_while_it_was_sealed(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    for name in ("manifest.json.tmp", "config.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
    seal(tmp_path, {"a": 1})
    (tmp_path / "config.json.tmp").unlink()
    assert read_card(tmp_path) == {"a": 1}


@pytest.mark.parametrize("name", ["a\0b", ".."])
def test_a_name_that_no_file_can_have_is_an_error_of_ours(tmp_path, name):
    (tmp_path / "file").write_bytes(b"x")
    seal(tmp_path, {})
    rewrite_manifest(tmp_path, lambda manifest: manifest.update(files={name: manifest["files"]["file"]}))
    with pytest.raises(CheckpointError):
        read_card(tmp_path)


# Several checkpoints of a run


@pytest.fixture
def run(tmp_path):
    """Steps 1 to 4 and a million, with content numbered likewise."""
    for step in (1, 2, 3, 4):
        save(step_folder(tmp_path, step), **content(step))
    save(step_folder(tmp_path, 1_000_000), **content(5))
    return tmp_path


def test_step_folders_are_named_by_their_step(tmp_path):
    assert step_folder(tmp_path, 123) == tmp_path / "step-000123"
    assert step_folder(str(tmp_path), 1_234_567) == tmp_path / "step-1234567"


def test_newest_valid_goes_by_number(run):
    save(step_folder(run, 999_999), **content(6))  # the last by name
    for name in ("step-", "step-999999999x", "step-99", "other"):
        (run / name).mkdir()
    (run / "step-9999999").write_bytes(b"a file")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = newest_valid(run)
    assert found.card["seed"] == 5 and found.folder == run / "step-1000000"


def test_newest_valid_passes_over_damage_and_names_it(run):
    (run / "step-1000000" / "manifest.json").unlink()
    change_byte(one(run / "step-000004", "training-*"), 100)
    with pytest.warns(CheckpointWarning) as caught:
        found = newest_valid(run, like=LIKE)
    assert found.card["seed"] == 3
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "step-1000000" in texts[0] and "not finished" in texts[0]
    assert "step-000004" in texts[1] and "sha256" in texts[1]


def test_newest_valid_finds_nothing(tmp_path):
    assert newest_valid(tmp_path) is None
    assert newest_valid(tmp_path / "missing") is None
    step_folder(tmp_path, 1).mkdir()
    with pytest.warns(CheckpointWarning, match="step-000001"):
        assert newest_valid(tmp_path) is None


def test_newest_valid_raises_for_another_model(run):
    with pytest.raises(CheckpointMismatch, match="step-1000000"):
        newest_valid(run, like={**LIKE, "net/bias": torch.ones(4)})


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.iterdir())


@pytest.mark.parametrize(
    ("damaged", "keep", "left"),
    [
        ([], 1, [1_000_000]),
        ([], 2, [4, 1_000_000]),
        ([], 9, [1, 2, 3, 4, 1_000_000]),
        ([1_000_000], 1, [4, 1_000_000]),
        ([3], 2, [4, 1_000_000]),
        ([4], 2, [3, 1_000_000]),
        ([1, 2], 9, [3, 4, 1_000_000]),
        ([2, 3, 4, 1_000_000], 1, [1, 2, 3, 4, 1_000_000]),
        ([1, 2, 3, 4, 1_000_000], 1, [1, 2, 3, 4, 1_000_000]),
    ],
)
def test_prune_keeps_the_newest_sound_ones(run, damaged, keep, left):
    for i, step in enumerate(damaged):
        target = one(step_folder(run, step), ("manifest.json", "weights-*")[i % 2])
        target.unlink() if i % 3 else change_byte(target, -3)
    removed = prune(run, keep)
    assert steps(run) == left
    assert {path.name for path in removed} == {step_folder(run, s).name for s in {1, 2, 3, 4, 1_000_000} - set(left)}
    assert prune(run, keep) == []


def test_prune_leaves_other_things_alone_and_at_least_one(run):
    (run / "config.json").write_bytes(b"mine")
    (run / "step-12").mkdir()
    with pytest.raises(CheckpointError, match="at least 1, found 0"):
        prune(run, 0)
    prune(run, 1)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "step-1000000", "step-12"]
    assert prune(run / "missing", 1) == []


def test_a_removal_that_ends_at_any_point_leaves_no_half_checkpoint(run, monkeypatch, tmp_path_factory):
    copies = tmp_path_factory.mktemp("copies")
    for at in range(12):
        copy = copies / str(at)
        shutil.copytree(run, copy)
        with failing(monkeypatch, at, Killed()), pytest.raises(Killed):
            prune(copy, 1)
        for path in copy.iterdir():
            if (path / "manifest.json").exists():
                load(path)
        assert newest_valid(copy).card["seed"] == 5
        prune(copy, 1)
        assert steps(copy) == [1_000_000]


def test_a_copy_of_a_sealed_folder_is_none_until_it_is_sealed(tmp_path):
    """Else a process killed between the copying and the sealing would leave what ``recover`` takes for whole."""
    checkpoints.write_atomically(tmp_path / "model" / "config.json", b"{}")
    checkpoints.seal(tmp_path / "model", {"step": 1})
    new = tmp_path / "shipped.new"
    checkpoints.copy_files(tmp_path / "model", new)
    assert [path.name for path in new.iterdir()] == ["config.json"]
    checkpoints.recover(tmp_path / "shipped")
    assert not new.exists() and not (tmp_path / "shipped").exists()
