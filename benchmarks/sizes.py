"""Cost against size: seconds and memory of writing, training and EM as the context, the batch or the data grow."""

import contextlib
import ctypes
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from aigc_course.gan import DCGANConfig, Discriminator, Generator, gan_step
from aigc_course.generate import stream
from aigc_course.gmm import GaussianMixture
from aigc_course.gpt2 import GPT2, GPT2Config, KVCache
from aigc_course.plots import COLOURS, canvas, png
from aigc_course.runtime import rng_for
from aigc_course.state import TrainState
from aigc_course.vae import VAE, VAEConfig, vae_step

CONTEXTS, BATCHES, SAMPLES = (128, 256, 512, 1024), (16, 64, 256, 1024), (10**3, 10**4, 10**5, 10**6)


@dataclass(frozen=True, kw_only=True)
class Series:
    """What a workload costs at some ``sizes``, such as the tokens of a context (``size``): seconds for each ``unit`` of
    work, and the megabytes of ``memory``, None where they cannot be known. One panel shows all of one ``panel``."""

    panel: str
    name: str
    size: str
    unit: str
    memory: str
    sizes: Sequence[int]
    seconds: Sequence[float]
    megabytes: Sequence[float | None]


# ---- memory ----


def peak_growth(call: Callable[[], Any], times: int = 3) -> float | None:
    """By how many megabytes the memory of this process grew at the most while ``call`` ran; None where not Linux.

    The least of some ``times``: the holes between what is in use differ from one to the next.
    """
    return min(map(_peak_growth, [call] * times), key=lambda growth: math.inf if growth is None else growth)


def _peak_growth(call: Callable[[], Any]) -> float | None:
    try:
        give_back()
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak is now what is in use
        before = _megabytes("VmRSS")
    except (OSError, TypeError):
        call()
        return None
    call()
    return max(0.0, _megabytes("VmHWM") - before)


def give_back() -> None:
    """Return freed memory to the system: what an earlier workload left would hide what the next one takes."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _megabytes(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


# ---- measurements ----


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def writing(name: str, config: GPT2Config, contexts: Sequence[int], tokens: int = 8) -> Series:
    """Greedy tokens one after another, the last of ``tokens`` with a full context; the first also reads the prompt."""
    model, rng = GPT2(config, rng_for("sizes", "gpt2")).eval(), rng_for("sizes", "prompt")
    seconds, megabytes = [], []
    for context in contexts:
        ids = torch.randint(0, config.vocab_size, (1, context), generator=rng)
        written = stream(model, ids[:, :-tokens], max_new_tokens=tokens + 1, temperature=0)
        next(written)
        seconds.append(median([seconds_of(lambda written=written: next(written)) for _ in range(tokens)]))
        cache = KVCache()
        with torch.no_grad():
            model.hidden(ids, cache=cache)
        megabytes.append(cache.nbytes / 1e6)
    return Series(
        panel="Writing", name=name, size="tokens of context",
        unit="token", memory="memory of the cache", sizes=contexts, seconds=seconds, megabytes=megabytes
    )  # fmt: skip


def training(name: str, run: Callable[[int], Callable[[], Any]], batches: Sequence[int], steps: int = 5) -> Series:
    """``run(batch)`` builds the networks and returns one step; the peak is that of building and the first steps."""
    run(min(batches))()  # what is loaded at first use is no batch's cost
    seconds, megabytes = [], []
    for batch in batches:

        def begin(batch=batch):
            step = run(batch)
            step(), step()
            return step

        megabytes.append(peak_growth(begin))
        step = begin()
        seconds.append(median([seconds_of(step) for _ in range(steps)]))
        del step
    return Series(
        panel="Training", name=name, size="images in a batch", unit="step", memory="peak memory", sizes=batches,
        seconds=seconds, megabytes=megabytes
    )  # fmt: skip


def adam(net: torch.nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(net.parameters(), lr=2e-4, fused=True)


def vae(batch: int) -> Callable[[], Any]:
    rng = rng_for("sizes", "vae")
    net = VAE(VAEConfig(z_dim=20, hidden=(400,)), rng=rng)
    state, x = TrainState({"vae": net}, {"vae": adam(net)}), torch.rand(batch, 1, 28, 28, generator=rng).round()
    return lambda: vae_step(state, x, rng)


def dcgan(batch: int) -> Callable[[], Any]:
    rng, config = rng_for("sizes", "dcgan"), DCGANConfig(size=32)
    nets = {"generator": Generator(config, rng), "discriminator": Discriminator(config, rng)}
    state = TrainState(nets, {name: adam(net) for name, net in nets.items()})
    x = 2 * torch.rand(batch, 1, 32, 32, generator=rng) - 1
    return lambda: gan_step(state, x, rng)


def mixture(samples: Sequence[int], components: int = 10, iterations: int = 5) -> Series:
    """EM in float64 from the true parameters, in the plane; an iteration is what a fit of one more takes longer."""
    rng, seconds, megabytes = rng_for("sizes", "em"), [], []
    means = 6 * torch.randn(components, 2, generator=rng, dtype=torch.float64)
    start = torch.full((components,), 1 / components), means, torch.eye(2).expand(components, 2, 2)
    for n in samples:
        chosen = torch.randint(0, components, (n,), generator=rng)
        x = means[chosen] + torch.randn(n, 2, generator=rng, dtype=torch.float64)

        def fit(more: int, x=x):
            GaussianMixture(components, init=start, max_iter=1 + more, tol=0.0).fit(x)

        if n == samples[0]:
            fit(0)  # what is loaded at first use
        megabytes.append(peak_growth(lambda fit=fit: fit(0)))
        # of small differences of small numbers it takes more
        times = [seconds_of(lambda: fit(iterations)) - seconds_of(lambda: fit(0)) for _ in range(3 if n > 10**5 else 9)]
        seconds.append(median(times) / iterations)
    return Series(
        panel="EM", name=f"K={components} full, n x 2, fp64", size="samples", unit="iteration",
        memory="peak memory", sizes=samples, seconds=seconds, megabytes=megabytes
    )  # fmt: skip


def measure() -> list[Series]:
    """All of them, in about a minute on two threads."""
    return [
        writing("GPT-2 124M, batch 1, fp32", GPT2Config(), CONTEXTS),
        training("VAE 784-400-20, fp32", vae, BATCHES),
        training("DCGAN 32x32, fp32", dcgan, [batch for batch in BATCHES if batch <= 256], steps=3),
        mixture(SAMPLES),
    ]


# ---- results ----


def draw(series: Sequence[Series], path: str | Path) -> None:
    """Write a PNG: a column for each panel, the time above, the memory below, all axes logarithmic."""
    panels = list(dict.fromkeys(one.panel for one in series))
    with canvas(2, len(panels), width=4.0 * len(panels), height=6.4, squeeze=False) as (figure, axes):
        for above, below, panel in zip(*axes, panels, strict=True):
            shown = [one for one in series if one.panel == panel]
            for one, colour, marker in zip(shown, COLOURS, "os^Dv", strict=False):
                look = {"marker": marker, "color": colour, "label": one.name}
                above.plot(one.sizes, one.seconds, **look)
                # a logarithmic axis has no place for 0 either
                below.plot(one.sizes, [megabytes or math.nan for megabytes in one.megabytes], **look)
            above.set(title=f"{panel}: time per {shown[0].unit}", ylabel="time (log scale)")
            below.set(title=f"{panel}: {shown[0].memory}", ylabel="memory (log scale)")
            for place, words in ((above, milli), (below, "{:,g} MB".format)):
                _logarithmic(place, sorted({size for one in shown for size in one.sizes}), words)
                place.set_xlabel(f"{shown[0].size} (log scale)")
                place.legend(loc="upper left")
        Path(path).write_bytes(png(figure))


def _logarithmic(axes: Axes, sizes: Sequence[int], words: Callable[[float], str]) -> None:
    """Ticks at the sizes, at 1, 2 and 5 on the left, and so many decades there that noise looks small."""
    low, high = axes.dataLim.intervaly
    axes.set(xscale="log", yscale="log", xticks=sizes, xticklabels=[f"{size:,}" for size in sizes])
    if not 0 < low <= high < math.inf:
        low = high = 1.0
        axes.text(0.5, 0.5, "not known here", transform=axes.transAxes, ha="center")
    middle, half = math.sqrt(low * high), max(math.sqrt(high / low), 2.5)
    axes.set_ylim(middle / half**1.1, middle * half**1.7)  # above is the legend
    margin = (sizes[-1] / sizes[0]) ** 0.05 * 1.01
    axes.set_xlim(sizes[0] / margin, sizes[-1] * margin)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: words(value))
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def table(series: Sequence[Series]) -> str:
    """A line of markdown for each size."""
    lines = ["| workload | size | time | memory |", "|---|--:|--:|--:|"]
    for one in series:
        for size, seconds, megabytes in zip(one.sizes, one.seconds, one.megabytes, strict=True):
            held = "not known" if megabytes is None else f"{megabytes:,.1f} MB, {one.memory}"
            lines.append(
                f"| {one.panel}: {one.name} | {size:,} {one.size} | {milli(seconds)} per {one.unit} | {held} |"
            )
    return "\n".join(lines) + "\n"


def milli(seconds: float) -> str:
    """Three digits of a time, in ms or s."""
    value, unit = (seconds, "s") if seconds >= 0.9995 else (1000 * seconds, "ms")
    digits = max(0, 2 - math.floor(math.log10(max(value, 1e-9))))
    return f"{value:,.{digits}f}".rstrip("0").rstrip(".") + f" {unit}" if digits else f"{value:,.0f} {unit}"
