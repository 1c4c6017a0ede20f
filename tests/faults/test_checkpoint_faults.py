"""Processes that are killed while they save a checkpoint."""

import itertools
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from aigc_course import checkpoints
from aigc_course.checkpoints import CheckpointError, CheckpointWarning, newest_valid, save, step_folder
from aigc_course.runtime import rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit
from faults import workers


def content(step: int, n: int = 500_000) -> dict:
    """Arguments of ``save``, a few MB that are a pure function of ``step``."""
    rng = rng_for("killed", step)
    weights = {"w": torch.randn(n, generator=rng), "b": torch.full((3,), float(step))}
    return {"weights": weights, "training": {"moments": torch.randn(n, generator=rng)}, "card": {"step": step}}


def is_of(found: checkpoints.Checkpoint, step: int) -> bool:
    expected = content(step)
    tensors = [(found.weights[name], tensor) for name, tensor in expected["weights"].items()]
    tensors.append((found.training["moments"], expected["training"]["moments"]))
    return found.card == expected["card"] and all(torch.equal(a, b) for a, b in tensors)


def note(log: Path, word: str, step: int) -> None:
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{word} {step} {time.monotonic()}\n")


def notes(log: Path, word: str) -> list[tuple[int, float]]:
    """The steps and times noted with ``word``; a line that the kill has cut is left out."""
    lines = log.read_text(encoding="utf-8").split("\n")[:-1] if log.exists() else []
    return [(int(step), float(when)) for kind, step, when in map(str.split, lines) if kind == word]


def save_steps(log: Path, run: Path, first: int) -> None:
    """Worker: what ``fit`` does at a checkpoint, over and over."""
    for step in itertools.count(first):
        made = content(step)
        note(log, "begin", step)
        save(step_folder(run / "checkpoints", step), **made)
        checkpoints.prune(run / "checkpoints", keep=2)
        checkpoints.write_atomically(run / "history.json", b"[]")
        note(log, "done", step)


def save_again(log: Path, run: Path, first: int) -> None:
    """Worker: what a recipe does, one checkpoint in place of the other."""
    for step in itertools.count(first):
        made = content(step)
        note(log, "begin", step)
        save(run / "model", **made)
        note(log, "done", step)


def seal_again(log: Path, run: Path, first: int) -> None:
    """Worker: what a language model's run does each time that it scored best."""
    for step in itertools.count(first):
        data = safetensors.torch.save(content(step)["weights"])
        note(log, "begin", step)
        (run / checkpoints.MANIFEST).unlink(missing_ok=True)
        checkpoints.write_atomically(run / "model.safetensors", data)
        checkpoints.write_atomically(run / "config.json", b"{}")
        checkpoints.seal(run, {"step": step})
        note(log, "done", step)


def train(log: Path | None, run: Path | None, steps: int) -> torch.Tensor:
    """Worker: a training whose every step is saved; when step k begins, k steps are done and saved."""

    def step(state, batch, rng):
        if log is not None:
            note(log, "begin", state.step_count)
            note(log, "done", state.step_count)
        loss = (state.nets["net"](batch) + torch.randn(1, generator=rng)).square().mean()
        state.minimize("net", loss)
        return {"loss": loss}

    net = torch.nn.Linear(300, 500)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.1, generator=rng_for("weights"))
    state = TrainState({"net": net}, {"net": torch.optim.Adam(net.parameters())})
    config = TrainConfig(steps=steps, batch_size=4, device="cpu", checkpoint_every=1)
    fit(step, state, torch.randn(16, 300, generator=rng_for("data")), config, out=run)
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone().numpy()


def kill(rng: random.Random, target: Callable, log: Path, run: Path, number: int) -> tuple[int, int]:
    """Kill a worker in or near a save; returns the last step that it had reported as saved, and the last begun."""
    process = workers.start(target, log, run, number)
    workers.wait_until(lambda: notes(log, "done"))
    seen = len(notes(log, "begin")) + rng.randrange(2)
    workers.wait_until(lambda: len(notes(log, "begin")) > seen, every=0.0005)
    (_, begun), (_, done) = notes(log, "begin")[0], notes(log, "done")[0]
    if target is train:
        begun, done = (when for _, when in notes(log, "begin")[:2])
    if rng.random() < 0.6:  # most of a save is packing; here the disk is being written
        workers.wait_until(lambda: any(name.endswith(".tmp") for *_, names in os.walk(run) for name in names), every=0)
        time.sleep(rng.uniform(0, 0.02))
    else:
        time.sleep(rng.uniform(0, 1) * (done - begun))
    process.kill()
    process.join()
    assert process.exitcode == -9
    return notes(log, "done")[-1][0], notes(log, "begin")[-1][0]


def strays(run: Path) -> list[Path]:
    """Temporary files and those that no manifest names, but for one of the reader's own."""
    found = [path for path in run.rglob("*.tmp") if path.name != "mine.tmp"]
    for folder in run.glob("checkpoints/step-*"):
        names = {path.name for path in folder.iterdir()} - {checkpoints.MANIFEST}
        named = {e["name"] for e in checkpoints._read_manifest(folder, checkpoints.FORMAT)["files"].values()}
        found += [folder / name for name in names ^ named]
    return found


def check_steps(run: Path, saved: int, sweep: bool) -> bool:
    """The last step that was reported is there, or one after it; returns whether the kill left something half done."""
    folder = run / "checkpoints"
    for name in ("mine.tmp", "weights-final.safetensors"):
        (folder / name).write_bytes(b"mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        found = newest_valid(folder)
    assert found.card["step"] >= saved, f"step {saved} is lost"
    assert is_of(found, found.card["step"])
    if not sweep:
        return False
    removed = [*checkpoints.sweep(folder), *checkpoints.sweep(run)]
    assert not strays(run) and len(list(folder.glob("*"))) - 2 == len(list(folder.glob("step-*")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_of(newest_valid(folder), found.card["step"]), "sweeping has changed what is newest"
    return bool(removed)


def check_again(run: Path, saved: int) -> bool:
    found = checkpoints.load(run / "model")
    assert found.card["step"] >= saved and is_of(found, found.card["step"])
    removed = checkpoints.sweep(run / "model")
    assert len(list((run / "model").iterdir())) == 3 and is_of(checkpoints.load(run / "model"), found.card["step"])
    return bool(removed)


def check_sealed(run: Path, saved: int) -> bool:
    try:
        step, half = checkpoints.read_card(run)["step"], False
        assert step >= saved
        assert safetensors.torch.load_file(run / "model.safetensors")["b"][0] == step
    except CheckpointError:
        assert not (run / checkpoints.MANIFEST).exists(), "a manifest stands for a whole model"
        half = True
    checkpoints.seal(run, {"step": 0})
    checkpoints.sweep(run)
    assert not strays(run) and checkpoints.read_card(run) == {"step": 0}
    return half


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.fault("1")
def test_a_process_is_killed_while_it_saves(fault, tmp_path):
    """Of ten kills six hit the saving of steps, two one checkpoint in place of another, one a sealing, one ``fit``."""
    inside = half = 0
    steps = 12
    undisturbed = workers.run(train, None, None, steps).value
    for i in range(fault.n):
        kind = [*[save_steps] * 6, save_again, save_again, seal_again, train][i % 10]
        chain = tmp_path / f"{i // 10}" / kind.__name__  # the next worker starts where the last one was killed
        chain.mkdir(parents=True, exist_ok=True)
        log = tmp_path / f"{i}.log"
        with fault.case(f"{kind.__name__} {i}"):
            saved, begun = kill(fault.rng, kind, log, chain, steps if kind is train else 100 * i)
            inside += begun > saved
            if kind is train:  # it notes no end of a save
                half += any(chain.rglob("*.tmp")) or any(not any(p.glob("manifest*")) for p in chain.glob("*/step-*"))
                found = newest_valid_quietly(chain / "checkpoints")
                assert found.card["step"] >= saved, f"step {saved} is lost"
                ended = workers.run(train, None, chain, steps)
                assert (ended.value == undisturbed).all(), f"{ended.error} {ended.message}"
                assert not strays(chain)
            elif kind is save_steps:
                half += check_steps(chain, saved, sweep=i % 2 == 0)
            else:
                half += {save_again: check_again, seal_again: check_sealed}[kind](chain, saved)
        if i % 10 == 9:
            shutil.rmtree(chain.parent)
    print(f"{inside} of {fault.n - fault.n // 10} kills fell into a save, {half} are known to have left it half done")
    assert inside >= fault.n // 2 and half >= fault.n // 20, (
        f"{inside} kills fell into a save, {half} left it half done"
    )


def newest_valid_quietly(folder: Path) -> checkpoints.Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        return newest_valid(folder)
