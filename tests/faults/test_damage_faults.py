"""Checkpoints in which one bit is flipped, and checkpoints cut short."""

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from aigc_course import checkpoints, recipes
from aigc_course.checkpoints import CheckpointError, CheckpointWarning, newest_valid, save, step_folder
from aigc_course.runtime import course_dir
from faults.table import clear_error
from faults.test_checkpoint_faults import content, train

SHIPPED = course_dir() / "data" / "checkpoints"


class Subject(NamedTuple):
    """A folder whose every file is to be held to its manifest, and what reads it."""

    folder: Path
    read: Callable[[], object]

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def subjects(tmp_path) -> list[Subject]:
    """Copies of shipped models in both formats, and checkpoints of ours of several kinds."""
    made = []
    for name in ("classifier", "vae", "iwae", "gpt2-tang", "gpt2-shakespeare"):
        folder = Path(shutil.copytree(SHIPPED / name, tmp_path / name))
        recipe = recipes.build(name.removeprefix("gpt2-"), "full", device="cpu")
        made.append(Subject(folder, lambda restore=recipe.restore, folder=folder: restore(folder)))
        if name.startswith("gpt2"):
            made.append(Subject(folder, lambda folder=folder: checkpoints.read_card(folder)))
    whole = {
        "with training": content(1, 300),
        "weights alone": {"weights": content(2, 3000)["weights"]},
        "a long history": {**content(3, 10), "training": {"history": {"loss": torch.rand(5000)}, "text": ["é"] * 50}},
        "a long card": {**content(4, 10), "card": {f"figure {i}": i / 7 for i in range(200)} | {"name": "混合"}},
    }
    for name, arguments in whole.items():
        folder = save(tmp_path / name, **arguments)
        made.append(Subject(folder, lambda folder=folder: checkpoints.load(folder)))
    trained = tmp_path / "trained"
    train(None, trained, 2)
    made.append(Subject(step_folder(trained / "checkpoints", 2), lambda: newest_alone(trained / "checkpoints")))
    return made


def newest_alone(folder: Path) -> None:
    """Raise the reason why the newest checkpoint was passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        try:
            newest_valid(folder)
        except CheckpointWarning as warning:
            raise CheckpointError(str(warning).split(": ", 1)[1]) from warning


@contextmanager
def damaged(path: Path, *, flip: int | None = None, cut: int | None = None):
    """The file with one bit flipped, or only its first ``cut`` bytes; afterwards it is whole again."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(cut if flip is None else flip // 8)
        rest = file.read() if flip is None else file.read(1)
        file.seek(-len(rest), os.SEEK_CUR)
        file.truncate() if flip is None else file.write(bytes([rest[0] ^ 1 << flip % 8]))
    try:
        yield
    finally:
        with open(path, "r+b") as file:
            file.seek(cut if flip is None else flip // 8)
            file.write(rest)
        assert path.stat().st_size == before.st_size


def refused(subject: Subject, path: Path) -> None:
    message = clear_error(subject.read, "expected", "found", ";", kind=CheckpointError)
    assert message.startswith(f"{path}: "), message


@pytest.mark.fault("3")
def test_one_bit_of_a_checkpoint_is_flipped(fault, subjects):
    """Any bit of any file; every fifth among the first or the last 16 bytes, where formats keep their structure."""
    for i in range(fault.n):
        subject = subjects[i % len(subjects)]
        path = fault.rng.choice(subject.files)
        bits = 8 * path.stat().st_size
        bit = fault.rng.choice([fault.rng.randrange(128), bits - 1 - fault.rng.randrange(128)])
        bit = bit if i % 5 == 0 else fault.rng.randrange(bits)
        with fault.case(f"{path.parent.name}/{path.name} bit {bit}"), damaged(path, flip=bit):
            refused(subject, path)
    for subject in subjects:
        subject.read()  # whole again: what was refused was the damage


@pytest.mark.fault("4")
def test_a_checkpoint_is_truncated(fault, subjects):
    """Any file at any length, each once; one in four at 0, at 1 or one byte short."""
    seen = set()
    while len(seen) < fault.n:
        subject = subjects[len(seen) % len(subjects)]
        path = fault.rng.choice(subject.files)
        size = path.stat().st_size
        length = fault.rng.choice([0, 1, size - 1]) if fault.rng.random() < 0.25 else fault.rng.randrange(size)
        if (path, length) in seen:
            continue
        seen.add((path, length))
        with fault.case(f"{path.parent.name}/{path.name} at {length}"), damaged(path, cut=length):
            refused(subject, path)
    for subject in subjects:
        subject.read()
