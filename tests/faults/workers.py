"""Processes to be killed, starved or stopped: each is forked from one server that has torch loaded."""

import functools
import multiprocessing
import os
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

_reaping = threading.Lock()  # a start reaps what has ended; of two threads that ask for one exit code one gets none


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    """Where the workers are forked from; made when the first is asked for, as Windows has none."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["faults.preload"])
    return server


class Outcome(NamedTuple):
    """How a worker ended: what it returned, or the class and message of what it raised; its exit ``code``."""

    code: int
    value: Any = None
    error: str = ""
    message: str = ""


def start(target: Callable, *args: Any) -> BaseProcess:
    """Fork a worker that runs ``target(*args)``, a function of a test module; nothing of this process is inherited."""
    process = _server().Process(target=target, args=args, daemon=True)
    with _reaping:
        process.start()
    return process


def run(target: Callable, *args: Any, timeout: float = 60) -> Outcome:
    """The outcome of ``target(*args)`` in a worker; that of one that takes over ``timeout`` seconds is an error."""
    ours, theirs = _server().Pipe(duplex=False)
    process = start(_report, theirs, target, args)
    theirs.close()
    try:
        result = pickle.loads(ours.recv_bytes()) if ours.poll(timeout) else None
    except EOFError:  # it was killed
        result = ()
    code = _end(process, wait=0 if result is None else 10)
    told = result if result is not None else (None, "TimeoutError", f"it had not ended after {timeout} s")
    return Outcome(code, *told)


def _end(process: BaseProcess, wait: float) -> int:
    """The exit code of a process, which is killed if it has not ended after ``wait`` seconds."""
    ended = multiprocessing.connection.wait([process.sentinel], wait)
    with _reaping:
        if not ended:
            process.kill()
        process.join()
        return process.exitcode


def run_each(target: Callable, cases: Iterable[tuple], *, timeout: float = 60, at_once: int = 2) -> Iterator[Outcome]:
    """The outcomes of ``target(*case)`` for each case, in order, two workers at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(run, target, *case, timeout=timeout) for case in cases]:
            yield future.result()


def wait_until(condition: Callable[[], Any], timeout: float = 30, every: float = 0.002) -> Any:
    """What ``condition()`` returns as soon as it is true."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout} s")
        time.sleep(every)
    return found


def growth(call: Callable[[], Any]) -> int:
    """By how many bytes the memory of this process grew at the most while ``call`` ran, as Linux tells it."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now what is in use
    before, _ = _memory()
    call()
    return _memory()[1] - before


def _memory() -> tuple[int, int]:
    """The bytes of memory that this process holds, and the most that it ever held."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return tuple(1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmRSS", "VmHWM"))


def _report(pipe, target: Callable, args: tuple) -> None:
    try:
        result = (target(*args),)
    except BaseException as error:
        result = (None, type(error).__name__, str(error))
    pipe.send_bytes(pickle.dumps(result))  # by value: Connection.send shares a tensor's memory, which ends with us


class Rank(NamedTuple):
    """One of several processes that train as one, the pipe for its outcome, and the port that they meet at."""

    process: BaseProcess
    pipe: Connection
    store: Any


def start_ranks(target: Callable, *args: Any, world: int = 2, timeout: int = 60) -> list[Rank]:
    """Start ``target(*args)`` in ``world`` processes, as torchrun would."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a free port, held: none can take it
    names = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "AIGC_RANK_TIMEOUT": timeout}
    names |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}  # rank 0 opens no port of its own
    started = []
    for rank in range(world):
        environment = {name: str(value) for name, value in {**names, "RANK": rank, "LOCAL_RANK": rank}.items()}
        ours, theirs = _server().Pipe(duplex=False)
        started.append(Rank(start(_report, theirs, _as_rank, (environment, target, args)), ours, store))
        theirs.close()
    return started


def end_ranks(started: list[Rank], timeout: float = 60) -> list[Outcome | None]:
    """The outcome of each rank; None for one that has not ended within ``timeout`` seconds, which is killed."""
    end, outcomes = time.monotonic() + timeout, []
    for rank in started:
        try:
            result = pickle.loads(rank.pipe.recv_bytes()) if rank.pipe.poll(max(0.0, end - time.monotonic())) else None
        except EOFError:  # it was killed
            result = ()
        outcomes.append(result)
    codes = [_end(rank.process, 0 if result is None else 10) for rank, result in zip(started, outcomes, strict=True)]
    return [None if result is None else Outcome(code, *result) for code, result in zip(codes, outcomes, strict=True)]


def run_ranks(target: Callable, *args: Any, world: int = 2, timeout: int = 60) -> list[Outcome | None]:
    """The outcomes of ``target(*args)`` in ``world`` processes that train as one."""
    return end_ranks(start_ranks(target, *args, world=world, timeout=timeout), timeout + 30)


def _as_rank(environment: dict[str, str], target: Callable, args: tuple) -> Any:
    from aigc_course import ranks

    os.environ.update(environment)
    result = target(*args)
    ranks.leave()
    return result
