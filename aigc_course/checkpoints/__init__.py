"""Checkpoints: saved whole or not at all, and read back only if every byte is as it was written.

A checkpoint is a folder: ``weights-….safetensors``, perhaps ``training-….pt``, and ``manifest.json``, which names them
with size and sha256 and is written last. Files are named by content, so a new save never touches what the old manifest
names: a process killed at any point leaves the old checkpoint or the new one. Only one process may save into a folder.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..runtime import pick_device
from .disk import (
    MANIFEST,
    CheckpointError,
    CheckpointMismatch,
    FolderLike,
    copy_files,
    fault,
    recover,
    replaced,
    sync,
    writable,
    write_atomically,
)
from .headers import check_header

__all__ = [
    "MANIFEST", "Checkpoint", "CheckpointError", "CheckpointMismatch", "CheckpointWarning", "check_header",
    "copy_files", "load",
    "newest_valid", "prune", "read_card", "recover", "replaced", "save", "seal", "step_folder", "sweep", "writable",
    "write_atomically",
]  # fmt: skip
FORMAT = "aigc-course checkpoint, version 1"
SEALED = "aigc-course sealed folder, version 1"
SUFFIXES = {"weights": ".safetensors", "training": ".pt"}
OURS = re.compile(
    r"(weights-[0-9a-f]{12}\.safetensors|training-[0-9a-f]{12}\.pt)(\.tmp)?"
    r"|((manifest|config|history)\.json|model\.safetensors)\.tmp"
)
PLAIN = (type(None), bool, int, float, str)  # exact types: a numpy float is a float too, yet does not load again
RELOAD = "load an older checkpoint, fetch this one again, or train again"


class CheckpointWarning(UserWarning):
    """A damaged or unfinished checkpoint was passed over."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What ``save`` was given; ``training`` is None if there was none, and ``card`` is then empty."""

    weights: dict[str, Tensor]
    training: dict | None
    card: dict
    folder: Path


def save(
    folder: FolderLike, weights: Mapping[str, Tensor], *, training: Mapping | None = None, card: Mapping | None = None
) -> Path:
    """Write a checkpoint into ``folder``, in place of the one that may be there, and return the folder.

    ``weights`` are finite tensors on any device; tied ones are written once per name. ``training`` is what a resumed
    run needs: nested dicts, lists and tuples of numbers, strings, None and tensors. ``card`` is JSON, for people.
    Raises ``CheckpointError`` if the disk fails, and, before writing anything, for a value that ``load`` would refuse.
    """
    folder, files, contents = Path(folder), {}, {}
    packed = {"weights": _pack_weights(folder, weights)}
    if training is not None:
        packed["training"] = _pack_training(folder, training)
    for kind, data in packed.items():
        digest = hashlib.sha256(data).hexdigest()
        files[kind] = {"name": f"{kind}-{digest[:12]}{SUFFIXES[kind]}", "bytes": len(data), "sha256": digest}
        contents[files[kind]["name"]] = data
    contents[MANIFEST] = _pack_manifest(folder, files, card)  # last: it is the commit

    fresh = [folder / name for name in contents if not os.path.exists(folder / name)]
    try:
        for i, (name, data) in enumerate(contents.items()):
            write_atomically(folder / name, data, then=sum(map(len, [*contents.values()][i + 1 :])))
    except BaseException:
        with contextlib.suppress(OSError):
            manifest = folder / MANIFEST
            if not (manifest.exists() and manifest.read_bytes() == contents[MANIFEST]):
                for unfinished in fresh:
                    unfinished.unlink(missing_ok=True)
                if not manifest.exists():
                    folder.rmdir()  # only if it is empty
        raise
    with contextlib.suppress(OSError):  # the checkpoint is complete whatever happens here; the next save tidies again
        for path in folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in contents:
                path.unlink()
    return folder


def load(
    folder: FolderLike, *, like: Mapping[str, Tensor] | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Read the checkpoint in ``folder``, checking all of it; no code that a file may carry is ever run.

    ``like`` (a model's ``state_dict()``, say) gives the names, shapes and dtypes that the weights must have. They go to
    ``device``; ``training`` stays on the CPU, where optimizers and generators take their state from.
    Raises ``CheckpointMismatch`` if the weights are not like ``like``, ``CheckpointError`` if anything else is amiss.
    """
    folder, device = Path(folder), pick_device(device)
    card, parts = _read(folder)
    weights = _parse_weights(*parts["weights"], RELOAD)
    training = _parse_training(*parts["training"], RELOAD) if "training" in parts else None
    if like is not None:
        _check_like(parts["weights"][0], weights, like)
    weights = {name: tensor.to(device) for name, tensor in weights.items()}
    return Checkpoint(weights=weights, training=training, card=card, folder=folder)


def seal(folder: FolderLike, card: Mapping) -> Path:
    """Write the manifest of a folder whose files another format prescribes, such as Hugging Face's; returns the folder.

    It states size and sha256 of each file, and ``card``, which is JSON. Call it last: it is the commit.
    """
    folder = Path(folder)
    paths = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != MANIFEST and p.suffix != ".tmp"]
    files = {path.name: path.read_bytes() for path in paths}  # a killed process may have left a temporary file
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    write_atomically(folder / MANIFEST, _pack_manifest(folder, entries, card, SEALED))
    return folder


def read_card(folder: FolderLike) -> dict:
    """The card of a checkpoint or of a sealed folder, once every file is found to be as it was saved.

    Raises ``CheckpointError`` if a file is missing or damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder, FORMAT, SEALED)
    if manifest["format"] == FORMAT:
        return _read(folder)[0]
    try:
        entries = [(str(name), entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
        card = dict(manifest["card"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise fault(folder / MANIFEST, "a card and a list of files", f"neither ({error!r})", RELOAD) from error
    for name, size, digest in entries:
        if os.path.basename(name) != name:
            raise fault(folder / MANIFEST, "files in this folder", repr(name), RELOAD)
        _read_agreed(folder / name, size, digest)
    return card


def step_folder(folder: FolderLike, step: int) -> Path:
    """Where the checkpoint of training step ``step`` lies: ``folder/step-000123``."""
    return Path(folder) / f"step-{step:06d}"


def newest_valid(
    folder: FolderLike, *, like: Mapping[str, Tensor] | None = None, device: str | torch.device = "cpu"
) -> Checkpoint | None:
    """The checkpoint of the highest step in ``folder`` that loads, or None; see ``load`` for the arguments.

    Each damaged or unfinished one passed over is named in a ``CheckpointWarning``. ``CheckpointMismatch`` is raised: to
    go on from an older step, or from none, would hide the mistake.
    """
    for path in _steps(folder):
        try:
            return load(path, like=like, device=device)
        except CheckpointMismatch:
            raise
        except CheckpointError as error:
            warnings.warn(f"passed over {path.name}: {error}", CheckpointWarning, stacklevel=2)
    return None


def prune(folder: FolderLike, keep: int) -> list[Path]:
    """Remove all step folders but the newest ``keep`` (at least 1) sound ones and any newer, and return those removed.

    A damaged or unfinished one goes only if it is older than a sound one. Raises ``CheckpointError``.
    """
    if keep < 1:
        raise CheckpointError(f"prune: expected keep of at least 1, found {keep}; pass 1 to keep the newest alone")
    sound, removed = 0, []
    for path in _steps(folder):
        if sound < keep:
            try:
                _read(path)
                sound += 1
                continue
            except CheckpointError:
                if not sound:
                    continue
        try:
            (path / MANIFEST).unlink(missing_ok=True)  # first: half a removal must not look like a checkpoint
            sync(path)
            shutil.rmtree(path)
        except OSError as error:
            raise fault(path, "to remove it", error.strerror or error, "mend the permissions, prune again") from error
        removed.append(path)
    return removed


def sweep(folder: FolderLike) -> list[Path]:
    """Remove what a killed process left in ``folder`` and in its step folders, and return what was removed.

    These are temporary files, files of a checkpoint that its manifest does not name, and step folders without a
    manifest that hold nothing else. A damaged checkpoint stays, and so does what cannot be removed. Call it only while
    no other process saves there.
    """
    removed = []
    for place in (Path(folder), *_steps(folder)):
        with contextlib.suppress(OSError):
            for path in _orphans(place, step=place != Path(folder)):
                path.unlink()
                removed.append(path)
            if place != Path(folder) and not (place / MANIFEST).exists():
                place.rmdir()  # only if it is empty
                removed.append(place)
    return removed


def _orphans(place: Path, *, step: bool) -> list[Path]:
    """The files in ``place`` that belong to no checkpoint; all of ours, if it is a step folder without a manifest."""
    ours = [path for path in sorted(place.iterdir()) if OURS.fullmatch(path.name)]
    named = None  # unknown
    if (place / MANIFEST).exists():
        with contextlib.suppress(CheckpointError, KeyError, TypeError, AttributeError):
            named = {entry["name"] for entry in _read_manifest(place, FORMAT)["files"].values()}
    elif step:
        named = set()
    return [path for path in ours if path.suffix == ".tmp" or (named is not None and path.name not in named)]


def _steps(folder: FolderLike) -> list[Path]:
    """The step folders, highest step first."""
    steps = [p for p in Path(folder).glob("step-*") if re.fullmatch("step-[0-9]{6,}", p.name) and p.is_dir()]
    return sorted(steps, key=lambda path: int(path.name[5:]), reverse=True)


def _plain(value: object, where: str) -> object:
    """``value`` with each tensor as a contiguous CPU copy of its own: a view would be saved with its whole storage."""
    if isinstance(value, Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="cpu").copy_(value.detach())
    if type(value) in (dict, OrderedDict):
        return {_plain(key, f"a key of {where}"): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_plain(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) not in PLAIN:
        raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} in {where}")
    return value


# What is packed is parsed again, so that bytes which would not load are found out while the run is still alive.
def _pack_weights(folder: Path, weights: Mapping[str, Tensor]) -> bytes:
    remedy = "nothing was written: save dense, finite tensors"
    try:
        data = safetensors.torch.save(_plain(dict(weights), "weights"))
    except Exception as error:
        raise fault(folder, "tensors that safetensors can hold", error, remedy) from error
    _check_like(folder, _parse_weights(folder, data, remedy), weights)
    return data


def _pack_training(folder: Path, training: Mapping) -> bytes:
    buffer, remedy = io.BytesIO(), "nothing was written: convert it, with float() or torch.as_tensor() say"
    try:
        torch.save(_plain(dict(training), "training"), buffer)
    except Exception as error:
        raise fault(folder, "numbers, strings, None and tensors", error, remedy) from error
    _parse_training(folder, buffer.getvalue(), remedy)
    return buffer.getvalue()


def _pack_manifest(folder: Path, files: dict, card: Mapping | None, form: str = FORMAT) -> bytes:
    try:
        manifest = {"format": form, "files": files, "card": json.loads(json.dumps(dict(card or {}), allow_nan=False))}
        return _manifest_bytes({**manifest, "sha256": _digest(manifest)})
    except (TypeError, ValueError, RecursionError) as error:
        remedy = "nothing was written: keep finite numbers, strings, lists and dicts in the card"
        raise fault(folder, "a card that is JSON", error, remedy) from error


def _manifest_bytes(manifest: dict) -> bytes:
    return json.dumps(manifest, indent=2, ensure_ascii=False).encode("utf-8")


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode("utf-8")).hexdigest()


def _read_manifest(folder: Path, *forms: str) -> dict:
    """The manifest in ``folder``, of one of these formats and as it was saved."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise fault(folder, "the folder of a checkpoint", "none", "check the path, or train first")
    data = _read_bytes(path, "it was not finished: " + RELOAD)
    try:
        manifest = json.loads(data)
        if not isinstance(manifest, dict):
            raise ValueError("a list or a bare value")
        form, stated = manifest.get("format"), manifest.pop("sha256", None)
        sound = stated == _digest(manifest) and data == _manifest_bytes({**manifest, "sha256": stated})
    except (ValueError, RecursionError) as error:
        raise fault(path, "a JSON object", error, RELOAD) from error
    if form not in forms:
        raise fault(path, f"format {forms[0]!r}", repr(form)[:80], "check the path, or update the course")
    if not sound:
        raise fault(path, "the manifest that was saved", "one changed since", RELOAD)
    return manifest


def _read(folder: Path) -> tuple[dict, dict[str, tuple[Path, bytes]]]:
    """The card, and for each kind of file its path and its bytes, which agree with the manifest."""
    path, manifest = folder / MANIFEST, _read_manifest(folder, FORMAT)
    try:
        card = dict(manifest["card"])
        entries = {kind: (str(e["name"]), e["bytes"], str(e["sha256"])) for kind, e in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise fault(path, "a card and a list of files", f"neither ({error!r})", RELOAD) from error
    if "weights" not in entries or not set(entries) <= set(SUFFIXES):
        raise fault(path, "files for weights and perhaps training", sorted(entries), RELOAD)
    parts = {}
    for kind, (name, size, digest) in entries.items():
        if not re.fullmatch(rf"{kind}-[0-9a-f]{{12}}\{SUFFIXES[kind]}", name):
            raise fault(path, f"a file in this folder called {kind}-…{SUFFIXES[kind]}", repr(name), RELOAD)
        parts[kind] = (folder / name, _read_agreed(folder / name, size, digest))
    return card, parts


def _read_agreed(path: Path, size: int, digest: str) -> bytes:
    data = _read_bytes(path, RELOAD)
    if len(data) != size:
        raise fault(path, f"{size} bytes", f"{len(data)} bytes", RELOAD)
    if (actual := hashlib.sha256(data).hexdigest()) != digest:
        raise fault(path, f"sha256 {digest[:12]}…", f"{actual[:12]}…: damaged", RELOAD)
    return data


def _read_bytes(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise fault(path, "this file", "none", remedy) from error
    except (OSError, ValueError) as error:  # ValueError: there is a NUL in the name
        found = getattr(error, "strerror", None) or error
        raise fault(path, "to read it", found, "mend its permissions, or " + RELOAD) from error


def _parse_weights(path: Path, data: bytes, remedy: str) -> dict[str, Tensor]:
    try:
        check_header(io.BytesIO(data))
        weights = safetensors.torch.load(data)
        broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    except Exception as error:
        raise fault(path, "a safetensors file", f"something else ({type(error).__name__}: {error})", remedy) from error
    if broken:
        raise fault(path, "finite weights", f"NaN or infinity in {broken[0]!r}", remedy)
    return weights


def _parse_training(path: Path, data: bytes, remedy: str) -> dict:
    try:
        return dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    except Exception as error:
        found = f"something else, which was not run ({type(error).__name__})"
        raise fault(path, "a dict of numbers, strings, None and tensors", found, remedy) from error


def _check_like(path: Path, weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    remedy = "build the model as it was when saved (see the card), or choose another folder"
    for what, names in (("missing", like.keys() - weights.keys()), ("extra", weights.keys() - like.keys())):
        if names:
            some = ", ".join(map(repr, sorted(names)[:3])) + (", …" if len(names) > 3 else "")
            found = f"{len(names)} {what} ({some})"
            raise fault(path, f"the model's {len(like)} tensors", found, remedy, CheckpointMismatch)
    for what in ("shape", "dtype"):
        for name, tensor in like.items():
            expected, found = getattr(tensor, what), getattr(weights[name], what)
            if expected != found:
                expected, found = (tuple(x) if what == "shape" else x for x in (expected, found))
                raise fault(path, f"{what} {expected} for {name!r}", found, remedy, CheckpointMismatch)
