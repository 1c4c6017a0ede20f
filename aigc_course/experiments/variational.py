"""Side experiments with variational autoencoders: published likelihoods, the price of a nat, posterior collapse."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .. import recipes
from ..datasets import binarize, load_mnist
from ..runtime import rng_for, run_dir
from ..state import TrainConfig, TrainState
from ..training import fit
from ..vae import (
    VAE,
    VAEConfig,
    active_units,
    bernoulli_log_prob,
    check_binary,
    elbo,
    log_likelihood,
    reparameterize,
    vae_step,
)

Row = dict[str, Any]


# ---- the published likelihoods ----


def vae_table(device: torch.device, *, seeds: int = 3, k: int = 5000) -> Iterator[Row]:
    """Three VAEs and three IWAEs held to table 1 of Burda et al. (2016, arXiv:1509.00519), on all test digits.

    Each is the run ``runs/NAME-full-SEED`` that ``aigc train NAME --profile full --seed SEED`` makes; one that is not
    there, or not finished, is trained first. All are judged on the same binary pixels.
    """
    images = load_mnist(train=False, device=device).images
    x = binarize(images, rng_for(0, "vae_table", device=device))
    for name in ("vae", "iwae"):
        for seed in range(seeds):
            model = recipes.build(name, "full", seed=seed, device=str(device)).train(run_dir(f"{name}-full-{seed}"))
            rng = rng_for(seed, "vae_table", "bounds", device=device)
            bounds = {f"-L{size}": -log_likelihood(model, x, size, rng).mean().item() for size in (1, 50, k)}
            active = int(active_units(model, x).sum())
            yield {"model": name, "seed": seed, "images": len(x), **bounds, "active units": active}


# ---- the price of a nat ----


def vae_beta(
    device: torch.device, *, betas: tuple[float, ...] = (0.1, 0.25, 0.5, 1, 2, 4, 16), epochs: int = 8
) -> Iterator[Row]:
    """The recipe ``vae`` with other weights of the rate; its rate and distortion on the test digits."""
    train, test = _digits(device)
    for beta in betas:

        def step(state: TrainState, x: Tensor, rng: torch.Generator, beta: float = beta) -> dict[str, Tensor]:
            return vae_step(state, x, rng, beta=beta)

        model = _fit(VAE(recipes.WIDE, pixel_means=_mean(train), rng=rng_for(0, "beta")), step, train, epochs)
        row = _bounds(model, test)
        yield {"beta": beta, "rate": row["kl"], "distortion": -row["elbo"] - row["kl"], **row}


# ---- posterior collapse ----


class AutoregressiveVAE(VAE):
    """A VAE whose pixels also see, linearly, all pixels before them, row by row: its decoder can do without z."""

    def __init__(self, config: VAEConfig, **options):
        super().__init__(config, **options)
        self.context = nn.Parameter(torch.zeros(784, 784))
        self.register_buffer("before", torch.ones(784, 784).tril(-1))  # no pixel sees itself or a later one

    def log_prob(self, x: Float[Tensor, "n 1 28 28"], z: Float[Tensor, "*k n z"]) -> Float[Tensor, "*k n"]:
        check_binary(x)
        seen = F.linear(x.flatten(1), self.context * self.before)
        return bernoulli_log_prob(x, self.decode(z) + seen.unflatten(1, (1, 28, 28)))


def collapse_step(
    state: TrainState, x: Tensor, rng: torch.Generator, *, beta: float = 1.0, free_nats: float = 0.0
) -> dict[str, Tensor]:
    """``vae_step`` in which a unit's rate, averaged over the batch, costs nothing up to ``free_nats``
    (Kingma et al. 2016, arXiv:1606.04934)."""
    model = state.nets["vae"]
    mu, logvar = model.encode(x)
    z = reparameterize(mu, logvar, torch.randn(mu.shape, generator=rng, device=mu.device))
    rates = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean(0)  # of each unit
    reconstruction = model.log_prob(x, z).mean()
    state.minimize("vae", beta * rates.clamp_min(free_nats).sum() - reconstruction)
    return {"elbo": reconstruction - rates.sum(), "kl": rates.sum()}


def vae_collapse(device: torch.device, *, epochs: int = 8, alone: int = 4, z_dim: int = 20) -> Iterator[Row]:
    """A decoder trained on its own first, then given a code: nothing done, KL warm-up (Bowman et al. 2016,
    arXiv:1511.06349), free bits (Kingma et al. 2016, arXiv:1606.04934)."""
    train, test = _digits(device)
    warm = epochs * (len(train) // recipes.BATCH_SIZE) // 2
    remedies: dict[str, Callable[[int], dict[str, float]]] = {
        "none": lambda step: {},
        "warm-up": lambda step: {"beta": min(1.0, step / warm)},
        "free bits": lambda step: {"free_nats": 0.5},
    }

    def decoder_step(state: TrainState, x: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        z = torch.randn(len(x), z_dim, generator=rng, device=x.device)  # a code that says nothing
        loss = -state.nets["vae"].log_prob(x, z).mean()
        state.minimize("vae", loss)
        return {"loss": loss}

    for remedy, options in remedies.items():

        def step(state: TrainState, x: Tensor, rng: torch.Generator, options=options) -> dict[str, Tensor]:
            return collapse_step(state, x, rng, **options(state.step_count))

        config = VAEConfig(z_dim=z_dim, hidden=(200, 200))
        model = AutoregressiveVAE(config, pixel_means=_mean(train), rng=rng_for(0, "collapse")).to(device)
        _fit(model, decoder_step, train, alone)
        row: Row = {"remedy": remedy, "epoch": [], "elbo": [], "kl": [], "active units": []}

        def watch(epoch: int, row: Row = row, model: VAE = model) -> None:
            for name, value in {"epoch": epoch, **_bounds(model, test)}.items():
                row[name].append(value)

        _fit(model, step, train, epochs, on_epoch=watch)
        row["-L500 of 500"] = -log_likelihood(model, test[:500], 500, rng_for(0, "truth", device=device)).mean().item()
        yield row


# ---- what they share ----


def _digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """The training images in [-1, 1], and the test images binarised once."""
    test = load_mnist(train=False, device=device).images
    return load_mnist(train=True).images, binarize(test, rng_for(0, "experiments", device=device))


def _mean(images: Tensor) -> Tensor:
    return (images.mean(0) + 1) / 2


def _fit(
    model: VAE,
    step: Callable[[TrainState, Tensor, torch.Generator], Mapping[str, Tensor]],
    images: Tensor,
    epochs: int,
    on_epoch: Callable[[int], None] | None = None,
) -> VAE:
    """Train by ``step`` on ``images`` binarised afresh, with the batches and learning rates of the recipe ``vae``."""
    per_epoch = len(images) // recipes.BATCH_SIZE
    steps = epochs * per_epoch
    adam = torch.optim.Adam(model.parameters(), lr=recipes.LEARNING_RATE, eps=1e-4)
    config = TrainConfig(steps=steps, batch_size=recipes.BATCH_SIZE, precision="fp32", log_every=per_epoch)

    def binary_step(state: TrainState, images: Tensor, rng: torch.Generator) -> Mapping[str, Tensor]:
        adam.param_groups[0]["lr"] = recipes.learning_rate(state.step_count, steps)
        return step(state, binarize(images, rng), rng)

    on_log = (lambda step, figures: on_epoch(step // per_epoch)) if on_epoch else None
    fit(binary_step, TrainState({"vae": model}, {"vae": adam}), images, config, on_log=on_log)
    return model


@torch.no_grad()
def _bounds(model: VAE, x: Tensor) -> dict[str, float]:
    bound = elbo(model, x, rng_for(0, "bounds", device=x.device))
    active = int(active_units(model, x).sum())
    return {"elbo": bound.value.mean().item(), "kl": bound.kl.mean().item(), "active units": active}
