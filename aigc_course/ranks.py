"""Training on more than one process: join the others that torchrun started, average over them, agree with them."""

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .runtime import CourseError

T = TypeVar("T")


class RankError(CourseError):
    """The other processes of a run are lost, or are not alike."""


def join() -> tuple[int, int]:
    """This process's rank, and how many processes there are: (0, 1) unless torchrun started it.

    The first call joins the others, which torchrun names in the environment (``RANK``, ``WORLD_SIZE``,
    ``MASTER_ADDR``, ``MASTER_PORT``); a group that the caller has joined before is taken as it is. A process that
    waits for the others longer than ``AIGC_RANK_TIMEOUT`` seconds (600) gives up with ``RankError``.
    """
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        world, seconds = os.environ.get("WORLD_SIZE", ""), os.environ.get("AIGC_RANK_TIMEOUT", "600")
        if not world.isdecimal() or int(world) < 2 or "RANK" not in os.environ:
            return 0, 1
        if not seconds.isdecimal() or int(seconds) < 1:
            raise CourseError(f"AIGC_RANK_TIMEOUT is {seconds!r}: set it to a whole number of seconds")
        local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local < gpus:
            torch.cuda.set_device(local)
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # or NCCL ends the process when another one is lost
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=int(seconds)))
        except (RuntimeError, ValueError) as error:
            found = f"rank {os.environ['RANK']} has not met the other ranks ({first_line(error)})"
            raise RankError(f"{found}: start all {world} of them, by torchrun") from error
        atexit.register(leave)
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Leave the group, if this process is in one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def average(tensors: list[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in place."""
    _exchange(tensors, lambda flat: dist.all_reduce(flat), divide=True)


def spread(tensors: list[Tensor]) -> None:
    """Give every rank the values that rank 0 has, in place."""
    _exchange(tensors, lambda flat: dist.broadcast(flat, src=0))


def largest(value: int) -> int:
    """The largest of the numbers that the ranks call this with."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    tensor = torch.tensor(value, device=_wire(torch.device("cpu")))
    _guarded(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX))
    return int(tensor)


def alike(facts: dict) -> None:
    """Raise ``RankError`` on every rank unless all of them call this with equal ``facts``."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    everyone: list = [None] * dist.get_world_size()
    _guarded(lambda: dist.all_gather_object(everyone, facts))
    for rank, others in enumerate(everyone):
        for name in facts:
            if others.get(name) != everyone[0].get(name):
                raise RankError(
                    f"the ranks do not train alike: {name} is {everyone[0].get(name)} on rank 0, {others.get(name)} on "
                    f"rank {rank}: start the same command with the same files on every machine"
                )


def on_first(task: Callable[[], T]) -> T:
    """Run ``task`` on rank 0 alone; every rank waits, and returns what it returned or raises the error it raised.

    Of errors that are no ``CourseError`` the other ranks are told in a ``RankError``.
    """
    rank, world = join()
    if world == 1:
        return task()
    answer, mine = [None, None], None
    if rank == 0:
        try:
            answer[0] = task()
        except Exception as error:
            mine, told = error, f"rank 0 ended with {type(error).__name__}: {first_line(error)}"
            answer[1] = error if isinstance(error, CourseError) else RankError(told)
    _guarded(lambda: dist.broadcast_object_list(answer, src=0))
    if error := mine or answer[1]:
        raise error
    return answer[0]


def _exchange(tensors: list[Tensor], message: Callable[[Tensor], object], divide: bool = False) -> None:
    """Send ``tensors`` as one message per dtype, and put what comes back in their place."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        some = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        flat = flat.to(_wire(flat.device))
        _guarded(lambda flat=flat: message(flat))
        if divide:
            flat /= dist.get_world_size()
        for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _wire(device: torch.device) -> torch.device:
    """Where a message from ``device`` has to lie: NCCL sends from GPUs alone, gloo not from every kind of them."""
    kinds = [pair.split(":")[0] for pair in str(dist.get_backend_config()).split(",")]
    return device if device.type in kinds else torch.device("cpu" if "cpu" in kinds else "cuda")


def _guarded(call: Callable[[], object]) -> None:
    try:
        call()
    except RuntimeError as error:  # what gloo and NCCL raise when another process ends, or does not answer in time
        late = "imed out" in str(error) or "imeout" in str(error)
        slow = " (if one of them was only slow, with a larger AIGC_RANK_TIMEOUT)" if late else ""
        raise RankError(
            f"rank {dist.get_rank()} has lost the other ranks ({first_line(error)}): look for the first error above, "
            f"then start all of them again{slow}; the run goes on from its last checkpoint"
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
