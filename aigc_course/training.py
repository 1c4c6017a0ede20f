"""The one training loop: it owns device, precision, data order, averages, checkpoints, progress, and knows no model."""

import hashlib
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from . import checkpoints, linear, ranks
from .runtime import (
    CourseError,
    in_notebook,
    keep_freed_memory,
    only_process,
    pick_device,
    pick_precision,
    rng_for,
    seed_for,
)
from .state import NotFiniteError, TrainConfig, TrainState

# A run may go on with other values of these; of those in TOLD fit says that they changed.
FREE = ("steps", "checkpoint_every", "log_every", "keep", "device", "clip_norm")
TOLD = ("device", "clip_norm", "settings", "linear")


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
    step: Callable[[TrainState, Any, torch.Generator], dict[str, Tensor | float]],
    state: TrainState,
    data: Data,
    config: TrainConfig,
    *,
    out: str | Path | None = None,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainState:
    """Call ``step(state, batch, rng)`` until ``config.steps`` steps are done; returns ``state``.

    With ``out``, checkpoints are written there, and a run that was interrupted (Ctrl-C, SIGTERM, kill -9) goes on from
    the newest valid one when called again with a state built the same way; ``fit`` says so. It then ends bit-identical
    to a run that was never interrupted, given the same version of torch, device and number of threads. A finished run
    is only read back: delete its folder to train anew.

    ``on_log(step, figures)`` gets each figure's mean over the last ``config.log_every`` steps.

    Started by torchrun, each process takes its share of every batch, and all end with equal parameters. Call ``fit``
    alike on every rank, with a step that returns the same figures and reaches the same parameters; their means over the
    ranks are what is recorded and followed. Rank 0 alone writes to ``out`` and calls ``on_log``; its buffers
    (BatchNorm's statistics) are saved, and on resuming all ranks take them over.

    Raises ``NotFiniteError`` at the first loss or gradient that is not finite, before it changes a parameter, and
    ``CourseError`` if ``out`` holds a run of another configuration or other data, or another process is using it, or
    if the data do not fill one batch.
    """
    rank, world = ranks.join()
    rows = len(data) if isinstance(data, Data) else None
    ranks.alike({"rows": rows, "an out": out is not None, "an on_log": on_log is not None, "config": asdict(config)})
    folder = Path(out).expanduser().absolute() if out is not None else None
    with ExitStack() as held:
        if folder is not None:
            ranks.on_first(lambda: held.enter_context(only_process(folder)))
        return _run(step, state, data, config, folder, on_log, rank, world)


def _run(step, state: TrainState, data: Data, config: TrainConfig, out: Path | None, on_log, rank, world) -> TrainState:
    device = pick_device(config.device)
    dtype = pick_precision(device, config.precision)
    if not isinstance(data, Data):
        raise CourseError(f"the data are {type(data).__name__}: give a tensor, or rows with len(), [indices] and .to()")
    per_epoch = len(data) // config.batch_size
    if per_epoch == 0:
        raise CourseError(
            f"the data have {len(data)} rows, less than one batch: lower batch_size ({config.batch_size})"
        )
    if config.batch_size % world:
        raise CourseError(f"batch_size is {config.batch_size}: it must be a multiple of the {world} ranks")
    keep_freed_memory()
    state.prepare(device, config.clip_norm, config.ema)
    folder = out / "checkpoints" if out is not None else None
    facts = {**asdict(config), "device": device.type, "precision": str(dtype), "world": world}
    facts |= {"data": _fingerprint(data), "settings": state.settings()}
    ranks.alike(facts)
    resumed = folder is not None and _resume(state, folder, facts)
    facts["linear"] = ranks.on_first(lambda: facts.get("linear") or _road(facts))  # one for all ranks
    if folder is not None and not resumed:
        _save(state, folder, facts, config.keep)  # what cannot be saved is found out now, not hours later
    ranks.spread(list(state.weights().values()))
    data = data.to(device)
    rows = partial(data.index_select, 0) if isinstance(data, Tensor) else data.__getitem__  # the same, and faster
    order, order_epoch, saved, pending, stop = None, None, state.step_count, [], 0
    seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed  # which asks every device

    with (
        _signals_held() as arrived,
        _global_rng_kept(device),
        linear.taking(facts["linear"]),
        Progress(config.steps, state.step_count) as progress,
    ):
        try:
            while state.step_count < config.steps and not (stop := ranks.largest(max(arrived, default=0))):
                epoch, position = divmod(state.step_count, per_epoch)
                if epoch != order_epoch:
                    order, order_epoch = epoch_order(config.seed, epoch, len(data)).to(device), epoch
                indices = order[position * config.batch_size : (position + 1) * config.batch_size][rank::world]
                seed(seed_for(config.seed, "global", state.step_count, rank))  # dropout draws from here
                rng = step_rng(config.seed, state.step_count, rank, device)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    figures = step(state, rows(indices), rng)
                pending.append(_numbers(figures))
                state.update_averages()
                state.step_count += 1
                if state.step_count % config.log_every == 0 or state.step_count == config.steps:
                    _record(state, pending)
                    means = _means(state, (state.step_count - 1) // config.log_every * config.log_every)
                    if rank == 0:
                        progress.update(state.step_count, means)
                    if on_log is not None:
                        ranks.on_first(lambda means=means: on_log(state.step_count, means) and None)
                if folder is not None and state.step_count % config.checkpoint_every == 0:
                    _record(state, pending)
                    saved = _save(state, folder, facts, config.keep)
            _record(state, pending)
        except NotFiniteError as error:
            kept = f"the last checkpoint is that of step {saved} in {folder.parent}" if folder else "nothing was saved"
            raise NotFiniteError(
                f"step {state.step_count}: {error}; {kept}. Build the state anew, with a lower learning rate or with "
                "TrainConfig.clip_norm, and call fit again"
            ) from None
        finally:
            _record(state, pending, alone=True)  # after an error the other ranks may be elsewhere
        if folder is not None and saved != state.step_count:
            _save(state, folder, facts, config.keep)
    if stop := max(stop, *arrived, 0):
        signal.raise_signal(stop)
    return state


def _numbers(figures: Any) -> dict[str, Tensor | float]:
    """What a step returned, copied: a figure may be a parameter, which the next step changes."""
    if not isinstance(figures, dict):
        raise CourseError(
            f"the step returned {type(figures).__name__}: it must return its figures, a dict (it may be empty)"
        )
    for name, value in figures.items():
        if isinstance(value, Tensor) and value.numel() != 1:
            raise CourseError(f"the figure {name!r} has shape {tuple(value.shape)}: a figure is one number")
    return {k: v.detach().reshape(()).clone() if isinstance(v, Tensor) else float(v) for k, v in figures.items()}


def _record(state: TrainState, pending: list[dict[str, Tensor | float]], alone: bool = False) -> None:
    """Move the figures of the steps not yet recorded, their means over the ranks, into the history.

    NaN stands where a figure is missing. ``alone`` leaves out the other ranks.
    """
    n, before = len(pending), state.step_count - len(pending)
    names = list(dict.fromkeys([*state.history, *(key for figures in pending for key in figures)]))
    if n and not alone:
        ranks.alike({"figures": names})
    for name in names:
        values = [figures.get(name, math.nan) for figures in pending]
        if all(isinstance(value, Tensor) for value in values) and n:
            values = torch.stack(values).tolist()
        means = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if n and not alone:
            ranks.average([means])
        state.history.setdefault(name, [math.nan] * before).extend(means.tolist())
    pending.clear()


def _means(state: TrainState, start: int) -> dict[str, float]:
    """Each figure's mean over the steps from ``start`` on that had it."""
    present = {name: [v for v in values[start:] if not math.isnan(v)] for name, values in state.history.items()}
    return {name: sum(values) / len(values) for name, values in present.items() if values}


def _save(state: TrainState, folder: Path, facts: dict, keep: int) -> int:
    """Write a checkpoint and what people read; returns the step."""
    ranks.on_first(partial(_write, state, folder, {**facts, "step": state.step_count}, keep))
    return state.step_count


def _write(state: TrainState, folder: Path, card: dict, keep: int) -> None:
    history = {name: [v if math.isfinite(v) else None for v in values] for name, values in state.history.items()}
    checkpoints.write_atomically(folder.parent / "config.json", json.dumps(card, indent=1).encode("utf-8"))
    checkpoints.write_atomically(folder.parent / "history.json", json.dumps(history).encode("utf-8"))
    place = checkpoints.step_folder(folder, state.step_count)
    checkpoints.save(place, state.weights(), training=state.training(), card=card)  # last: a run may count as finished
    checkpoints.prune(folder, keep)


def _resume(state: TrainState, folder: Path, facts: dict) -> bool:
    """Bring ``state`` to the newest valid checkpoint in ``folder``, if there is one, and say so."""
    found = ranks.on_first(partial(_newest, state, folder, facts))
    if found is not None:
        state.load_training(found.training, keep_settings=found.card["settings"] != facts["settings"])
        state.load_weights(found.weights)
    return found is not None


def _road(facts: dict, began: str | None = None) -> str:
    """The way through linear layers, for a run that ``began`` on one, or is new."""
    return linear.road_of(began) if facts["device"] == "cpu" else "torch"


def _newest(state: TrainState, folder: Path, facts: dict) -> checkpoints.Checkpoint | None:
    """The newest valid checkpoint, once it is found to be one of this very run; what a killed one left is swept."""
    checkpoints.recover(folder.parent / "model")
    for place in (folder, folder.parent, folder.parent / "model"):
        checkpoints.sweep(place)
    found = checkpoints.newest_valid(folder)
    if found is None:
        return None
    then = {"linear": "torch", **found.card}
    facts["linear"] = _road(facts, then["linear"])
    now = json.loads(json.dumps(facts))
    remedy = f"choose another out, or delete {folder.parent}"
    for name in now:
        if name == "world" and then.get(name) != now[name]:
            wanted = f"start as many as before, {remedy}"
            raise CourseError(f"{folder.parent} holds a run of {then.get(name)} processes, not {now[name]}: {wanted}")
        if then.get(name) != now[name] and name not in (*FREE, *TOLD):
            raise CourseError(f"{folder.parent} holds a run with {name} {then.get(name)}, not {now[name]}: {remedy}")
    step, steps = then["step"], now["steps"]
    if step > steps:
        raise CourseError(f"{folder.parent} holds a run of {step} steps, more than the {steps} asked for: {remedy}")
    found = checkpoints.load(found.folder, like=state.weights())
    changed = "".join(f"; {name} changed from {then[name]} to {now[name]}" for name in TOLD if then[name] != now[name])
    if step == steps:
        print(f"{folder.parent} holds this run, finished: to train it anew, delete that folder{changed}")
    elif step > 0 or changed:
        print(f"going on from step {step} of {steps} in {folder.parent}{changed}")
    return found


def _fingerprint(data: Data) -> str:
    """The number of rows and a checksum of some of them, so that a run is not resumed on other data."""
    rows = data[torch.linspace(0, len(data) - 1, 16).long()]
    parts = (
        [rows] if isinstance(rows, Tensor) else list(rows if isinstance(rows, tuple | list) else vars(rows).values())
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(
            f"{part.dtype} {tuple(part.shape)}".encode() + part.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return f"{len(data)} rows, {digest.hexdigest()[:16]}"


@contextmanager
def _signals_held() -> Iterator[list[int]]:
    """Hold Ctrl-C and SIGTERM back until the step is whole; a second Ctrl-C is not held."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def hold(number, frame):
        arrived.append(number)
        if number == signal.SIGINT:  # torchrun and Slurm may both send a SIGTERM
            signal.signal(number, before[number])

    # A signal that is ignored, as Ctrl-C is in a background job, stays ignored.
    held = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hold) for number in held}
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

    def __init__(self, steps: int, begun: int = 0, every: float = 0.5):
        self.steps, self.begun, self.every = steps, begun, every

    def __enter__(self) -> "Progress":
        self.start, self.shown, self.step, self.line, self.handle = time.monotonic(), -math.inf, 0, "", None
        return self

    def __exit__(self, *_) -> None:
        if self.line:
            self._show(last=True)

    def update(self, step: int, figures: dict[str, float]) -> None:
        self.step, now = step, time.monotonic()
        numbers = " · ".join(f"{name} {value:.4g}" for name, value in figures.items())
        seconds = now - self.start
        left = seconds * (self.steps - step) / max(1, step - self.begun)
        rest = f", about {f'{left:.0f} s' if left < 100 else f'{left / 60:.0f} min'} left" if step < self.steps else ""
        self.line = f"step {step}/{self.steps} · {numbers} · {seconds:.0f} s{rest}"
        if now - self.shown >= self.every:
            self.shown = now
            self._show()

    def _show(self, last: bool = False) -> None:
        if in_notebook():
            from IPython.display import display

            bundle = {"text/plain": self.line}
            if self.handle is None:
                self.handle = display(bundle, raw=True, display_id=True)
            else:
                self.handle.update(bundle, raw=True)
        elif sys.stderr.isatty():
            filled = 20 * self.step // max(1, self.steps)
            bar = f"[{'#' * filled}{'.' * (20 - filled)}]"
            line = f"{bar} {self.line}"[: shutil.get_terminal_size().columns - 1]  # a wrapped line cannot be redrawn
            print(f"\r\033[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
