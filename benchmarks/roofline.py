"""What this machine can do at best: the rates of its matrix products and of its memory, to hold the rows against."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from .clock import Result, quiet, sample, short_collections

SIZES = (1024, 2048)
REPEATS = 5
LONG_ENOUGH = 0.1  # seconds of a sample, at least


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Matrix products in GF/s (10^9 multiplications and additions a second), ``memory`` in GB/s (10^9 bytes) read.

    ``fp32`` is the best of all roads, ``fp32_public`` the best that torch documents, ``fp32_torch`` that of ``a @ b``.
    """

    fp32: float
    fp32_public: float
    fp32_torch: float
    bf16: float
    fp64: float
    memory: float


def rates() -> Rates:
    """Measure all of them, with torch's present number of threads; takes about ten seconds and 400 MB."""
    with torch.inference_mode(), _plain_float32(), short_collections():
        plain = _matrix_rate(torch.float32, lambda a, b: lambda: a @ b)
        public = max(plain, _matrix_rate(torch.float32, _convolution), _matrix_rate(torch.float32, _mkldnn_linear))
        return Rates(
            fp32=max(public, _matrix_rate(torch.float32, _mkldnn_operator)),
            fp32_public=public,
            fp32_torch=plain,
            bf16=_matrix_rate(torch.bfloat16, lambda a, b: lambda: a @ b),
            fp64=_matrix_rate(torch.float64, lambda a, b: lambda: a @ b),
            memory=_memory_rate(),
        )


def share(result: Result, rates: Rates) -> tuple[float, str] | None:
    """The seconds that the work of ``result`` would take at the rate that limits it, over those that ours took.

    The second value names that limit: a number format, or "memory". None if the row failed or counts no work.
    """
    if result.error:
        return None
    rate = getattr(rates, result.format, None)  # int8 has none: its rows count bytes
    bounds = [(result.flops / (rate * 1e9), result.format)] if result.flops and rate else []
    bounds += [(result.bytes / (rates.memory * 1e9), "memory")] if result.bytes else []
    if not bounds:
        return None
    seconds, limit = max(bounds)
    return seconds / median(result.ours), limit


def _matrix_rate(dtype: torch.dtype, road: Callable[[Tensor, Tensor], Callable[[], Tensor]]) -> float:
    """GF/s of the product of two square matrices by ``road``, at the better size; 0 where torch lacks that road."""
    best = 0.0
    for n in SIZES:
        generator = torch.Generator().manual_seed(n)
        a, b = (torch.randn(n, n, generator=generator).to(dtype) for _ in range(2))
        try:
            best = max(best, 2e-9 * n**3 / _seconds(road(a, b)))
        except (
            AttributeError,
            NotImplementedError,
            RuntimeError,
        ):  # torch without oneDNN, or not for this CPU
            return 0.0
    return best


def _convolution(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """A 1x1 convolution over channels that lie together: a row of ``a`` is a pixel."""
    pixels = a.T.reshape(1, len(a), 32, -1).contiguous(memory_format=torch.channels_last)
    kernel = b[:, :, None, None]
    return lambda: F.conv2d(pixels, kernel)


def _mkldnn_linear(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """The linear layer of tensors in oneDNN's own layout."""
    x, weight = a.to_mkldnn(), b.to_mkldnn()
    return lambda: F.linear(x, weight)


def _mkldnn_operator(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """oneDNN's linear layer of ordinary tensors, which torch keeps to itself."""
    return lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _memory_rate() -> float:
    """GB/s at which 400 MB are read, by a sum or by the product of a matrix and a vector, whichever is faster."""
    x = torch.ones(10_000, 10_000)
    vector = torch.ones(10_000)
    return x.nbytes / 1e9 / min(_seconds(x.sum), _seconds(lambda: torch.mv(x, vector)))


def _seconds(work: Callable[[], Tensor]) -> float:
    """The median seconds of ``work``, of the samples during which the machine was quiet, or of all if none was."""
    calls = max(1, round(LONG_ENOUGH / min(sample(work)[0].seconds for _ in range(2))))

    def several() -> None:
        for _ in range(calls):
            work()

    samples = [sample(several)[0] for _ in range(REPEATS)]
    return median(s.seconds for s in [s for s in samples if quiet(s)] or samples) / calls


@contextmanager
def _plain_float32() -> Iterator[None]:
    """float32 products without bfloat16 inside."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
