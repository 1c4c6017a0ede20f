"""The variational autoencoder of binary images (Kingma and Welling 2014, arXiv:1312.6114).

The prior is p(z) = N(0, I), the encoder q(z|x) = N(mu(x), diag(exp(logvar(x)))), the decoder p(x|z) a product of one
Bernoulli distribution per pixel. The axes are n images, z latent units and k samples; everything is in nats.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear
from .runtime import CourseError
from .state import TrainState

SIZE = 28  # images are (n, 1, 28, 28)
ROWS = 1000  # pairs of an image and a sample decoded at once: few enough for a processor's cache


class VAEError(CourseError):
    """An image or a latent that the model cannot take."""


# ---- network ----


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The width of the latent and of the hidden layers; the decoder has the encoder's layers in reverse order."""

    z_dim: int = 50
    hidden: Sequence[int] = (200, 200)

    def __post_init__(self):
        hidden = tuple(self.hidden) if isinstance(self.hidden, Sequence) else ()
        for name, widths in {"z_dim": (self.z_dim,), "hidden": hidden}.items():
            if not widths or not all(type(width) is int and width > 0 for width in widths):
                example = "whole numbers of at least 1, as in z_dim=20, hidden=(200, 200)"
                raise VAEError(f"VAEConfig.{name} is {getattr(self, name)!r}: widths are {example}")
        object.__setattr__(self, "hidden", hidden)


class VAE(nn.Module):
    """Encoder and decoder with tanh layers, as in Burda et al. (2016, arXiv:1509.00519, section 5).

    ``pixel_means``, the share of ones of each pixel over the training data, sets the biases of the decoder's outputs,
    so that it starts from the mean image. Images are (n, 1, 28, 28) with pixels 0 or 1: ``VAEError`` otherwise.
    """

    def __init__(self, config: VAEConfig, *, pixel_means: Tensor | None = None, rng: torch.Generator | None = None):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):  # Linear draws weights, replaced below, from the global generator
            self.encoder = _mlp(SIZE * SIZE, *config.hidden, 2 * config.z_dim)
            self.decoder = _mlp(config.z_dim, *reversed(config.hidden), SIZE * SIZE)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=rng)
                nn.init.zeros_(module.bias)
        if pixel_means is not None:
            if not ((pixel_means >= 0) & (pixel_means <= 1)).all():
                raise VAEError(
                    "pixel_means must lie in [0, 1]: for images in [-1, 1] they are (images.mean(0) + 1) / 2"
                )
            self.decoder[-1].bias.data.copy_(pixel_means.flatten().clamp(1e-3, 1 - 1e-3).logit())

    def encode(self, x: Float[Tensor, "n 1 28 28"]) -> tuple[Float[Tensor, "n z"], Float[Tensor, "n z"]]:
        """The mean and the log-variance of q(z|x)."""
        check_binary(x)
        mu, logvar = _at_least_float32(self.encoder(x.flatten(1))).chunk(2, dim=-1)
        return mu, logvar

    def decode(self, z: Float[Tensor, "*batch z"]) -> Float[Tensor, "*batch 1 28 28"]:
        """The logits of the pixels' probabilities of being 1."""
        if z.shape[-1] != self.config.z_dim:
            raise VAEError(f"a latent is {z.shape[-1]} wide, but this model has z_dim={self.config.z_dim}")
        return _at_least_float32(self.decoder(z)).unflatten(-1, (1, SIZE, SIZE))

    def log_prob(self, x: Float[Tensor, "n 1 28 28"], z: Float[Tensor, "*k n z"]) -> Float[Tensor, "*k n"]:
        """log p(x|z), a sum over the pixels."""
        check_binary(x)
        return bernoulli_log_prob(x, self.decode(z))


def _at_least_float32(outputs: Tensor) -> Tensor:
    return outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # sums over 784 pixels are no task for bf16


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, following in zip(widths, widths[1:], strict=False):
        layers += [Linear(width, following), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def check_binary(x: Tensor) -> None:
    """Raise ``VAEError`` unless ``x`` holds images (n, 1, 28, 28) whose pixels are 0.0 or 1.0."""
    remedy = "datasets.binarize(images, rng) turns images in [-1, 1] into such pixels; scale others to [-1, 1] first"
    if x.shape[1:] != (1, SIZE, SIZE) or not x.is_floating_point():
        found = f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
        raise VAEError(f"x is {found}, expected floats of shape (n, 1, {SIZE}, {SIZE}): {remedy}")
    binary = (x > 0).to(x.dtype)
    if not torch.equal(x, binary):
        found = f"{x[x != binary][0].item():g} among values from {x.min().item():g} to {x.max().item():g}"
        raise VAEError(f"x must hold pixels that are 0 or 1, found {found}: {remedy}")


def bernoulli_log_prob(x: Float[Tensor, "n 1 28 28"], logits: Float[Tensor, "*k n 1 28 28"]) -> Float[Tensor, "*k n"]:
    """log p(x) of independent pixels, summed over an image: x·l - softplus(l) for the logit l of each."""
    x, logits = x.flatten(1), logits.flatten(-3)
    return (x * logits - F.softplus(logits, threshold=40)).sum(-1)  # from 40 on log(1 + exp(l)) is l


# ---- objective ----


@runtime_checkable
class Model(Protocol):
    """What the objective asks of a model: any with Gaussian q(z|x), a standard normal prior, and a log p(x|z)."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]: ...
    def log_prob(self, x: Tensor, z: Tensor) -> Tensor: ...


class ELBO(NamedTuple):
    """The bound ``value`` = ``reconstruction`` - beta ``kl`` of each example, in nats."""

    value: Float[Tensor, "n"]
    reconstruction: Float[Tensor, "n"]
    kl: Float[Tensor, "n"]


def reparameterize(
    mu: Float[Tensor, "n z"], logvar: Float[Tensor, "n z"], noise: Float[Tensor, "*k n z"]
) -> Float[Tensor, "*k n z"]:
    """z = mu + sigma noise, distributed as q(z|x) if ``noise`` is standard normal (arXiv:1312.6114, section 2.4)."""
    return mu + (0.5 * logvar).exp() * noise


def kl_to_standard_normal(mu: Float[Tensor, "n z"], logvar: Float[Tensor, "n z"]) -> Float[Tensor, "n"]:
    """KL(N(mu, diag(exp(logvar))) || N(0, I)) of each example, in nats (arXiv:1312.6114, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)


def elbo(model: Model, x: Float[Tensor, "n *pixels"], rng: torch.Generator, *, beta: float = 1.0) -> ELBO:
    """The evidence lower bound of each example, with one draw of z for its reconstruction term.

    With ``beta`` of at least 1 its expectation is a bound on log p(x), the tightest at 1; another weight than 1 gives
    the objective of the beta-VAE (Higgins et al. 2017). The gradient passes through z, by reparameterisation.
    """
    mu, logvar = model.encode(x)
    z = reparameterize(mu, logvar, _noise(mu, rng))
    reconstruction = model.log_prob(x, z)
    kl = kl_to_standard_normal(mu, logvar)
    return ELBO(reconstruction - beta * kl, reconstruction, kl)


def log_weight(
    model: Model,
    x: Float[Tensor, "n *pixels"],
    mu: Float[Tensor, "n z"],
    logvar: Float[Tensor, "n z"],
    noise: Float[Tensor, "*k n z"],
) -> Float[Tensor, "*k n"]:
    """log p(x, z) - log q(z|x) at z = mu + sigma noise, the logarithm of an importance weight."""
    z = reparameterize(mu, logvar, noise)
    log_prior_over_posterior = 0.5 * (noise.square() + logvar - z.square()).sum(-1)  # both lose (2 pi)^(-z/2)
    return model.log_prob(x, z) + log_prior_over_posterior


def importance_weighted_bound(
    model: Model, x: Float[Tensor, "n *pixels"], k: int, rng: torch.Generator
) -> Float[Tensor, "n"]:
    """log of the mean of ``k`` importance weights, of each example: a bound on log p(x) in expectation, which rises
    with k (arXiv:1509.00519, eq. 8 and theorem 1)."""
    mu, logvar = model.encode(x)
    log_weights = log_weight(model, x, mu, logvar, _noise(mu, rng, _count(k)))
    return log_weights.logsumexp(0) - math.log(k)


@torch.no_grad()
def log_likelihood(
    model: Model, x: Float[Tensor, "n *pixels"], k: int, rng: torch.Generator, *, rows: int = ROWS
) -> Float[Tensor, "n"]:
    """``importance_weighted_bound`` for large ``k``: an estimate of log p(x) that errs on the low side on average.

    No more than ``rows`` pairs of an image and a sample are in memory at once; the result does not keep a gradient.
    """
    parts = []
    at_once = max(1, rows // _count(k))
    for images in x.split(at_once):
        mu, logvar = model.encode(images)
        log_weights = [
            log_weight(model, images, mu, logvar, _noise(mu, rng, size)).logsumexp(0)
            for size in _sizes(k, max(1, rows // max(1, len(images))))
        ]
        parts.append(torch.stack(log_weights).logsumexp(0) - math.log(k))
    return torch.cat(parts)


def _sizes(total: int, most: int) -> list[int]:
    return [min(most, total - start) for start in range(0, total, most)]


def _count(k: int) -> int:
    if k < 1:
        raise VAEError(f"k is {k}: a bound takes at least one sample")
    return k


def _noise(mu: Tensor, rng: torch.Generator, k: int | None = None) -> Tensor:
    shape = mu.shape if k is None else (k, *mu.shape)
    return torch.randn(shape, generator=rng, dtype=mu.dtype, device=mu.device)


@torch.no_grad()
def active_units(model: Model, x: Float[Tensor, "n *pixels"], *, threshold: float = 0.01) -> Bool[Tensor, "z"]:
    """Which latent units vary with the image: the variance over ``x`` of E[z|x] exceeds ``threshold``
    (arXiv:1509.00519, section 5.2)."""
    mu, _ = model.encode(x)
    return mu.var(0) > threshold


# ---- step ----


def vae_step(state: TrainState, x: Tensor, rng: torch.Generator, *, beta: float = 1.0) -> dict[str, Tensor]:
    """One update of the network "vae" that raises the ELBO of the binary images ``x``."""
    bound = elbo(state.nets["vae"], x, rng, beta=beta)
    state.minimize("vae", -bound.value.mean())
    return {"elbo": bound.value.mean(), "reconstruction": bound.reconstruction.mean(), "kl": bound.kl.mean()}


def iwae_step(state: TrainState, x: Tensor, rng: torch.Generator, *, k: int = 50, drawn: int = 8) -> dict[str, Tensor]:
    """One update of the network "vae" that raises the ``k``-sample bound of the binary images ``x``.

    The gradient of the bound is the mean of the gradients of the k log-weights, weighted by the normalised weights
    (arXiv:1509.00519, eq. 14). The plain mean over ``drawn`` samples, drawn by these weights, estimates it without
    bias, for k passes forward and only ``drawn`` back.
    """
    vae = state.nets["vae"]
    mu, logvar = vae.encode(x)
    noise = _noise(mu, rng, _count(k))
    with torch.no_grad():
        parts = noise.split(max(1, ROWS // len(x)))
        log_weights = torch.cat([log_weight(vae, x, mu, logvar, part) for part in parts])
        chosen = torch.multinomial(log_weights.softmax(0).T, drawn, replacement=True, generator=rng).T
    some = noise[chosen, torch.arange(len(x), device=x.device)]
    state.minimize("vae", -log_weight(vae, x, mu, logvar, some).mean())
    return {"bound": (log_weights.logsumexp(0) - math.log(k)).mean()}


# ---- sample ----


@torch.no_grad()
def sample(model: VAE, n: int, rng: torch.Generator) -> Float[Tensor, "n 1 28 28"]:
    """Draw ``n`` binary images from the model: z from the prior, then every pixel from its Bernoulli distribution."""
    mode = model.training
    model.eval()
    weight = model.decoder[-1].weight
    z = torch.randn(n, model.config.z_dim, generator=rng, device=weight.device)
    x = torch.bernoulli(model.decode(z).sigmoid(), generator=rng)
    model.train(mode)
    return x
