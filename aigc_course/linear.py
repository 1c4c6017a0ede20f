"""The linear layer on a CPU: in float32 at oneDNN's speed, where that is the greater one.

In float32 ``F.linear`` calls the BLAS that torch was built with, which reaches half of the processor's rate on some
machines (AMD's, with MKL), and for a single row a fraction of the memory's. oneDNN, which torch carries too, for
convolutions and bfloat16, does better there; but torch has no public, differentiable way to it. So this one is taken
only once it has proved itself in this process: the same result, the same gradients, and faster by a third.

``AIGC_LINEAR=torch`` never takes it, ``AIGC_LINEAR=onednn`` takes it without looking at the clock. Sums are added up in
another order, so results agree to rounding; each way gives the same bits every time.

oneDNN prepares, and keeps, a program for each shape that it meets. Where the number of rows is another one in every
batch these add up to gigabytes, so it is rounded up with rows of zeros.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .runtime import CourseError

ROADS = ("torch", "onednn")
FASTER = 4 / 3  # what is no faster than this is not worth the private call
SMALL = 2**19  # products with fewer multiplications cost no more than the calls around them

_chosen: str | None = None


def road() -> str:
    """Which way ``linear`` takes in this process, "torch" or "onednn"; found out at the first call."""
    global _chosen
    if _chosen is None:
        wish = os.environ.get("AIGC_LINEAR", "auto")
        if wish not in (*ROADS, "auto"):
            raise CourseError(f"AIGC_LINEAR is {wish!r}: choose 'auto', 'torch' or 'onednn'")
        _chosen = "onednn" if wish != "torch" and _right() and (wish == "onednn" or _faster()) else "torch"
    return _chosen


@contextmanager
def taking(name: str) -> Iterator[None]:
    """Take the way ``name`` inside the block, for comparisons; raises ``CourseError`` for oneDNN where it is wrong."""
    global _chosen
    if name not in ROADS or (name == "onednn" != _chosen and not _right()):
        raise CourseError(f"there is no way {name!r} on this machine: choose 'torch'")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def road_of(began: str | None) -> str:
    """The way for a run that ``began`` on one, "torch" or "onednn", or is new (None): its own, where there is that
    here, unless ``AIGC_LINEAR`` says another, so that what a clock says does not change its bits."""
    forced = os.environ.get("AIGC_LINEAR", "auto") != "auto"
    return began if began == "torch" and not forced or began == "onednn" and not forced and _right() else road()


def linear(
    x: Float[Tensor, "*n inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, "outputs"] | None = None
) -> Float[Tensor, "*n outputs"]:
    """``F.linear``: x Wᵀ + b, differentiable any number of times."""
    if _one_bf16_row(x, weight, bias):  # a sixth faster; the sum is rounded before the bias is added, and after
        y = (weight @ x.flatten()).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias
    if not _fits(x, weight, bias) or road() == "torch":
        return F.linear(x, weight, bias)
    n = x.shape[:-1].numel()
    if extra := _extra(n):
        return _onednn(F.pad(x.flatten(0, -2), (0, 0, 0, extra)), weight, bias)[:n].view(*x.shape[:-1], -1)
    return _onednn(x, weight, bias)


def _extra(n: int) -> int:
    """How many rows to add to n for one of few numbers: eight between a power of two and the next."""
    return -n % (1 << n.bit_length() - 4) if n > 64 else 0


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` that computes with ``linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, edges = grad.flatten(0, -2), ctx.next_functions  # one fewer without a bias
        for_x, for_weight, for_bias = (*map(_wanted, edges), False)[:3]
        return (
            _again(grad, weight.t()) if for_x else None,
            _again(rows.t(), x.flatten(0, -2).contiguous().t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _again(x: Tensor, weight: Tensor) -> Tensor:
    """``linear`` in backward, where the rows have been rounded up."""
    return _onednn(x, weight, None) if _fits(x, weight, None) and road() == "onednn" else F.linear(x, weight)


def _wanted(edge: tuple) -> bool:
    """Whether backward goes on along this edge: with ``backward(inputs=…)`` it goes to these alone."""
    node, _ = edge
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # autograd.grad does not tell of leaves
        return True


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _one_bf16_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and (bias is None or bias.dtype == torch.bfloat16)
        and x.device.type == weight.device.type == "cpu"
        and x.numel() == x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
        and x.ndim >= 2
        and weight.ndim == 2
        and x.numel() * len(weight) >= SMALL
        and x.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        # what counts operators, as FlopCounterMode does, knows torch's own
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = (96, 700), (400, 700), (400,), (96, 400)
    x, weight, bias, grad = (torch.randn(shape, generator=rng) for shape in shapes)
    return x.requires_grad_(), (weight / 700**0.5).requires_grad_(), bias.requires_grad_(), grad


def _right() -> bool:
    """Whether oneDNN's way exists here, and gives the result and the gradients of torch's."""
    global _chosen
    before, _chosen = _chosen, "onednn"  # or backward would ask which way to take
    try:
        with torch.inference_mode(False), torch.enable_grad():
            *inputs, grad = _example()
            ours, plain = _Linear.apply(*inputs), F.linear(*inputs)
            pairs = [(ours, plain), *zip(*(torch.autograd.grad(y, inputs, grad) for y in (ours, plain)), strict=True)]
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs)
    except (RuntimeError, AttributeError, TypeError):  # another torch, without the call or with another one
        return False
    finally:
        _chosen = before


def _faster() -> bool:
    with torch.no_grad():
        x, weight, bias, _ = _example()
        roads: list[Callable] = [F.linear, _product]
        seconds: list[list[float]] = [[], []]
        for _ in range(20):
            for call, spent in zip(roads, seconds, strict=True):
                start = time.perf_counter()
                call(x, weight, bias)
                spent.append(time.perf_counter() - start)
    return min(seconds[0]) > FASTER * min(seconds[1])  # the least: others may use the processor meanwhile
