"""On a GPU: training beside the common scripts, writing beside ``transformers``, and GPT-2's training as a share of the
card's matrix rate. ``python -m benchmarks.gpu`` prints what it finds; it needs one CUDA device.

Both sides run on the same card; theirs is what its users run there: ``.to(device)`` in the loop, float32 with TF32 as
torch has it, and for writing a static cache, which ``transformers`` compiles.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from aigc_course.datasets import binarize, load_mnist
from aigc_course.gan import gan_step
from aigc_course.gpt2 import GPT2, GPT2Config, lm_step
from aigc_course.runtime import rng_for
from aigc_course.state import TrainConfig, TrainState
from aigc_course.training import fit
from aigc_course.vae import VAE, VAEConfig, vae_step

from . import images, language
from .__main__ import line
from .clock import Pair, Row, compare
from .peers import dcgan, digits, gan, vae


class Moved:
    """The batches of a loader, moved to ``device`` one by one, as scripts do."""

    def __init__(self, loader, device: str):
        self.loader, self.device = loader, device

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator:
        return ((x.to(self.device), y) for x, y in self.loader)


def waiting(work: Callable[[], object], device: str) -> Callable[[], object]:
    """``work``, and the wait until the card has done it."""

    def waited() -> object:
        value = work()
        if device != "cpu":
            torch.cuda.synchronize()
        return value

    return waited


def training(step, nets: dict, data: Tensor, steps: int, batch: int, device: str, precision: str, **adam) -> Callable:
    """``steps`` steps of ``fit`` on ``device``."""
    optimizers = {k: torch.optim.Adam(net.to(device).parameters(), fused=True, **adam) for k, net in nets.items()}
    state = TrainState(nets, optimizers)
    config = TrainConfig(steps=steps, batch_size=batch, device=device, precision=precision)

    def sample() -> TrainState:
        state.step_count = 0
        state.history.clear()
        return fit(step, state, data, config)

    return waiting(sample, device)


def vae_pair(device: str = "cuda", steps: int = 468) -> Pair:
    """The VAE of the table; ``steps`` batches of 128."""
    net, peer = VAE(VAEConfig(z_dim=20, hidden=(400,)), rng=rng_for("gpu", "vae")), vae.VAE().to(device)
    loader = digits.batches(digits.binary_mnist(images.unpacked()), 128, drop_last=True)
    adam = torch.optim.Adam(peer.parameters(), lr=1e-3)
    data = binarize(load_mnist().images).to(device)
    ours = training(vae_step, {"vae": net}, data, steps, 128, device, "fp32", lr=1e-3)
    return Pair(ours=ours, theirs=waiting(lambda: vae.train_epoch(peer, adam, Moved(loader, device)), device))


def dcgan_pair(device: str = "cuda", steps: int = 200, precision: str = "bf16") -> Pair:
    """The DCGAN of the table, ours in bf16; ``steps`` batches of 64."""
    nets, peers = images.gan_nets(dense=False)
    for net in nets.values():
        net.to(memory_format=torch.channels_last)
    for peer in peers.values():
        peer.to(device)
    options = {"lr": 2e-4, "betas": (0.5, 0.999)}
    adams = [torch.optim.Adam(peer.parameters(), **options) for peer in peers.values()]
    loader = Moved(digits.batches(digits.mnist(images.unpacked(), pad=2), 64, drop_last=True), device)

    def step(*arguments):
        with torch.device(device):  # where the script draws its noise
            return dcgan.train_step(*arguments)

    data = load_mnist(size=32).images.to(device)
    return Pair(
        ours=training(gan_step, nets, data, steps, 64, device, precision, **options),
        theirs=waiting(partial(gan.train, step, *peers.values(), *adams, loader, steps), device),
        units=64 * steps,
        unit="sample",
    )


def writing_pair(device: str = "cuda", config: GPT2Config = language.SMALLEST, batch: int = 1, new: int = 256) -> Pair:
    """Greedy text in bf16, beside ``transformers`` with a static cache; the first couple, not timed, compiles it."""
    mine, theirs = (m.to(device, torch.bfloat16) for m in (language.in_bf16(config), language.peer(config)))
    ids = language.prompt(config, batch).to(device)
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": config.vocab_size - 1}
    if device != "cpu":
        options["cache_implementation"] = "static"
    mask = torch.ones_like(ids)
    return Pair(
        ours=waiting(lambda: language.greedily(mine, ids, new), device),
        theirs=waiting(lambda: theirs.generate(ids, attention_mask=mask, **options), device),
        check=language.same_shape,
        units=batch * new,
        unit="token",
    )


def share_of_the_matrix_rate(
    device: str = "cuda", config: GPT2Config | None = None, batch: int = 16, steps: int = 20, compiled: bool = False
) -> dict[str, float]:
    """Training GPT-2 in bf16: tokens per second, and its operations as a share of the bf16 matrix rate, measured here.

    A token costs 6 operations for each parameter that multiplies, and 6 · layers · context · width for the attention to
    half of the context on average (Chowdhery et al. 2022, arXiv:2204.02311, appendix B, halved as it is causal).
    """
    config = config or GPT2Config(dropout=0.0)
    net = GPT2(config, rng_for("gpu", "gpt2")).to(device)
    if compiled:
        net.hidden = torch.compile(net.hidden)
    t = config.block_size
    data = torch.randint(config.vocab_size, (batch * steps, t + 1), generator=rng_for("gpu", "ids"))
    state = TrainState({"gpt2": net}, {"gpt2": torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)})
    seconds = []
    for i in range(3):  # the first one warms up
        settings = TrainConfig(steps=(i + 1) * steps, batch_size=batch, device=device, precision="bf16")
        start = time.perf_counter()
        waiting(partial(fit, lm_step, state, data, settings), device)()
        seconds.append(time.perf_counter() - start)
    tokens = steps * batch * t / min(seconds[1:])
    multiplying = config.n_parameters - config.block_size * config.n_embd
    needed = 6 * multiplying + 6 * config.n_layer * t * config.n_embd
    n, many = (8192, 50) if device != "cpu" else (512, 5)
    a, b, c = torch.randn(3, n, n, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        waiting(lambda: [torch.mm(a, b, out=c) for _ in range(many)], device)()
        times.append(time.perf_counter() - start)
    rate = many * 2 * n**3 / min(times)
    return {"tokens per second": tokens, "share": tokens * needed / rate, "matrix rate, TF/s": rate / 1e12}


ROWS = [
    Row(key="gpu-vae", workload="VAE, an epoch", peer="the usual example's loop", pair=vae_pair, required=1, aim=1),
    Row(key="gpu-dcgan", workload="DCGAN, bf16", peer="the common script", pair=dcgan_pair, required=1, aim=1),
    *(
        Row(key=f"gpu-write-{n}", workload=f"GPT-2 124M, bf16, batch {n}", peer="transformers, static cache",
            pair=partial(writing_pair, batch=n), required=1, aim=1)
        for n in (1, 8)
    ),
]  # fmt: skip


def main() -> int:
    argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        print("python -m benchmarks.gpu needs a CUDA device, and torch finds none", file=sys.stderr)
        return 1
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    results = [compare(row) for row in ROWS]
    for result in results:
        print(f"{result.row.key}: {line(result)}")
    for compiled in (False, True):
        found = ", ".join(f"{k} {v:.4g}" for k, v in share_of_the_matrix_rate(compiled=compiled).items())
        print(f"training GPT-2 124M in bf16{', compiled' if compiled else ''}: {found}")
    return int(any(result.error for result in results))


if __name__ == "__main__":
    sys.exit(main())
