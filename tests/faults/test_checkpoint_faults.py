"""Processes that are killed while they save a checkpoint."""

import itertools
import json
import os
import random
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aigc_course import checkpoints, training
from aigc_course.checkpoints import CheckpointWarning, newest_valid, save
from aigc_course.gpt2 import GPT2, GPT2Config
from aigc_course.recipes import language
from aigc_course.runtime import rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.tokenizer import Tokenizer
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
        made, history = content(step), {"loss": [float(step)] * 1000}
        state = SimpleNamespace(
            step_count=step,
            history=history,
            weights=partial(made.get, "weights"),
            training=partial(made.get, "training"),
        )
        note(log, "begin", step)
        training._write(state, run / "checkpoints", made["card"], keep=2)
        note(log, "done", step)


def save_again(log: Path, run: Path, first: int) -> None:
    """Worker: what a recipe does, one checkpoint in place of the other."""
    for step in itertools.count(first):
        made = content(step)
        note(log, "begin", step)
        save(run / "model", **made)
        note(log, "done", step)


def seal_again(log: Path, run: Path, first: int) -> None:
    """Worker: what a language model's run does when it is scored; every second time it is the best so far."""
    sys.addaudithook(lambda event, _: time.sleep(0.002) if event == "os.rename" else None)  # time to kill between two
    keeper = object.__new__(language._Keeper)  # its own __init__ reads the poems
    model = GPT2(GPT2Config(vocab_size=260, block_size=8, n_layer=2, n_head=2, n_embd=128), rng_for("sealed"))
    keeper.plan = SimpleNamespace(model=model, tokenizer=Tokenizer.train(["to be or not to be"], 260))
    keeper.folder, keeper.facts = run / "model", {}
    for step in itertools.count(first):
        best = step - step % 2
        keeper.curve = [{"step": best, "valid": 1.0}, {"step": step, "valid": 2.0}]
        keeper.weights = {n: torch.full_like(t, best) for n, t in model.state_dict().items()} if step == best else {}
        note(log, "begin", step)
        keeper.save()
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
    try:
        workers.wait_until(lambda: notes(log, "done"))
        seen = len(notes(log, "begin")) + rng.randrange(2)
        workers.wait_until(lambda: len(notes(log, "begin")) > seen, every=0.0005)
        (_, begun), (_, done) = notes(log, "begin")[0], notes(log, "done")[0]
        if target is train:
            begun, done = (when for _, when in notes(log, "begin")[:2])
        if target is seal_again and (number % 200 or rng.random() < 0.5):  # one folder takes the place of the other
            swap = run / "model.old" if number % 200 else run / "model.new" / checkpoints.MANIFEST
            workers.wait_until(swap.exists, every=0)
        elif rng.random() < 0.6:  # most of a save is packing; here the disk is being written
            workers.wait_until(
                lambda: any(name.endswith(".tmp") for *_, names in os.walk(run) for name in names), every=0
            )
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0, 1) * (done - begun))
    finally:
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


def check_steps(run: Path, saved: int) -> bool:
    """The last step that was reported is there, or one after it; returns whether the kill left something half done."""
    folder = run / "checkpoints"
    for name in ("mine.tmp", "weights-final.safetensors"):
        (folder / name).write_bytes(b"mine")
    found = newest_valid_quietly(folder)
    assert found.card["step"] >= saved, f"step {saved} is lost"
    assert is_of(found, found.card["step"])
    config, history = (json.loads((run / f"{name}.json").read_text(encoding="utf-8")) for name in ("config", "history"))
    assert config["step"] >= found.card["step"] and history["loss"][-1] >= found.card["step"]
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
    half = [path.name for path in run.iterdir()] != ["model"]
    checkpoints.recover(run / "model")  # as ``fit`` does
    card, found = checkpoints.read_card(run / "model"), language.restore_language(run / "model", torch.device("cpu"))
    assert card["curve"][-1]["step"] >= saved, f"the model of step {saved} is lost"
    assert all((p == card["figures"]["at step"]).all() for p in found.model.parameters())
    assert [path.name for path in run.iterdir()] == ["model"] and not strays(run)
    return half


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.fault("1")
def test_a_process_is_killed_while_it_saves(fault, tmp_path):
    """Of ten kills five hit the saving of steps, two one checkpoint in place of another, two a sealing, one ``fit``."""
    inside = half = 0
    steps = 40  # that a kill comes before the last
    undisturbed = workers.run(train, None, None, steps).value
    for i in range(fault.n):
        kind = [*[save_steps] * 5, *[save_again] * 2, *[seal_again] * 2, train][i % 10]
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
                ended = workers.run(train, again := tmp_path / f"{i}.again.log", chain, steps)
                assert (ended.value == undisturbed).all(), f"{ended.error} {ended.message}"
                assert [step for step, _ in notes(again, "begin")] == [*range(found.card["step"], steps)]
                assert not strays(chain)
            else:
                check = {save_steps: check_steps, save_again: check_again, seal_again: check_sealed}[kind]
                half += check(chain, saved)
        if i % 10 == 9:
            shutil.rmtree(chain.parent)
    print(f"{inside} of {fault.n - fault.n // 10} kills fell into a save, {half} are known to have left it half done")
    assert inside >= fault.n // 2 and half >= max(1, fault.n // 20), (
        f"{inside} kills fell into a save, {half} left it half done"
    )


def newest_valid_quietly(folder: Path) -> checkpoints.Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        return newest_valid(folder)
