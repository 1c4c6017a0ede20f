"""Processes to be killed, starved or stopped: each is forked from one server that has torch loaded."""

import multiprocessing
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["faults.preload"])


class Outcome(NamedTuple):
    """How a worker ended: what it returned, or the class and message of what it raised; its exit ``code``."""

    code: int
    value: Any = None
    error: str = ""
    message: str = ""


def start(target: Callable, *args: Any) -> BaseProcess:
    """Fork a worker that runs ``target(*args)``, a function of a test module; nothing of this process is inherited."""
    process = _server.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def run(target: Callable, *args: Any, timeout: float = 60) -> Outcome:
    """The outcome of ``target(*args)`` in a worker; one that takes longer than ``timeout`` seconds is an error."""
    ours, theirs = _server.Pipe(duplex=False)
    process = start(_report, theirs, target, args)
    theirs.close()
    try:
        result = pickle.loads(ours.recv_bytes()) if ours.poll(timeout) else None
    except EOFError:  # it was killed
        result = ()
    if result is None:
        process.kill()
        process.join()
        raise TimeoutError(f"{target.__name__}{args} had not ended after {timeout} s")
    process.join()
    return Outcome(process.exitcode, *result)


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


def _report(pipe, target: Callable, args: tuple) -> None:
    try:
        result = (target(*args),)
    except BaseException as error:
        result = (None, type(error).__name__, str(error))
    pipe.send_bytes(pickle.dumps(result))  # by value: Connection.send shares a tensor's memory, which ends with us


def start_ranks(target: Callable, *args: Any, world: int = 2, timeout: int = 60) -> list[tuple[BaseProcess, Any]]:
    """Start ``target(*args)`` in ``world`` processes, as torchrun would, each with a pipe for its outcome."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in {**names, "AIGC_RANK_TIMEOUT": timeout}.items()}
        ours, theirs = _server.Pipe(duplex=False)
        started.append((start(_report, theirs, _as_rank, (environment, target, args)), ours))
        theirs.close()
    return started


def end_ranks(started: list[tuple[BaseProcess, Any]], timeout: float = 60) -> list[Outcome | None]:
    """The outcome of each rank; None for one that has not ended within ``timeout`` seconds, which is killed."""
    end, outcomes = time.monotonic() + timeout, []
    for _, pipe in started:
        try:
            result = pickle.loads(pipe.recv_bytes()) if pipe.poll(max(0.0, end - time.monotonic())) else None
        except EOFError:  # it was killed
            result = ()
        outcomes.append(result)
    for process, _ in started:
        process.join(5)
        process.kill()
        process.join()
    ended = zip(started, outcomes, strict=True)
    return [None if result is None else Outcome(process.exitcode, *result) for (process, _), result in ended]


def run_ranks(target: Callable, *args: Any, world: int = 2, timeout: int = 60) -> list[Outcome | None]:
    """The outcomes of ``target(*args)`` in ``world`` processes that train as one."""
    return end_ranks(start_ranks(target, *args, world=world, timeout=timeout), timeout + 30)


def _as_rank(environment: dict[str, str], target: Callable, args: tuple) -> Any:
    from aigc_course import ranks

    os.environ.update(environment)
    result = target(*args)
    ranks.leave()
    return result
