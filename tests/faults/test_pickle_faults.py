"""Pickles that would run something, in every place where the course reads a file."""

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from aigc_course import checkpoints, datasets, experiments, recipes
from aigc_course.checkpoints import load, newest_valid, save, step_folder
from aigc_course.gpt2 import GPT2, GPT2Config
from aigc_course.runtime import rng_for
from aigc_course.tokenizer import Tokenizer
from faults import workers
from faults.table import clear_error

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the payloads call a POSIX shell")


def checkpoint(folder: Path) -> Path:
    return save(folder, {"w": torch.ones(3)}, training={"step": 1}, card={"step": 1})


def forge(folder: Path, kind: str, data: bytes) -> Path:
    """Put ``data`` in place of a file of a checkpoint, with a manifest that agrees; returns the file."""
    digest = hashlib.sha256(data).hexdigest()
    path = folder / f"{kind}-{digest[:12]}{checkpoints.SUFFIXES[kind]}"
    path.write_bytes(data)
    manifest = checkpoints._read_manifest(folder, checkpoints.FORMAT)
    manifest["files"][kind] = {"name": path.name, "bytes": len(data), "sha256": digest}
    whole = {**manifest, "sha256": checkpoints._digest(manifest)}
    (folder / checkpoints.MANIFEST).write_bytes(checkpoints._manifest_bytes(whole))
    return path


def hugging_face(folder: Path) -> Path:
    config = GPT2Config(vocab_size=260, block_size=8, n_layer=1, n_head=2, n_embd=8)
    GPT2(config, rng_for("hostile")).save_pretrained(folder)
    Tokenizer.train(["to be or not to be"], 260).save(folder)
    return folder


class Payload:
    """Unpickling this calls ``call(*arguments)``."""

    def __init__(self, call: Callable, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles of every kind that torch, numpy or pickle itself would run; each creates ``canary``."""
    touch, code = f"touch '{canary}'", f"open({str(canary)!r}, 'w').close()"
    shell = Payload(os.system, touch)

    def packed(write: Callable, *args, **kwargs) -> bytes:
        write(buffer := io.BytesIO(), *args, **kwargs)
        return buffer.getvalue()

    state = OrderedDict(w=torch.ones(2), deep={"list": [1, (2.0, shell)]})
    made = {f"system, protocol {p}": pickle.dumps(shell, protocol=p) for p in (0, 2, 4, 5)}
    made |= {
        "exec by GLOBAL": b"cbuiltins\nexec\n(V" + code.encode() + b"\ntR.",
        "eval by STACK_GLOBAL": pickle.dumps(Payload(eval, code), protocol=4),
        "system by INST": b"(V" + touch.encode() + b"\nios\nsystem\n.",
        "system by OBJ": b"(cos\nsystem\nV" + touch.encode() + b"\no.",
        "zip of torch": packed(lambda f: torch.save(shell, f)),
        "zip, in a state dict": packed(lambda f: torch.save(state, f)),
        "torch before 1.6": packed(lambda f: torch.save(state, f, _use_new_zipfile_serialization=False)),
        "object array, npy": packed(np.save, np.array([shell], dtype=object), allow_pickle=True),
        "object array, npz": packed(np.savez, a=np.array([shell], dtype=object)),
    }
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, data in {
            "sys_info": pickle.dumps({}),
            "storages": pickle.dumps(0) + pickle.dumps([]),
            "tensors": pickle.dumps(0),
            "pickle": pickle.dumps(shell, protocol=2),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return made | {"tar of torch": tar.getvalue()}


def fire(folder: Path) -> list[str]:
    """Worker: load each payload as a careless reader would; returns those that ran."""
    warnings.simplefilter("ignore")
    ran = []
    for name, data in payloads(folder / "canary").items():
        if name.startswith("object array"):
            found = np.load(io.BytesIO(data), allow_pickle=True)
            _ = found["a"] if name.endswith("npz") else found
        elif "torch" in name or name.startswith("zip"):
            (folder / "payload").write_bytes(data)  # torch looks for a tar in a true file only
            torch.load(folder / "payload", weights_only=False)
        else:
            pickle.loads(data)
        if (folder / "canary").exists():
            (folder / "canary").unlink()
            ran.append(name)
    return ran


def in_checkpoint(kind: str):
    def plant(folder: Path, data: bytes):
        path = forge(checkpoint(folder), kind, data)
        return lambda: load(folder), path.name

    return plant


def in_manifest(folder: Path, data: bytes):
    (checkpoint(folder) / checkpoints.MANIFEST).write_bytes(data)
    return lambda: load(folder), checkpoints.MANIFEST


def in_newest_step(folder: Path, data: bytes):
    """The newest valid checkpoint is the one before it."""
    good, bad = (checkpoint(step_folder(folder, step)) for step in (1, 2))
    path = forge(bad, "training", data)

    def read():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert newest_valid(folder).folder == good
        assert any(path.name in str(warning.message) for warning in caught)

    return read, None


LITTER = (
    "pt",
    "pth",
    "bin",
    "ckpt",
    "pkl",
    "joblib",
    "npy",
    "npz",
    "txt",
    "model",
    "h5",
    "json",
    "safetensors",
    "gz",
    "py",
)


def beside_checkpoint(folder: Path, data: bytes):
    checkpoint(folder)
    for ending in LITTER:
        for stem in ("training", "weights", "pytorch_model", "optimizer"):
            (folder / f"{stem}.{ending}").write_bytes(data)
    return lambda: load(folder), None


def in_place_of(name: str, *, instead: str = "", read: Callable = GPT2.from_pretrained, ignored: bool = False):
    """``name`` of a Hugging Face folder; ``instead`` is removed."""

    def plant(folder: Path, data: bytes):
        shutil.copytree(folder.parent / "model", folder)
        if instead:
            (folder / instead).unlink()
        (folder / name).write_bytes(data)
        return lambda: read(folder), None if ignored else folder.name if instead else name

    return plant


def in_place_of_weights(folder: Path, data: bytes):
    """A file of any ending, and no other weights."""
    shutil.copytree(folder.parent / "model", folder)
    (folder / "model.safetensors").unlink()
    names = [f"{stem}.{ending}" for stem in ("pytorch_model", "model") for ending in LITTER]
    return lambda: each_refused(folder, names, data, GPT2.from_pretrained), None


def each_refused(folder: Path, names: list[str], data: bytes, read: Callable) -> None:
    """One error for each name that ``data`` has in ``folder``, one at a time."""
    for name in names:
        (folder / name).write_bytes(data)
        clear_error(lambda: read(folder), str(folder))
        (folder / name).unlink()


def in_shards(name: str):
    def plant(folder: Path, data: bytes):
        in_place_of(name, instead="model.safetensors")(folder, data)
        index = {"weight_map": {"transformer.wte.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return lambda: GPT2.from_pretrained(folder), name

    return plant


def with_code(folder: Path, data: bytes):
    """A folder that asks for code of its own, as ``trust_remote_code`` would run it."""
    in_place_of("pytorch_model.bin", ignored=True)(folder, data)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}, "trust_remote_code": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("modeling.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(f"open({str(folder.parent / 'canary')!r}, 'w')", encoding="utf-8")
    return lambda: (GPT2.from_pretrained(folder), Tokenizer.load(folder)), None


def in_sealed(name: str):
    def plant(folder: Path, data: bytes):
        in_place_of(name)(folder, data)
        checkpoints.seal(folder, {})
        return lambda: recipes.build("tang", "quick", device="cpu").restore(folder), name

    return plant


def in_data(name: str, read: Callable[[Path], object], *, packed: bool = False, text: bool = False):
    """A data file, with a manifest of the reader's own that agrees; one that is to be text is not run, and may load."""

    def plant(folder: Path, data: bytes):
        for path in {*datasets.MNIST_FILES[False], name} if name.startswith("mnist") else {name}:
            stored = gzip.compress(data) if packed else data
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(stored)
            entry = {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
            entry |= {"content_bytes": len(data), "content_sha256": hashlib.sha256(data).hexdigest()}
            manifest = folder / "manifest.json"
            table = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
            manifest.write_text(json.dumps({**table, path: entry}), encoding="utf-8")
        return lambda: read(folder), None if text and data.isascii() else Path(name).name

    return plant


def in_recording(folder: Path, data: bytes):
    (folder / "data" / "histories").mkdir(parents=True)
    (folder / "data" / "histories" / "vae_beta.json").write_bytes(data)
    experiments.course_dir = lambda: folder
    return lambda: experiments.recorded("vae_beta"), "vae_beta.json"


def as_picture(folder: Path, data: bytes):
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folder.mkdir()
    return lambda: each_refused(folder, [f"a{ending}" for ending in IMG_EXTENSIONS], data, datasets.image_folder), None


def mnist_test(root: Path) -> object:
    return datasets.load_mnist(root, train=False)


PLACES = {
    "training state": in_checkpoint("training"),
    "weights": in_checkpoint("weights"),
    "manifest": in_manifest,
    "the newest of two steps": in_newest_step,
    "beside a checkpoint": beside_checkpoint,
    "weights of any ending": in_place_of_weights,
    "pytorch_model.bin beside": in_place_of("pytorch_model.bin", ignored=True),
    "model.safetensors": in_place_of("model.safetensors"),
    "a shard, .bin": in_shards("pytorch_model-00001-of-00001.bin"),
    "a shard, .safetensors": in_shards("model-00001-of-00001.safetensors"),
    "the list of shards": in_place_of("model.safetensors.index.json", instead="model.safetensors"),
    "config.json": in_place_of("config.json"),
    "tokenizer.json": in_place_of("tokenizer.json", read=Tokenizer.load),
    "tokenizer_config.json": in_place_of("tokenizer_config.json", read=Tokenizer.load),
    "code of its own": with_code,
    "a sealed model": in_sealed("model.safetensors"),
    "MNIST, in the gzip": in_data("mnist/t10k-labels-idx1-ubyte.gz", mnist_test, packed=True),
    "poems": in_data("poems/tang300.txt", lambda root: datasets.load_poems("tang300", root), text=True),
    "a recording": in_recording,
    "a picture": as_picture,
}


def attack(place: str, folder: Path) -> int:
    """Worker: every payload in one place: one clear error that names the file, or none where it is not to be read."""
    warnings.simplefilter("ignore")
    hugging_face(folder / "model")
    made = payloads(folder / "canary")
    for i, (name, data) in enumerate(made.items()):
        read, named = PLACES[place](folder / str(i), data)
        try:
            read() if named is None else clear_error(read, named)
        except BaseException as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
        assert not (folder / "canary").exists(), f"{name} was run"
    return len(made)


@pytest.mark.fault("5")
def test_no_pickle_is_ever_run(fault, tmp_path):
    """Each case is a place; each of the payloads is put there."""
    (tmp_path / "armed").mkdir()
    armed = workers.run(fire, tmp_path / "armed")
    assert armed.value == [*payloads(tmp_path)], f"a payload is a dud: {armed}"
    cases = [(place, tmp_path / str(i)) for i, place in enumerate(PLACES)][: fault.n]
    for (place, _), outcome in zip(cases, workers.run_each(attack, cases), strict=True):
        with fault.case(place):
            assert outcome.value == len(payloads(tmp_path)), f"{outcome.error}: {outcome.message}"
