"""The one training loop: it owns device, precision, data order, averages, checkpoints, progress, and knows no model."""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from . import checkpoints
from .runtime import CourseError, pick_device, pick_precision, rng_for, seed_for
from .state import NotFiniteError, TrainConfig, TrainState

# A run may be resumed with other values of these: they do not change what a step computes.
FREE = ("steps", "device", "checkpoint_every", "log_every", "keep")


@runtime_checkable
class Data(Protocol):
    """What ``fit`` trains on: rows that a tensor of indices picks, such as a tensor or ``datasets.Images``."""

    def __len__(self) -> int: ...
    def __getitem__(self, indices: Tensor) -> Any: ...
    def to(self, device: torch.device) -> "Data": ...


def epoch_order(seed: int, epoch: int, n: int) -> Tensor:
    """The order of ``n`` rows in an epoch: a permutation that is a pure function of (seed, epoch)."""
    return torch.randperm(n, generator=rng_for(seed, "order", epoch))


def step_rng(seed: int, step: int, rank: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    """The generator that step number ``step`` (from 0) gets: a pure function of (seed, step, rank)."""
    return rng_for(seed, "step", step, rank, device=device)


def fit(
    step: Callable[[TrainState, Any, torch.Generator], dict[str, Tensor]],
    state: TrainState,
    data: Data,
    config: TrainConfig,
    *,
    out: str | Path | None = None,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainState:
    """Call ``step(state, batch, rng)`` until ``config.steps`` steps are done; returns ``state``.

    With ``out``, checkpoints are written there, and a run that was interrupted (Ctrl-C, SIGTERM, kill -9) goes on from
    the newest valid one when called again with a state built the same way. It then ends bit-identical to a run that
    was never interrupted, given the same version of torch, device and number of threads.

    ``on_log(step, figures)`` gets each figure's mean since the last call, every ``config.log_every`` steps.

    Raises ``NotFiniteError`` at the first loss or gradient that is not finite, before it changes a parameter, and
    ``CourseError`` if ``out`` holds a run of another configuration or the data do not fill one batch.
    """
    device = pick_device(config.device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    per_epoch = len(data) // config.batch_size
    if per_epoch == 0:
        raise CourseError(
            f"the data have {len(data)} rows, less than one batch: lower batch_size ({config.batch_size})"
        )
    if config.batch_size % world:
        raise CourseError(f"batch_size is {config.batch_size}: it must be a multiple of the {world} ranks")
    state.prepare(device, config.clip_norm, config.ema)
    facts = {"config": asdict(config), "data_size": len(data)}
    folder = Path(out) / "checkpoints" if out is not None else None
    if folder is not None:
        _resume(state, folder, facts)
    data = data.to(device)
    dtype = pick_precision(device, config.precision)
    order, order_epoch, saved, pending = None, None, state.step_count, []

    with _signals_held() as arrived, _global_rng_kept(device), Progress(config.steps) as progress:
        while state.step_count < config.steps and not arrived:
            epoch, position = divmod(state.step_count, per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(config.seed, epoch, len(data)).to(device), epoch
            indices = order[position * config.batch_size : (position + 1) * config.batch_size][rank::world]
            torch.manual_seed(seed_for(config.seed, "global", state.step_count, rank))  # dropout draws from here
            try:
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    figures = step(state, data[indices], step_rng(config.seed, state.step_count, rank, device))
            except NotFiniteError as error:
                _record(state, pending)
                raise NotFiniteError(f"step {state.step_count}: {error}. {_advice(folder)}") from None
            state.update_averages()
            state.step_count += 1
            pending.append({name: torch.as_tensor(value).detach() for name, value in figures.items()})
            if state.step_count % config.log_every == 0 or state.step_count == config.steps:
                means = _record(state, pending)
                progress.update(state.step_count, means)
                if on_log is not None:
                    on_log(state.step_count, means)
            if folder is not None and state.step_count % config.checkpoint_every == 0:
                _record(state, pending)
                saved = _save(state, folder, facts, config.keep, rank)
        _record(state, pending)
        if folder is not None and saved != state.step_count:
            _save(state, folder, facts, config.keep, rank)
    if arrived:
        signal.raise_signal(arrived[0])
    return state


def _record(state: TrainState, pending: list[dict[str, Tensor]]) -> dict[str, float]:
    """Move the figures of the steps not yet recorded into the history, one transfer a figure; returns their means."""
    means = {}
    before = state.step_count - len(pending)
    for name in dict.fromkeys([*state.history, *(key for figures in pending for key in figures)]):
        values = [math.nan] * len(pending)
        present = [i for i, figures in enumerate(pending) if name in figures]
        if present:
            for i, value in zip(present, torch.stack([pending[i][name] for i in present]).tolist(), strict=True):
                values[i] = value
            means[name] = sum(values[i] for i in present) / len(present)
        state.history.setdefault(name, [math.nan] * before).extend(values)
    pending.clear()
    return means


def _save(state: TrainState, folder: Path, facts: dict, keep: int, rank: int) -> int:
    step = state.step_count
    if rank > 0:
        return step
    card = {**facts, "step": step}
    checkpoints.save(checkpoints.step_folder(folder, step), state.weights(), training=state.training(), card=card)
    checkpoints.prune(folder, keep)
    history = {name: [None if math.isnan(v) else v for v in values] for name, values in state.history.items()}
    checkpoints.write_atomically(folder.parent / "config.json", json.dumps(facts, indent=1).encode("utf-8"))
    checkpoints.write_atomically(folder.parent / "history.json", json.dumps(history).encode("utf-8"))
    return step


def _resume(state: TrainState, folder: Path, facts: dict) -> None:
    found = checkpoints.newest_valid(folder, like=state.weights())
    if found is None:
        return
    then, now = ({**f["config"], "data_size": f["data_size"]} for f in (found.card, json.loads(json.dumps(facts))))
    for name in now:
        if name not in FREE and then.get(name) != now[name]:
            raise CourseError(
                f"{folder.parent} holds a run with {name}={then.get(name)!r}, this one has {now[name]!r}: "
                "choose another out, or delete that folder"
            )
    if found.card["step"] > facts["config"]["steps"]:
        raise CourseError(
            f"{folder.parent} holds a run of {found.card['step']} steps, this one asks for {facts['config']['steps']}: "
            "choose another out, or delete that folder"
        )
    state.load_training(found.training)
    state.load_weights(found.weights)


def _advice(folder: Path | None) -> str:
    advice = "Lower the learning rate, or bound the gradient with TrainConfig.clip_norm"
    if folder is None:
        return f"{advice}; no checkpoint was asked for (out=None)"
    good = sorted(folder.glob("step-*/manifest.json"))
    return f"{advice}; the last good checkpoint is {good[-1].parent if good else 'none yet'}"


@contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Hold Ctrl-C and SIGTERM back until the step is whole; a second Ctrl-C is not held."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def hold(number, frame):
        arrived.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextmanager
def _global_rng_kept(device: torch.device) -> Iterator[None]:
    devices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


class Progress:
    """One line, updated in place at most twice a second: a display in a notebook, a bar in a terminal, else nothing."""

    def __init__(self, steps: int, every: float = 0.5):
        self.steps, self.every = steps, every

    def __enter__(self) -> "Progress":
        self.start, self.shown, self.step, self.line, self.handle = time.monotonic(), -math.inf, 0, "", None
        return self

    def __exit__(self, *_) -> None:
        if self.line:
            self._show(last=True)

    def update(self, step: int, figures: dict[str, float]) -> None:
        self.step, now = step, time.monotonic()
        numbers = " · ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.line = f"step {step}/{self.steps} · {numbers} · {now - self.start:.0f} s"
        if now - self.shown >= self.every:
            self.shown = now
            self._show()

    def _show(self, last: bool = False) -> None:
        if _in_notebook():
            from IPython.display import display

            bundle = {"text/plain": self.line}
            if self.handle is None:
                self.handle = display(bundle, raw=True, display_id=True)
            else:
                self.handle.update(bundle, raw=True)
        elif sys.stderr.isatty():
            filled = 20 * self.step // max(1, self.steps)
            bar = f"[{'#' * filled}{'.' * (20 - filled)}]"
            print(f"\r\033[K{bar} {self.line}", end="\n" if last else "", file=sys.stderr, flush=True)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")
